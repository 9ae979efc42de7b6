"""The ledger forgets nothing, and takes no damage for less than was spent."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedgraft.errors import DiskFullError, LedgerError, RunError
from fedgraft.privacy import ledger as module
from fedgraft.privacy.accounting import epsilon
from fedgraft.privacy.events import Release
from fedgraft.privacy.ledger import Entry, Ledger, head_of


def entry(round: int = 1, fingerprint: str = "f1", **changes: Any) -> Entry:
    release = Release((1.1, 2.5), 0.01, 40)
    base = Entry(
        fingerprint, "run-a", round, "example", "example", "add-or-remove-one", release, 1e-5
    )
    return replace(base, **changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of five entries about two sets of data."""
    path = tmp_path / "ledgers" / "north.jsonl"
    ledger = Ledger(path)
    for round in range(1, 6):
        ledger.record(entry(round, "f1" if round < 5 else "f2"))
    return path


def test_what_was_recorded_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    entries = [
        entry(1),
        entry(2, run='ran "ü"\nagain', release=Release((1 / 3,), 1.0), purpose="clip"),
        entry(3, "f2", mode="local", unit="client", relation="replace-one", delta=1e-7),
    ]
    for recorded in entries:
        Ledger(path).record(recorded)
    assert Ledger(path).entries == entries
    lines = path.read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == [1, 2, 3]
    assert json.loads(lines[1])["noise_multipliers"] == [1 / 3]
    assert entries[0].when.endswith("+00:00")


def test_there_is_no_ledger_before_the_first_entry(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "new" / "l.jsonl")
    assert ledger.entries == [] and ledger.releases("f1") == []
    assert ledger.epsilon("f1", 1e-5) == 0.0
    assert list(tmp_path.iterdir()) == []


def test_epsilon_composes_over_all_runs_of_the_same_data_alone(path: Path) -> None:
    ledger = Ledger(path)
    ledger.record(entry(1, "f1", run="run-b", release=Release((4.0,), 0.2, 3)))
    spent = [Release((1.1, 2.5), 0.01, 40)] * 4 + [Release((4.0,), 0.2, 3)]
    assert ledger.releases("f1") == spent
    assert ledger.releases("nobody") == []
    assert ledger.epsilon("f1", 1e-5) == epsilon(spent, 1e-5)
    assert ledger.epsilon("f2", 1e-6) == epsilon(spent[:1], 1e-6)


def test_a_round_recorded_twice_counts_twice(path: Path) -> None:
    before = Ledger(path).epsilon("f1", 1e-5)
    Ledger(path).record(entry(4))
    assert Ledger(path).epsilon("f1", 1e-5) > before


# Damage


def test_every_single_changed_bit_is_noticed(path: Path) -> None:
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        for bit in (0, 5):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(LedgerError):
                Ledger(path)
    path.write_bytes(content)
    assert len(Ledger(path).entries) == 5


def test_every_cut_is_noticed(path: Path) -> None:
    content = path.read_bytes()
    ends = {0, *(size for size, byte in enumerate(content) if byte == ord("\n"))}
    for size in sorted({near for end in ends for near in (end - 1, end, end + 1)} - {-1}):
        if size == len(content):
            continue
        path.write_bytes(content[:size])
        with pytest.raises(LedgerError, match=r"cut short|damaged"):
            Ledger(path)


def lines_changed(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))

    return damage


def other_ledger(path: Path) -> None:
    """As many entries, about the same data, and a head of its own that is left behind."""
    other = Ledger(path.with_name("other.jsonl"))
    for round in range(1, 6):
        other.record(entry(round, run="run-z"))
    shutil.copy(other.path, path)


def other_head(path: Path) -> None:
    other_ledger(path.with_name("third.jsonl"))
    shutil.copy(head_of(path.with_name("other.jsonl")), head_of(path))


