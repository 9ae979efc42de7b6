"""What a family of processes holds: processes, descriptors, memory, files; and what has grown.

Everything is read from /proc and from the folders, by nobody's help. A family is all processes
that carry a mark in their environment, and all that descend from those. Two looks at it, both at a
quiet moment, are compared by `leaks`.
"""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

MARK = "FEDGRAFT_TEST"
"""The environment variable that all processes of one family share; clients hand it on."""
KINDS = {
    "deploy.trainer": "trainer",
    "deploy.supernode": "SuperNode",
    "deploy.superexec": "SuperExec",
    "fedgraft-nursery": "nursery",
    "deploy.leash": "leash",
    "deploy.patient_superlink": "SuperLink",
    "flower-superexec": "SuperExec",
    "flwr-serverapp": "ServerApp",
    "flwr-clientapp": "ClientApp",
    "nginx": "gateway",
    "submit": "submit",
    "server": "server",
    "client": "client",
}
"""Words of a command line, the first that is found counting, and what such a process is called."""
PASSING = frozenset({"ServerApp", "ClientApp", "submit"})
"""Kinds that come and go with a run or a message: none of them may be left at a quiet moment."""
EXECUTOR = "SuperExec"
"""Flower's starter of apps, which waits for one that has ended when it starts the next."""
MEMORY_SHARE, MEMORY_MIB = 0.05, 8.0
"""Largest and median process of a kind may have grown by so much: a share of what it had, and MiB.

The sum may: of twenty trainers some have had no work before the first look, and hold no base yet.
"""
MANY = 5
"""From so many processes on, the median one is at work in both looks: some have just started."""
DESCRIPTORS = 4
"""So many more descriptors a process may have: connections that a client keeps open or not."""
GROWING = ("messages and objects", "temporary files")
"""Counts that may not grow at all."""


@dataclass(frozen=True)
class Process:
    """One process.

    Attributes:
        pid: its id.
        kind: one of `KINDS`' names, or the program's.
        born: Unix time of its start.
        anonymous: MiB of memory of its own that no file stands behind.
        proportional: MiB, what it shares with others counted in parts.
        descriptors: open ones by sort: "socket", "pipe", "file", "deleted file", "other".
        threads: how many.
    """

    pid: int
    kind: str
    born: float
    anonymous: float
    proportional: float
    descriptors: Mapping[str, int]
    threads: int


@dataclass(frozen=True)
class Look:
    """A family at one moment.

    Attributes:
        processes: those that live.
        zombies: how many have ended and are not waited for yet.
        orphans: ids of those that descend from none of the roots.
        counts: what else is counted, by name: files, rows.
        mebibytes: what lies on disk, by name.
    """

    processes: Sequence[Process]
    zombies: int = 0
    orphans: Sequence[int] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    mebibytes: Mapping[str, float] = field(default_factory=dict)

    def kinds(self) -> dict[str, list[Process]]:
        """Return the processes by kind."""
        found: dict[str, list[Process]] = {}
        for one in self.processes:
            found.setdefault(one.kind, []).append(one)
        return found

    @property
    def proportional(self) -> float:
        """MiB of all processes together."""
        return sum(one.proportional for one in self.processes)


def look(
    mark: str,
    roots: Iterable[int],
    counts: Mapping[str, int] | None = None,
    mebibytes: Mapping[str, float] | None = None,
) -> Look:
    """Look at a family now.

    Args:
        mark: the value of `MARK` in its processes' environment.
        roots: ids of the processes that started all others.
        counts, mebibytes: taken over.
    """
    alive, zombies = [], 0
    tied = set[int]()
    for pid in roots:
        with suppress(psutil.Error):
            root = psutil.Process(pid)
            tied |= {pid, *(one.pid for one in root.children(recursive=True))}
    whole = tied | marked(mark)
    for pid in sorted(whole):
        with suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                zombies += 1
            else:
                alive.append(measured(process))
    orphans = [one.pid for one in alive if one.pid not in tied]
    return Look(alive, zombies, orphans, counts or {}, mebibytes or {})


def marked(mark: str) -> set[int]:
    """Return the ids of all processes that carry a mark, and of what they started."""
    found = set[int]()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found |= {process.pid, *(one.pid for one in process.children(recursive=True))}
    return found


