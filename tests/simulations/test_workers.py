"""Worker processes end with their parent, whatever ends it, and never run its script."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import wait
from pathlib import Path

import psutil
import pytest

from fedgraft.errors import RunError
from simulations.workers import at_work


def test_items_are_worked_on_and_results_belong_to_them() -> None:
    with at_work(2, abs, [-3, 4]) as futures:
        wait(futures)
        assert {item: future.result() for future, item in futures.items()} == {-3: 3, 4: 4}


def test_an_error_ends_the_workers_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(KeyError), at_work(1, time.sleep, [600]):
        raise KeyError
    assert time.monotonic() - began < 60
    assert multiprocessing_children() == []


def test_a_worker_that_dies_is_an_error_with_a_remedy() -> None:
    with (
        pytest.raises(RunError, match="a worker process died") as caught,
        at_work(1, os._exit, [1]) as futures,
    ):
        next(iter(futures)).result()
    assert caught.value.remedy


def multiprocessing_children() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if any("spawn_main" in word for word in child.cmdline())
    ]


def test_a_script_without_a_guard_is_run_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "print('ran', flush=True)\n"
        "from simulations.workers import at_work\n"
        "with at_work(2, abs, [-1, -2]) as futures:\n"
        "    print(sorted(future.result() for future in futures))\n"
    )
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n[1, 2]\n", "")


SCRIPT = """
import time
print("ran", flush=True)
from simulations.workers import at_work
with at_work(2, time.sleep, [600, 600]) as futures:
    print("started", flush=True)
    next(iter(futures)).result()
"""


@pytest.fixture
def script(tmp_path: Path) -> subprocess.Popen[str]:
    """A parent with two workers that have started."""
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ran\n", "started\n"]
    return process


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    parent, end = psutil.Process(process.pid), time.monotonic() + 60
    while time.monotonic() < end:
        children = [c for c in parent.children() if "spawn_main" in " ".join(c.cmdline())]
        if len(children) == 2:
            return children
        time.sleep(0.05)
    raise AssertionError("no workers")


def test_workers_are_gone_when_their_parent_is_killed(script: subprocess.Popen[str]) -> None:
    workers = workers_of(script)
    script.kill()
    script.communicate()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []


def test_ctrl_c_is_the_parents_business(script: subprocess.Popen[str]) -> None:
    """A terminal sends it to all processes; one traceback, the parent's, is all there is."""
    workers = workers_of(script)
    os.killpg(script.pid, signal.SIGINT)
    out, err = script.communicate(timeout=60)
    assert out == "" and err.count("Traceback") == err.count("KeyboardInterrupt") == 1
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []
