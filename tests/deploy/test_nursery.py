"""ClientApps at the ready, and the SuperExec that takes them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor import subprocess_executor
from waiting import alive, until

from deploy import superexec
from deploy.kept_superexec import WORK

SCRIPT = """
import json, os, signal, sys, time
import psutil
from deploy import nursery
from flwr.supercore.inflatable import inflatable_utils

folder = sys.argv[1]

def app():
    named = psutil.Process().cmdline()[0].strip()
    waits = inflatable_utils.pull_objects.__kwdefaults__["initial_backoff"]
    seen = {"argv": sys.argv, "named": named, "parent": os.getppid(), "waits": waits}
    with open(f"{folder}/{os.getpid()}.part", "w") as file:
        json.dump(seen, file)
    os.rename(f"{folder}/{os.getpid()}.part", f"{folder}/{os.getpid()}.json")
    sys.exit(3)

nursery.flwr_clientapp = app
kept = nursery.Nursery()
assert len(os.listdir(f"/proc/{kept.pid}/task")) == 1, "a fork takes one thread along"
born = [kept.bear(["--token", str(k)]) for k in range(2)]
end = time.monotonic() + 30
while sum(f.endswith(".json") for f in os.listdir(folder)) < 2:
    assert time.monotonic() < end
    time.sleep(0.01)
os.kill(kept.pid, signal.SIGKILL)
os.waitpid(kept.pid, 0)
born.append(kept.bear([]))
second = nursery.Nursery()
heavy = [name for name in ("torch", "transformers") if name in sys.modules]
print(json.dumps({"nursery": kept.pid, "born": born, "second": second.pid, "heavy": heavy}))
"""


def test_a_nursery_forks_a_clientapp_for_every_request_and_ends_with_its_parent(
    tmp_path: Path,
) -> None:
    """In a process of its own, since this one has threads."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["born"] == [True, True, False], "one that is gone says so"
    assert said["heavy"] == []
    seen = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert sorted(one["argv"] for one in seen) == [
        ["flwr-clientapp", "--token", str(k)] for k in range(2)
    ]
    assert {one["named"] for one in seen} == {"flwr-clientapp"}, "without its token"
    assert {one["parent"] for one in seen} == {said["nursery"]}
    assert {one["waits"] for one in seen} == {0.05}
    until(lambda: not alive(said["second"]), 30.0, "the end of the second nursery")


class Noted:
    """A nursery that notes what it is asked for."""

    def __init__(self, there: bool) -> None:
        self.there = there
        self.asked: list[list[str]] = []

    def bear(self, words: list[str]) -> bool:
        self.asked.append(words)
        return self.there


@pytest.mark.parametrize("there", [True, False])
def test_the_superexec_takes_clientapps_from_the_nursery_and_starts_all_else(
    monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    monkeypatch.setattr(subprocess_executor, "subprocess", subprocess_executor.subprocess)
    started: list[list[str]] = []
    monkeypatch.setattr(superexec.subprocess, "Popen", lambda words, **_: started.append(words))
    nursery: Any = Noted(there)
    superexec.take_from(nursery)
    apps = [["flwr-clientapp", "--token", "x"], ["flwr-serverapp", "--token", "y"]]
    for words in apps:
        subprocess_executor.subprocess.Popen(words)
    assert nursery.asked == [["--token", "x"]]
    assert started == (apps[1:] if there else apps)
    text = Path(subprocess_executor.__file__).read_text()
    assert set(re.findall(r"\bsubprocess\.(\w+)", text)) == {"Popen", "DEVNULL"}


def test_the_superexec_pauses_until_it_is_told_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loop takes nothing of `time` but the sleep that is replaced."""
    monkeypatch.setattr(run_superexec, "time", run_superexec.time)
    handler, descriptor = signal.getsignal(WORK), signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_BLOCK, {WORK})  # as it is inherited
    signal.pthread_kill(threading.get_ident(), WORK)  # early; other threads would die of it
    try:
        superexec.wait_for_work()
        run_superexec.time.sleep(3600.0)
        os.kill(os.getpid(), WORK)
        run_superexec.time.sleep(3600.0)
        run_superexec.time.sleep(0.001)  # untold, as long as it is asked to
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(WORK, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {WORK})
    text = Path(run_superexec.__file__).read_text()
    assert re.findall(r"\btime\.(\w+)\(", text) == ["sleep"]