def measured(process: psutil.Process) -> Process:
    """Measure one process.

    Raises:
        OSError, psutil.Error: it has ended, or is another user's.
    """
    memory = dict.fromkeys(("Anonymous", "Pss"), 0.0)
    for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in memory:
            memory[name] = int(value.split()[0]) / 1024
    return Process(
        process.pid,
        kind_of(process.cmdline()),
        process.create_time(),
        memory["Anonymous"],
        memory["Pss"],
        descriptors(process.pid),
        process.num_threads(),
    )


def kind_of(command: Sequence[str]) -> str:
    """Return what a process with this command line is called."""
    said = [part.rstrip() for part in command[:8]]  # one that named itself pads what it had before
    words = [word for part in said for word in (part, Path(part.partition(":")[0]).name)]
    for word, kind in KINDS.items():
        if word in words:
            return kind
    return Path(command[0]).name if command else "?"


def descriptors(pid: int) -> dict[str, int]:
    """Count a process's open descriptors by sort."""
    found = Counter[str]()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            target = str(link.readlink())
            sort = "file" if target.startswith("/") else target.partition(":")[0]
            if sort == "file" and target.endswith(" (deleted)"):
                sort = "deleted file"
            found[sort if sort in ("socket", "pipe", "file", "deleted file") else "other"] += 1
    return dict(found)


def on_disk(folder: Path, pattern: str = "**/*") -> tuple[int, float]:
    """Return how many files a folder holds that a pattern matches, and their MiB."""
    files, size = 0, 0
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):
            if path.is_file():
                files += 1
                size += path.stat().st_size
    return files, size / 2**20


def rows(database: Path, prefixes: Sequence[str]) -> int:
    """Return how many rows the tables of an SQLite database hold whose names begin so."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        names = [
            name
            for (name,) in connection.execute("select name from sqlite_master where type = 'table'")
        ]
        chosen = [name for name in names if name.startswith(tuple(prefixes))]
        return sum(
            int(connection.execute(f'select count(*) from "{name}"').fetchone()[0])
            for name in chosen
        )


def leaks(early: Look, late: Look) -> list[str]:
    """Return what has grown from one quiet moment to another beyond what is granted, a line each.

    Judged are: processes by kind, those that nobody owns, those that should have ended;
    descriptors of the largest process of each kind; memory of the largest and, where there are
    `MANY`, of the median one; and the counts of `GROWING`.
    """
    found = [f"process {pid} belongs to nobody" for pid in late.orphans]
    before, after = early.kinds(), late.kinds()
    for kind, processes in after.items():
        there = before.get(kind, [])
        if kind in PASSING:
            found.append(f"{len(processes)} x {kind} left")
            continue
        if len(processes) > len(there):
            found.append(f"{kind}: {len(there)} processes have become {len(processes)}")
        if there:
            found += _grown(kind, there, processes)
    if late.zombies > max(early.zombies, len(after.get(EXECUTOR, []))):
        found.append(f"{early.zombies} zombies have become {late.zombies}")
    for name in GROWING:
        if late.counts.get(name, 0) > early.counts.get(name, 0):
            found.append(f"{name}: {early.counts.get(name, 0)} have become {late.counts[name]}")
    return found


def _grown(kind: str, there: Sequence[Process], processes: Sequence[Process]) -> list[str]:
    found = []
    for sort in ("socket", "pipe", "file", "deleted file", "other"):
        was = max(one.descriptors.get(sort, 0) for one in there)
        now = max(one.descriptors.get(sort, 0) for one in processes)
        if now > was + DESCRIPTORS:
            found.append(f"{kind}: {was} descriptors of sort {sort} have become {now}")
    for which, chosen in (("the largest", max), ("the median", median)):
        if which == "the median" and len(there) < MANY:
            continue
        had = chosen(one.anonymous for one in there)
        has = chosen(one.anonymous for one in processes)
        if has > had * (1.0 + MEMORY_SHARE) + MEMORY_MIB:
            found.append(f"{kind}: {had:.0f} MiB of memory of {which} have become {has:.0f}")
    return found
