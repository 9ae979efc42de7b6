"""The leak measure finds what is leaked on purpose, and nothing else."""

from __future__ import annotations

import importlib
import os
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CHILD = """
import os, subprocess, sys
kept = []
print("there", flush=True)
for line in sys.stdin:
    what = line.strip()
    if what == "open":
        kept += [open(os.devnull) for _ in range(10)]
    elif what == "connect":
        import socket
        kept += [socket.socket() for _ in range(10)]
    elif what == "grow":
        kept.append(bytearray(os.urandom(1)) * (32 * 2**20))
    elif what == "start":
        apart = dict(stdout=subprocess.DEVNULL, start_new_session=True)  # our pipe is not its own
        kept.append(subprocess.Popen(["sleep", "60"], **apart))
    elif what == "zombie":
        kept.append(subprocess.Popen(["true"]))
        os.waitid(os.P_PID, kept[-1].pid, os.WEXITED | os.WNOWAIT)
    print("done", flush=True)
"""


@pytest.fixture
def leaks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("leaks")


class Family:
    """A process that leaks when it is told to."""

    def __init__(self, leaks: ModuleType) -> None:
        self.mark = uuid.uuid4().hex
        self._leaks = leaks
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            env=os.environ | {leaks.MARK: self.mark},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._hear()

    def _hear(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline()

    def told(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        self._hear()

    def look(self, **counts: int) -> Any:
        return self._leaks.look(self.mark, [self.process.pid], counts)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        for pid in self._leaks.marked(self.mark):
            psutil.Process(pid).kill()


@pytest.fixture
def family(leaks: ModuleType) -> Iterator[Family]:
    made = Family(leaks)
    yield made
    made.end()


def test_nothing_has_leaked_where_nothing_was_done(leaks: ModuleType, family: Family) -> None:
    early = family.look()
    (only,) = early.processes
    assert (only.pid, early.zombies, early.orphans) == (family.process.pid, 0, [])
    assert only.descriptors["pipe"] >= 2 and 1.0 < only.anonymous <= only.proportional + 1.0
    assert leaks.leaks(early, family.look()) == []


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("open", "descriptors of sort file have become 10"),
        ("connect", "descriptors of sort socket have become 10"),
        ("grow", "MiB of memory of the largest have become"),
    ],
)
def test_what_one_process_leaks_is_found(
    leaks: ModuleType, family: Family, what: str, told: str
) -> None:
    early = family.look()
    family.told(what)
    (line,) = leaks.leaks(early, family.look())
    assert told in line


def test_memory_within_the_grant_is_none(leaks: ModuleType) -> None:
    had = leaks.Process(1, "trainer", 0.0, 400.0, 450.0, {"socket": 3}, 4)
    grant = 400.0 * leaks.MEMORY_SHARE + leaks.MEMORY_MIB
    early = leaks.Look([had])
    for more, found in ((grant - 0.1, 0), (grant + 0.1, 1)):
        late = leaks.Look([replace(had, anonymous=400.0 + more)])
        assert len(leaks.leaks(early, late)) == found


def test_memory_of_most_processes_is_judged_and_not_of_a_few(leaks: ModuleType) -> None:
    """Of five trainers one may have had no work yet, and three may not grow beside the largest."""

    def look(*sizes: float) -> Any:
        return leaks.Look(
            [leaks.Process(n, "trainer", 0.0, size, size, {}, 4) for n, size in enumerate(sizes)]
        )

    assert leaks.leaks(look(90, 400, 400, 400, 400), look(400, 400, 400, 400, 400)) == []
    (line,) = leaks.leaks(look(300, 300, 300, 300, 400), look(390, 390, 390, 390, 400))
    assert line == "trainer: 300 MiB of memory of the median have become 390"
    assert leaks.leaks(look(90, 90, 90, 400), look(400, 400, 400, 400)) == []  # too few to tell


def test_a_process_more_and_one_that_nobody_owns_are_found(
    leaks: ModuleType, family: Family
) -> None:
    early = family.look()
    family.told("start")
    more = family.look()
    assert len(more.processes) == 2 and more.orphans == []
    family.process.kill()
    family.process.wait()
    late = family.look()
    (pid,) = late.orphans
    assert psutil.Process(pid).name() == "sleep"
    assert f"process {pid} belongs to nobody" in leaks.leaks(early, late)
    one = leaks.Process(1, "SuperNode", 0.0, 90.0, 90.0, {}, 4)
    two = leaks.Look([one, replace(one, pid=2)])
    assert leaks.leaks(leaks.Look([one]), two) == ["SuperNode: 1 processes have become 2"]


def test_apps_that_have_not_ended_and_zombies_are_found(leaks: ModuleType, family: Family) -> None:
    early = family.look()
    family.told("zombie")
    late = family.look()
    assert (late.zombies, len(late.processes)) == (1, 1)
    assert leaks.leaks(early, late) == ["0 zombies have become 1"]
    executor = leaks.Process(1, leaks.EXECUTOR, 0.0, 90.0, 90.0, {}, 4)
    quiet = leaks.Look([executor])
    assert leaks.leaks(quiet, replace(quiet, zombies=1)) == []  # it waits with its next start
    assert leaks.leaks(quiet, replace(quiet, zombies=2)) == ["0 zombies have become 2"]
    left = leaks.Look([executor, replace(executor, kind="ClientApp")])
    assert leaks.leaks(quiet, left) == ["1 x ClientApp left"]


def test_rows_and_temporary_files_may_not_grow(leaks: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "superlink.db"
    with closing(sqlite3.connect(path)) as database:
        for name in ("message_ins", "objects", "run"):
            database.execute(f"create table {name} (x)")
            database.executemany(f"insert into {name} values (?)", [(k,) for k in range(3)])
        database.commit()
    assert leaks.rows(path, ("message_", "object")) == 6
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").write_bytes(bytes(2**20))
    assert leaks.on_disk(tmp_path, "below/*") == (1, 1.0)
    name = leaks.GROWING[0]
    early, late = leaks.Look([], counts={name: 3}), leaks.Look([], counts={name: 4})
    assert leaks.leaks(early, late) == [f"{name}: 3 have become 4"]
    assert leaks.leaks(late, early) == []


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("/venv/bin/python -m deploy.trainer /tmp/client.toml", "trainer"),
        ("/venv/bin/python -m fedgraft client --config c.toml", "client"),
        ("/venv/bin/python -m fedgraft submit --to server.toml", "submit"),
        ("/venv/bin/python /venv/bin/fedgraft server --config s.toml", "server"),
        ("/venv/bin/python /venv/bin/flwr-clientapp --token x", "ClientApp"),
        ("nginx: worker process", "gateway"),
        ("fedgraft-nursery    ", "nursery"),
        ("sleep 60", "sleep"),
    ],
)
def test_kinds(leaks: ModuleType, command: str, kind: str) -> None:
    words = [command] if command.startswith(("nginx", "fedgraft-")) else command.split()
    assert leaks.kind_of(words) == kind


def test_the_plan_is_the_seeds_and_leaves_no_fault_out(leaks: ModuleType) -> None:
    faults = importlib.import_module("soak_faults")
    for rounds in (4, 6, 20):
        made = faults.plan(rounds, seed=3)
        assert made == faults.plan(rounds, seed=3) != faults.plan(rounds, seed=4)
        assert {fault.kind for fault in made} == set(faults.FAULTS)
        assert {fault.round for fault in made} == set(range(1, rounds + 1))
    assert len(faults.plan(20, seed=3)) == sum(faults.FAULTS.values())