def head_changed(old: str, new: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        head = head_of(path)
        assert old in head.read_text()
        head.write_text(head.read_text().replace(old, new))

    return damage


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut at a line's end": lines_changed(lambda lines: lines[:-1]),
    "cut to nothing": lines_changed(lambda _: []),
    "first line missing": lines_changed(lambda lines: lines[1:]),
    "a line missing": lines_changed(lambda lines: lines[:2] + lines[3:]),
    "lines swapped": lines_changed(lambda lines: [lines[1], lines[0], *lines[2:]]),
    "last lines swapped": lines_changed(lambda lines: [*lines[:3], lines[4], lines[3]]),
    "a line doubled": lines_changed(lambda lines: [*lines, lines[-1]]),
    "an empty line": lines_changed(lambda lines: [*lines, b"\n"]),
    "a line by hand": lines_changed(lambda lines: [*lines, b'{"epsilon": 0}\n']),
    "other line ends": lines_changed(lambda lines: [line[:-1] + b"\r\n" for line in lines]),
    "deleted": lambda path: path.unlink(),
    "head deleted": lambda path: head_of(path).unlink(),
    "head emptied": lambda path: os.truncate(head_of(path), 0),
    "head no object": head_changed("{", "["),
    "head of words": head_changed('"entries": 5', '"entries": "5"'),
    "head below nothing": head_changed('"entries": 5', '"entries": -1'),
    "head counts more": head_changed('"entries": 5', '"entries": 6'),
    "head counts less than its hash": head_changed('"entries": 5', '"entries": 4'),
    "head of a newer version": head_changed('"version": 1', '"version": 2'),
    "an entry that counts less": lines_changed(
        lambda lines: [line.replace(b'"count": 40', b'"count": 10') for line in lines]
    ),
    "another ledger": other_ledger,
    "another ledger's head": other_head,
    "a folder": a_folder,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_refused_by_all_and_nothing_is_recorded(
    damage: Callable[[Path], None], path: Path
) -> None:
    opened = Ledger(path)
    damage(path)
    left = path.read_bytes() if path.is_file() else None
    with pytest.raises(LedgerError) as refused:
        Ledger(path)
    assert str(path) in refused.value.message and refused.value.remedy != ""
    for ask in (lambda: opened.entries, lambda: opened.record(entry(6))):
        with pytest.raises(LedgerError):
            ask()
    assert (path.read_bytes() if path.is_file() else None) == left


def test_what_cannot_be_noticed(path: Path) -> None:
    """Ledger and head put back together to what they were, or deleted together.

    By a process that saw more it is.
    """
    backup = path.with_name("backup")
    shutil.copytree(path.parent, backup, ignore=shutil.ignore_patterns("backup"))
    opened = Ledger(path)
    opened.record(entry(6))
    for file in backup.iterdir():
        shutil.copy(file, path.parent)
    assert len(Ledger(path).entries) == 5
    with pytest.raises(LedgerError, match="5 entries and there were 6"):
        opened.record(entry(7))
    path.unlink()
    head_of(path).unlink()
    assert Ledger(path).entries == []
    with pytest.raises(LedgerError, match="lost its head"):
        opened.record(entry(7))
    assert not path.exists()


def test_the_ledger_alone_put_back_is_noticed_and_the_head_alone_costs_nothing(path: Path) -> None:
    older, head = path.read_bytes(), head_of(path).read_bytes()
    Ledger(path).record(entry(6))
    newer = path.read_bytes()
    path.write_bytes(older)
    with pytest.raises(LedgerError, match="5 entries and there were 6"):
        Ledger(path)
    path.write_bytes(newer)
    head_of(path).write_bytes(head)
    assert len(Ledger(path).entries) == 6


# Crashes


def test_killed_between_ledger_and_head_the_entry_counts(path: Path) -> None:
    head = head_of(path).read_bytes()
    Ledger(path).record(entry(6))
    head_of(path).write_bytes(head)  # as a kill before its replacement leaves it
    ledger = Ledger(path)
    assert [found.round for found in ledger.entries] == [1, 2, 3, 4, 5, 6]
    ledger.record(entry(7))
    assert [found.round for found in Ledger(path).entries] == [1, 2, 3, 4, 5, 6, 7]
    assert json.loads(head_of(path).read_text())["entries"] == 7


@pytest.mark.parametrize("kept", [1, 100, -1])
def test_killed_within_the_append_the_part_is_dropped(kept: int, path: Path) -> None:
    before, head = path.read_bytes(), head_of(path).read_bytes()
    Ledger(path).record(entry(6))
    line = path.read_bytes()[len(before) :]
    path.write_bytes(before + line[:kept])
    head_of(path).write_bytes(head)
    ledger = Ledger(path)
    assert len(ledger.entries) == 5
    ledger.record(entry(7))
    assert [found.round for found in Ledger(path).entries] == [1, 2, 3, 4, 5, 7]
    assert path.read_bytes().startswith(before + b'{"number": 6')


def record_for_ever(path: Path, told: int) -> None:
    ledger = Ledger(path)
    while True:
        ledger.record(entry(9, run="killed"))
        os.write(told, b".")


def test_killed_at_any_moment_nothing_that_was_promised_is_lost(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    read, write = os.pipe()
    promised = 0
    for _ in range(6):
        worker = context.Process(target=record_for_ever, args=(path, write))
        worker.start()
        promised += len(os.read(read, 3))
        worker.kill()
        worker.join()
    os.set_blocking(read, False)
    with suppress(BlockingIOError):
        promised += len(os.read(read, 1 << 16))
    os.close(read)
    os.close(write)
    found = len(Ledger(path).entries) - 5
    assert promised <= found <= promised + 6 and promised >= 6


def test_killed_before_the_first_entry(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    Ledger(path).record(entry(1))
    first = path.read_bytes()
    module._write_head(head_of(path), 0, module._START)
    for content, count in [(first, 1), (first[:50], 0), (b"", 0)]:
        path.write_bytes(content)
        assert len(Ledger(path).entries) == count
    path.unlink()
    assert Ledger(path).entries == []
    Ledger(path).record(entry(2))
    assert [found.round for found in Ledger(path).entries] == [2]


def failing(error: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(error, os.strerror(error))

    return fail


def half_written(real: Callable[[int, bytes], int]) -> Callable[[int, bytes], int]:
    """The disk takes 30 bytes and then no more, as one that fills up does."""
    calls = []

    def write(descriptor: int, content: bytes) -> int:
        calls.append(content)
        if len(calls) == 1:
            return real(descriptor, content[:30])
        raise OSError(errno.ENOSPC, "No space left on device")

    return write


@pytest.mark.parametrize("where", ["write", "half", "fsync", "head"])
def test_a_full_disk_records_nothing_and_says_so(
    where: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(path)
    before, head = path.read_bytes(), head_of(path).read_bytes()
    with monkeypatch.context() as patch:
        if where == "head":
            patch.setattr("fedgraft.files.Path.replace", failing(errno.ENOSPC))
        elif where == "half":
            patch.setattr(os, "write", half_written(os.write))
        else:
            patch.setattr(os, where, failing(errno.ENOSPC))
        with pytest.raises(DiskFullError, match="disk is full"):
            ledger.record(entry(6))
    assert (path.read_bytes(), head_of(path).read_bytes()) == (before, head)
    ledger.record(entry(7))
    assert [found.round for found in Ledger(path).entries] == [1, 2, 3, 4, 5, 7]
    assert list(path.parent.glob(".*.tmp")) == []


def test_where_the_head_is_replaced_before_the_error_the_entry_counts(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(path)
    with monkeypatch.context() as patch:
        patch.setattr("fedgraft.files._sync_folder", failing(errno.EIO))
        with pytest.raises(RunError):
            ledger.record(entry(6))
    assert len(ledger.entries) == len(Ledger(path).entries) == 6


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(path: Path) -> None:
    path.parent.chmod(0o500)
    try:
        with pytest.raises(RunError, match=str(path.parent)):
            Ledger(path).record(entry(6))
    finally:
        path.parent.chmod(0o700)


# Two at once


def record_many(path: Path, run: str) -> None:
    ledger = Ledger(path)
    for round in range(20):
        ledger.record(entry(round, run=run))


def test_two_processes_record_into_one_ledger(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=record_many, args=(path, run)) for run in ("b", "c")]
    for worker in workers:
        worker.start()
    reader = Ledger(path)
    seen = [len(reader.entries)]
    while any(worker.is_alive() for worker in workers):
        seen.append(len(reader.entries))
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert seen == sorted(seen)
    entries = Ledger(path).entries
    assert reader.entries == entries and len(entries) == 45
    for run in ("b", "c"):
        assert [found.round for found in entries if found.run == run] == list(range(20))


def test_an_open_ledger_sees_what_another_records(path: Path) -> None:
    first, second = Ledger(path), Ledger(path)
    second.record(entry(6))
    assert first.epsilon("f1", 1e-5) == second.epsilon("f1", 1e-5)
    first.record(entry(7))
    assert [found.round for found in second.entries] == [1, 2, 3, 4, 5, 6, 7]
