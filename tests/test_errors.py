"""Errors as a user meets them: exit status 2 or 1, one or two lines, the thing and what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import call, outcome, run, settings
from tiny_models import save_bert

WRONG = [
    (["--set", "federation.round=3"], "federation.round", "Did you mean federation.rounds?"),
    (["--set", "train.lr=fast"], "train.lr is 'fast'", "--set train.lr="),
    (["--set", "adapter.rank=0"], "adapter.rank is 0", "--set adapter.rank="),
    (["--set", "federation.rounds=2.5"], "federation.rounds is 2.5", "--set federation.rounds="),
    (["--set", "strategy.name=fedavgg"], "strategy.name is 'fedavgg'", "Did you mean fedavg?"),
    (["--set", "strategy.lamda=1"], "key strategy.lamda", "Known keys: strategy.server-"),
    (["--set", "train.learning-rate=1"], "train.learning-rate", "Did you mean train.lr?"),
    (["--set", "strategy.lamda=1", "--set", "strategy.name=lora-fair"], "lamda", "strategy.lambda"),
    (["--set", "task.name=digit"], "task.name is 'digit'", "Did you mean digits?"),
    (["--set", "adapter.targets=['nothing']"], "nothing", "q_proj"),
    (["--set", "adapter.targets=['q_proj', 'nope']"], "matches 'nope'", "q_proj"),
    (["--set", "adapter.rank=100000"], "adapter.rank is 100000", "at most 64"),
    (["--set", "federation.clients=800"], "800", "780"),
    (["--set", "model.base=./no/such/folder"], "no/such/folder", ""),
    (["--set", "model.device=abacus"], "abacus", "cpu"),
    (["--set", "federation.rounds"], "not key=value", "--set train.lr=0.01"),
    (["--engine", "spark"], "spark", "in-process"),
    (["no-such-file.toml"], "no-such-file.toml", "Check the path."),
    (["--resume", "no-such-run"], "no-such-run", "fedgraft simulate"),
    (["--resume", "a", "--out", "b"], "--out is given as well", "Leave --out out"),
    (["."], ". is a folder", ".toml"),
    (["--set", "federation.min-clients=7"], "federation.min-clients is 7", ""),
    (["--set", "train.steps=1", "--set", "train.epochs=2"], "train.steps and train.epochs", ""),
    (["--set", "adapter.from=nowhere"], "adapter.from is 'nowhere'", ""),
]


@pytest.mark.parametrize(("arguments", "named", "remedy"), WRONG, ids=lambda value: str(value)[:40])
def test_what_cannot_work_is_said_before_anything_runs(
    arguments: list[str],
    named: str,
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("simulate", *arguments)
    assert done.status == 2, done.err
    assert done.err.startswith("Error: ") and named in done.err and remedy in done.err
    assert len(done.err.strip().splitlines()) <= 2 and "Traceback" not in done.err
    assert done.out == "" and list(tmp_path.iterdir()) == []


def test_a_broken_row_is_named_with_its_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\nfine,1\nno label here\ngood,1\n")
    base = save_bert(tmp_path / "bert")
    task = ["--set", "task.name=text-classification", "--set", f"task.data={path}"]
    task += ["--set", f"model.base={base}", "--set", "federation.clients=1"]
    done = call("simulate", *task, "--out", tmp_path / "run")
    assert done.status == 2
    assert "reviews.csv" in done.err and "line 3" in done.err
    path.write_text("text,stars\nfine,1\nbad,0\n")
    done = call("simulate", *task, "--out", tmp_path / "run")
    assert done.status == 2
    assert "label" in done.err and "stars" in done.err
    assert not (tmp_path / "run").exists()


def test_invalid_toml_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("[train]\nlr = \n")
    done = call("simulate", tmp_path / "my.toml")
    assert done.status == 2
    assert "my.toml is not valid TOML" in done.err and "line 2" in done.err


@pytest.mark.usefixtures("digits")
def test_an_out_directory_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    small = settings(federation__rounds=1)
    assert call("simulate", *small, "--out", tmp_path / "run").status == 0
    before = (tmp_path / "run" / "summary.json").read_bytes()
    done = call("simulate", *small, "--out", tmp_path / "run")
    assert done.status == 2
    assert "already holds a run" in done.err and f"--resume {tmp_path / 'run'}" in done.err
    assert (tmp_path / "run" / "summary.json").read_bytes() == before


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB, which a whole run fits; where none may be mounted the test is skipped."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


PERSONAL = {"train__optimizer_state": "keep", "federation__rounds": 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run leaves that never met a full disk."""
    path = tmp_path_factory.mktemp("whole") / "run"
    assert call("simulate", *settings(**PERSONAL), "--out", path).status == 0
    return outcome(path)


@pytest.mark.parametrize(
    ("free", "what"),
    [(4, "config.toml"), (20, "round-000000"), (120, "personal"), (440, ""), (760, "")],
    ids=["config", "first-checkpoint", "personal-state", "second-round", "later"],
)
def test_a_full_disk_ends_a_run_clearly_and_loses_nothing(
    free: int, what: str, disk: Path, whole: dict[str, Any]
) -> None:
    """With so many KiB free; when there is room again, the run ends as if nothing had happened.

    The clients' disk is the run's own here, so none of them is taken for one that failed.
    """
    left = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(left.f_bavail * left.f_frsize - free * 1024))
    run = disk / "run"
    done = call("simulate", *settings(**PERSONAL), "--out", run)
    assert (done.status, done.out) == (1, "")
    first, second = done.err[done.err.index("Error: ") :].splitlines()
    assert ("disk is full" in first or "No space left" in first) and what in first
    assert second.endswith(f"Continue with: fedgraft simulate --resume {run}")
    (disk / "ballast").unlink()
    resumed = call("simulate", "--resume", run)
    assert resumed.status == 0, resumed.err
    assert outcome(run) == whole and (run / "report.html").exists()


OWN_SERVER = "raise SystemExit('this is the user\\'s own server.py')\n"


@pytest.fixture
def own_modules(tmp_path: Path) -> Path:
    """A working directory that holds the user's own server.py, client.py and client/."""
    for name in ("server.py", "client.py", "strategies.py"):
        (tmp_path / name).write_text(OWN_SERVER)
    (tmp_path / "simulations").mkdir()
    (tmp_path / "simulations" / "__init__.py").write_text(OWN_SERVER)
    return tmp_path


@pytest.mark.slow
def test_the_command_works_beside_the_users_own_modules(own_modules: Path) -> None:
    """So do comparisons and Ray: see end_to_end/test_compare.py and test_engines.py."""
    small = settings(federation__rounds=1, federation__clients=2)
    done = run("simulate", *small, "--out", "run", "--json", cwd=own_modules)
    assert done.status == 0, done.err
    assert json.loads(done.out)["rounds"] == 1


def test_a_script_beside_the_users_own_modules_is_told_which_file_hides_ours(
    own_modules: Path,
) -> None:
    script = own_modules / "study.py"
    script.write_text("from fedgraft import simulate\nsimulate({'federation.rounds': 1})\n")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=own_modules, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "is hidden by" in done.stderr and str(own_modules) in done.stderr
    assert "user's own" not in done.stderr
