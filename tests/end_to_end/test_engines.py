"""One app, three ways to run it: in process, under Ray, and by Flower's own `flwr run`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from command_line import call, outcome, run, settings

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
def test_ray_gives_the_same_adapter_and_leaves_nothing_running(tmp_path: Path) -> None:
    """The whole run directory is the same, personal state included, and the home untouched."""
    home = tmp_path / "home"
    home.mkdir()
    mark = str(tmp_path)
    environment = os.environ | {"HOME": str(home), "FEDGRAFT_TEST": mark}
    arguments = ["simulate", *settings(**TINY), "--out"]
    done = run(*arguments, "ray", "--engine", "ray", "--json", cwd=tmp_path, env=environment)
    assert done.status == 0, done.err
    assert left_over(mark) == []
    assert not (home / ".flwr").exists() and not (home / "fedgraft-runs").exists()
    assert json.loads(done.out)["rounds"] == 2

    assert call(*arguments, tmp_path / "here").status == 0
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


def test_a_checkout_is_an_app_with_scalar_keys() -> None:
    """What `flwr run .` reads of pyproject.toml is a valid config, small, for as many nodes."""
    import tomllib

    from fedgraft.config import Config

    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    config = Config.from_run_config(app["config"])
    assert all(isinstance(value, str | int | float) for value in app["config"].values())
    assert config.federation.rounds <= 5 and config.task.name == "digits"


@pytest.mark.slow
def test_flwr_run_in_a_checkout_and_of_the_example(
    flwr: Callable[..., str], tmp_path: Path
) -> None:
    checkout, nodes = tmp_path / "checkout", "num-supernodes=2"
    checkout.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, checkout)
    shutil.copytree(ROOT / "server", checkout / "server")
    keys = '"federation.rounds"=1 "federation.clients"=2 "train.steps"=1'
    said = flwr(
        *("run", ".", "local", "--stream", "--federation-config", nodes),
        *("--run-config", keys.replace('"', "")),
        cwd=checkout,
    )
    runs = list((tmp_path / "fedgraft-runs").iterdir())
    assert len(runs) == 1 and f"FedGraft keeps this run in {runs[0]}" in said
    assert json.loads((runs[0] / "summary.json").read_text())["rounds"] == 1
    assert (runs[0] / "adapter" / "adapter_model.safetensors").exists()
