"""A run killed at any moment and resumed ends as one that was never interrupted, bit for bit."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import deaths
import pytest
from command_line import call, events, outcome, records, run, settings, start

from fedgraft.errors import RunError
from fedgraft.run_directory import RunDirectory

PERSONAL = {"train__optimizer_state": "keep", "federation__fraction": 0.7}
"""Two of three clients a round, each with an optimizer of its own: personal state counts."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What runs leave behind, by `checkpoint.every`."""
    found = {}
    for every in (1, 2):
        path = tmp_path_factory.mktemp("whole") / "run"
        done = call("simulate", *settings(checkpoint__every=every, **PERSONAL), "--out", path)
        assert done.status == 0, done.err
        found[every] = outcome(path)
    return found


def die(forks: ForkServerContext, moment: str, round: int, arguments: list[str]) -> None:
    process = forks.Process(target=deaths.fedgraft, args=(arguments, moment, round))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def resume(path: Path, *more: str) -> None:
    done = call("simulate", "--resume", path, *more)
    assert done.status == 0, done.err


MOMENTS = [
    (1, "in_training", 1),
    (1, "in_training", 4),
    (1, "in_aggregation", 3),
    (1, "writing_a_checkpoint", 0),
    (1, "writing_a_checkpoint", 4),
    (1, "renaming_a_checkpoint", 4),
    (1, "writing_personal_state", 3),
    (1, "writing_a_record", 3),
    (1, "writing_the_adapter", 6),
    (1, "writing_the_summary", 6),
    (2, "in_training", 4),
    (2, "in_aggregation", 6),
    (2, "writing_a_checkpoint", 4),
]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("every", "moment", "round"), MOMENTS)
def test_a_killed_run_ends_as_if_nothing_had_happened(
    every: int,
    moment: str,
    round: int,
    forks: ForkServerContext,
    uninterrupted: dict[int, dict[str, Any]],
    tmp_path: Path,
) -> None:
    path = tmp_path / "run"
    arguments = settings(checkpoint__every=every, **PERSONAL)
    die(forks, moment, round, ["simulate", *arguments, "--out", str(path)])
    assert not (path / "summary.json").exists()
    resume(path)
    assert outcome(path) == uninterrupted[every]
    assert list(path.rglob(".*.tmp")) == [] and not (path / "spool").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("strategy", "moment", "round"),
    [
        ("ffa-lora", "in_training", 4),
        ("ffa-lora", "in_aggregation", 3),
        ("lora-fair", "in_aggregation", 3),
        ("lora-fair", "writing_a_checkpoint", 4),
    ],
)
def test_other_strategies_end_as_if_nothing_had_happened_too(
    strategy: str, moment: str, round: int, forks: ForkServerContext, tmp_path: Path
) -> None:
    """Where A is in the seed, and where a round has two phases."""
    arguments = settings(strategy__name=strategy, federation__rounds=5, **PERSONAL)
    done = call("simulate", *arguments, "--out", tmp_path / "whole")
    assert done.status == 0, done.err
    die(forks, moment, round, ["simulate", *arguments, "--out", str(tmp_path / "run")])
    resume(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_resume_that_is_killed_is_resumed(
    forks: ForkServerContext, uninterrupted: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    arguments = settings(checkpoint__every=2, **PERSONAL)
    die(forks, "in_aggregation", 3, ["simulate", *arguments, "--out", str(path)])
    die(forks, "writing_a_record", 4, ["simulate", "--resume", str(path)])
    die(forks, "writing_a_checkpoint", 4, ["simulate", "--resume", str(path)])
    resume(path)
    assert outcome(path) == uninterrupted[2]


@pytest.mark.slow
def test_the_command_killed_from_outside_and_started_again(
    uninterrupted: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    """The installed command, twice: nothing survives in a process."""
    path = tmp_path / "run"
    process = start("simulate", *settings(**PERSONAL), "--out", path, cwd=tmp_path)
    wait_for(path, "reply", round=3)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and not (path / "summary.json").exists()
    done = run("simulate", "--resume", path, cwd=tmp_path)
    assert done.status == 0, done.err
    assert outcome(path) == uninterrupted[1]


def wait_for(path: Path, event: str, round: int) -> None:
    end = time.monotonic() + 120
    while not any(e["event"] == event and e.get("round", 0) >= round for e in events(path)):
        assert time.monotonic() < end, f"no {event} of round {round}"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_ctrl_c_says_how_to_go_on(
    forks: ForkServerContext, uninterrupted: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    path, said = tmp_path / "my run", tmp_path / "said"
    arguments = ["simulate", *settings(**PERSONAL), "--out", str(path)]
    process = forks.Process(target=deaths.fedgraft, args=(arguments, "", 0, str(said)))
    process.start()
    assert process.pid is not None
    wait_for(path, "sampled", round=2)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 1 and not (path / "summary.json").exists()
    complaint, remedy = said.read_text().splitlines()[-2:]
    assert complaint == "Error: interrupted; everything up to the last checkpoint is kept"
    command = shlex.split(remedy.split("Continue with: fedgraft ")[1])
    assert command == ["simulate", "--resume", str(path)]
    assert call(*command).status == 0
    assert outcome(path) == uninterrupted[1]


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_diverges_is_not_to_be_resumed(tmp_path: Path) -> None:
    """It would diverge again, and a resume cannot change the learning rate."""
    wild = settings(train__lr=1e30, train__grad_clip=0.0, train__optimizer="sgd")
    done = call("simulate", *wild, "--out", tmp_path / "run")
    assert done.status == 1 and "training diverged in round 1" in done.err
    remedy = done.err.splitlines()[-1]
    assert "Lower train.lr or set train.grad-clip in a new run" in remedy
    assert "--resume" not in remedy


def test_ctrl_c_that_a_library_swallows_ends_the_run_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Safetensors, for one, turns what is raised in its callbacks into an error of its own."""
    from client import seat

    def swallowing(*arguments: Any, **options: Any) -> Any:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise RunError("the tensor is of unknown shape") from None

    monkeypatch.setattr(seat, "train", swallowing)
    done = call("simulate", *settings(), "--out", tmp_path / "run")
    assert done.status == 1 and "Error: interrupted; everything up to" in done.err


def test_what_was_killed_before_its_plots_were_drawn_gets_them(
    forks: ForkServerContext, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    arguments = settings(federation__rounds=1, federation__clients=1)
    die(forks, "drawing", 0, ["simulate", *arguments, "--out", str(path)])
    assert (path / "summary.json").exists() and not (path / "report.html").exists()
    done = call("simulate", "--resume", path)
    assert (path / "report.html").exists() and list((path / "plots").glob("*.png"))
    assert done.status == 0 and "is finished after 1 rounds" in done.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    assert call("simulate", *settings(federation__rounds=2), "--out", path).status == 0
    return path


def test_a_finished_run_says_so(finished: Path) -> None:
    before = {f: f.read_bytes() for f in finished.rglob("*") if f.is_file()}
    for more in ([], ["--set", "federation.rounds=1"]):
        done = call("simulate", "--resume", finished, *more)
        assert done.status == 0
        assert "is finished after 2 rounds" in done.err
        assert "--set federation.rounds=N" in done.err
        assert "fedavg" in done.out and "report.html" in done.out
    after = {f: f.read_bytes() for f in finished.rglob("*") if f.is_file()}
    assert after == before


def test_a_finished_run_is_extended(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    resume(path, "--set", "federation.rounds=4")
    summary = json.loads((path / "summary.json").read_text())
    rounds = records(path)
    assert summary["rounds"] == 4 and [record["round"] for record in rounds] == [0, 1, 2, 3, 4]
    assert rounds[:3] == records(finished)
    # Adapter and report are of the whole run, and the schedule now spans four rounds.
    assert summary["best_round"] in range(5) and rounds[3]["lr"] == pytest.approx(4e-3)
    assert "is finished after 4 rounds" in call("simulate", "--resume", path).err


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_stopped_early_goes_on_with_more_patience(tmp_path: Path) -> None:
    path = tmp_path / "run"
    # A learning rate that moves nothing: no round is better than the first.
    still = settings(train__lr=1e-9, evaluate__patience=1)
    assert call("simulate", *still, "--out", path).status == 0
    done = call("simulate", "--resume", path)
    assert "stopped early after round 1" in done.err
    assert "--set evaluate.patience=N" in done.err
    resume(path, "--set", "evaluate.patience=3")
    summary = json.loads((path / "summary.json").read_text())
    assert (summary["rounds"], summary["stopped_early"], summary["best_round"]) == (3, True, 0)


@pytest.mark.parametrize(
    "setting", ["train.lr=0.1", "seed=1", "strategy.name=lora-fair", "train={lr=0.1}", "threads=2"]
)
def test_a_resume_that_would_rewrite_the_past_is_refused(setting: str, finished: Path) -> None:
    before = (finished / "config.toml").read_bytes()
    done = call("simulate", "--resume", finished, "--set", "federation.rounds=3", "--set", setting)
    assert done.status == 2
    key = "train.batch-size" if "{" in setting else setting.split("=")[0]  # the table lacks it
    assert done.err.startswith(f"Error: {key} cannot be changed by a resume\n")
    assert "federation.rounds" in done.err
    assert (finished / "config.toml").read_bytes() == before and (
        finished / "summary.json"
    ).exists()


@pytest.mark.usefixtures("undrawn")
def test_a_run_starts_from_an_adapter(finished: Path, tmp_path: Path) -> None:
    given = f"adapter.from={finished / 'adapter'}"
    done = call(
        "simulate", *settings(federation__rounds=1), "--set", given, "--out", tmp_path / "a"
    )
    assert done.status == 0, done.err
    start, before = (
        json.loads((path / "summary.json").read_text()) for path in (tmp_path / "a", finished)
    )
    assert start["initial"] == before["final"]


@pytest.mark.usefixtures("undrawn")
def test_one_run_is_not_run_twice_at_a_time(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    before = {f: f.read_bytes() for f in path.rglob("*") if f.is_file()}
    with RunDirectory.open(path).held():
        done = call("simulate", "--resume", path, "--set", "federation.rounds=3")
    assert done.status == 1 and "another process is at work" in done.err
    assert {f: f.read_bytes() for f in path.rglob("*") if f.is_file()} == before
    resume(path, "--set", "federation.rounds=3")
