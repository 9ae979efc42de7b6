"""One app, three ways to run it: in process, under Ray, and by Flower's own `flwr run`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from command_line import call, outcome, settings

from fedgraft.config import Config
from fedgraft.flower import flower_environment

ROOT = Path(__file__).parents[2]
FLWR = str(Path(sys.executable).with_name("flwr"))
TINY = {
    "federation__rounds": 2,
    "federation__clients": 2,
    "train__optimizer_state": "keep",
    "train__batch_size": 8,
}


def is_mine(process: psutil.Process, mark: str) -> bool:
    """Whether a process has this test's mark in its environment; children inherit it."""
    try:
        return process.environ().get("FEDGRAFT_TEST") == mark
    except psutil.Error:
        return False


def left_over(mark: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if is_mine(process, mark)]


@pytest.mark.slow
def test_ray_gives_the_same_adapter_and_leaves_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole run directory is the same, personal state included, and the home untouched.

    The user stands in a folder with modules of the same names as ours.
    """
    for name in ("server.py", "client.py", "strategies.py"):
        (tmp_path / name).write_text("raise SystemExit('the user's own')\n")
    monkeypatch.chdir(tmp_path)
    home, mark = tmp_path / "home", str(tmp_path)
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("FEDGRAFT_TEST", mark)
    done = call("simulate", *settings(**TINY), "--out", "ray", "--engine", "ray", "--json")
    assert done.status == 0, done.err
    assert left_over(mark) == []
    assert not (home / ".flwr").exists() and not (home / "fedgraft-runs").exists()
    assert json.loads(done.out)["rounds"] == 2

    assert call("simulate", *settings(**TINY), "--out", "here").status == 0
    ray, here = outcome(tmp_path / "ray"), outcome(tmp_path / "here")
    assert ray.keys() == here.keys() and "adapter/adapter_model.safetensors" in ray
    for name, content in here.items():
        assert ray[name] == content, name


@pytest.fixture
def flwr(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Call `flwr`; the SuperLink that it leaves running is ended afterwards."""
    mark = str(tmp_path)
    environment = flower_environment(tmp_path / "flwr") | {
        "HOME": str(tmp_path),
        "FEDGRAFT_TEST": mark,
    }

    def flwr(*arguments: str, cwd: Path) -> str:
        done = subprocess.run(
            [FLWR, *arguments],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    yield flwr
    processes = left_over(mark)
    for process in processes:
        process.terminate()
    for process in psutil.wait_procs(processes, timeout=20)[1]:
        process.kill()


def test_the_keys_of_a_checkout_are_a_config() -> None:
    """What `flwr run .` reads of pyproject.toml fits the two nodes that Flower simulates."""
    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    config = Config.from_run_config(app["config"])
    assert config.federation.clients == 2 and config.federation.rounds <= 5


EXAMPLE = """
[project]
name = "example"
version = "1.0.0"
description = "examples/flower_app.py as an app"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "me"

[tool.flwr.app.components]
serverapp = "flower_app:app"
clientapp = "flower_app:client"
"""


@pytest.mark.slow
def test_flwr_run_in_a_checkout_and_of_the_example(
    flwr: Callable[..., str], tmp_path: Path
) -> None:
    """Both by the command as the README has it: with Flower's installing of dependencies off.

    The second one finds the first one's SuperLink running.
    """
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "server", checkout / "server")  # code does not travel, whatever is there
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore", "Makefile"):
        shutil.copy(ROOT / name, checkout)
    keys = "federation.rounds=1 train.steps=1"
    said = flwr("run", ".", "local", "--stream", "--run-config", keys, cwd=checkout)
    (directory,) = (tmp_path / "fedgraft-runs").iterdir()
    assert f"FedGraft: this run is kept in {directory}" in said
    summary = json.loads((directory / "summary.json").read_text())
    assert (summary["rounds"], summary["clients"], summary["client_steps"]) == (1, 2, 2)
    assert f"FedGraft: test accuracy {100 * summary['final']:.1f}%" in said
    assert (directory / "adapter" / "adapter_model.safetensors").exists()

    example = tmp_path / "example"
    example.mkdir()
    shutil.copy(ROOT / "examples" / "flower_app.py", example)
    (example / "pyproject.toml").write_text(EXAMPLE)
    nodes = ("--federation-config", "num-supernodes=4")
    said = flwr("run", ".", "local", "--stream", *nodes, cwd=example)
    losses = [float(loss) for loss in re.findall(r"mean training loss ([0-9.]+)", said)]
    assert len(losses) == 5 and losses[-1] < losses[0]
