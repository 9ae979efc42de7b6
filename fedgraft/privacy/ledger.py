"""The privacy ledger: every release about a set of data, in a file that is only ever appended to.

One JSON object a line. Each line ends with a hash over itself and the line before, and a small head
file beside the ledger (its name with `.head` added) holds how many lines there are and the last
hash; it is replaced after each append. So all of these are refused with a `LedgerError`, never read
as a shorter or an empty ledger: a changed, missing, doubled or moved line, a ledger cut anywhere,
at a line's end too, a ledger or a head that was deleted or replaced by another ledger's.

What is counted after a crash. An entry is recorded before the release that it stands for is
computed, and `record` returns when ledger and head are on the disk. A crash between the two leaves
the ledger one line longer than its head: that line counts, though nothing may have been released. A
crash within the append leaves part of a line beyond the head: `record` had not returned, nothing
was released, and the part is dropped with the next entry.

What cannot be noticed: ledger and head both deleted, or both put back to an older state of the two,
as restoring a backup does; and somebody who rewrites all hashes, which are checksums and no
signatures. Against these, keep the ledger where nothing else is restored or cleaned up.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgraft.errors import LedgerError, PrivacyError
from fedgraft.files import disk_errors, write_json
from fedgraft.privacy.events import Release

if TYPE_CHECKING:
    from fedgraft.privacy.accounting import Accountant

_VERSION = 1
_START = hashlib.sha256(f"fedgraft privacy ledger {_VERSION}".encode()).hexdigest()
_SEAL = b', "hash": "'
_SEALED = len(_SEAL) + 64 + len(b'"}')


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Entry:
    """One recorded release.

    Attributes:
        fingerprint: of the data that it is about; epsilon composes over all entries of one.
        run: the run's lineage, which a resume keeps.
        round: the run's round.
        mode: `privacy.mode` of the run: example, client or local.
        unit: whom it protects: "example" or "client".
        relation: between neighbouring data, "add-or-remove-one" or "replace-one". A release under
            replace-one is recorded with its doubled sensitivity, that is, half the multiplier, and
            so composes with the others.
        release: what was answered, and how noisily.
        delta: the run's `privacy.delta`.
        when: ISO 8601, UTC.
        purpose: what it was released for.
    """

    fingerprint: str
    run: str
    round: int
    mode: str
    unit: str
    relation: str
    release: Release
    delta: float
    when: str = field(default_factory=_now)
    purpose: str = "training"

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as it stands in the file."""
        return {
            "when": self.when,
            "fingerprint": self.fingerprint,
            "run": self.run,
            "round": self.round,
            "mode": self.mode,
            "unit": self.unit,
            "relation": self.relation,
            "purpose": self.purpose,
            "noise_multipliers": list(self.release.noise_multipliers),
            "sampling_rate": self.release.sampling_rate,
            "count": self.release.count,
            "delta": self.delta,
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Entry:
        """Return the entry that `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError, PrivacyError: it gave something else.
        """
        words = {
            name: str(found[name])
            for name in ("fingerprint", "run", "mode", "unit", "relation", "when", "purpose")
        }
        noise = tuple(float(sigma) for sigma in found["noise_multipliers"])
        release = Release(noise, float(found["sampling_rate"]), int(found["count"]))
        return cls(round=int(found["round"]), delta=float(found["delta"]), release=release, **words)


class Ledger:
    """A ledger's file and the head beside it.

    Another process may record into the same file: each record holds an exclusive lock. The whole
    file is read and checked whenever something is asked, so damage done meanwhile is noticed, too,
    and so are a ledger and a head that were both put back to an older state than was seen here.

    Args:
        path: the ledger; where there is none, the first entry creates it and its folder.

    Raises:
        LedgerError: it is damaged, cut short, or missing while its head is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.head = head_of(path)
        self._seen = (0, _START)  # the newest head
        self._read()

    @property
    def entries(self) -> list[Entry]:
        """All entries, in the order in which they were recorded.

        Raises:
            LedgerError: the ledger was damaged, cut or replaced since it was opened.
        """
        return self._read().entries

    def releases(self, fingerprint: str) -> list[Release]:
        """Return all releases about the data of one fingerprint; raises as `entries` does."""
        return [entry.release for entry in self.entries if entry.fingerprint == fingerprint]

    def epsilon(self, fingerprint: str, delta: float, accountant: Accountant = "rdp") -> float:
        """Return what all releases about the data of one fingerprint cost together.

        Raises:
            LedgerError: as `entries`.
            PrivacyError: delta is not within (0, 1).
        """
        from fedgraft.privacy.accounting import epsilon  # brings scipy's slow import with it

        return epsilon(self.releases(fingerprint), delta, accountant)

    def record(self, entry: Entry) -> None:
        """Append an entry; when this returns it is on the disk, and a release may follow.

        Where this raises, the entry is either whole in the ledger and counts, or not there at all.

        Raises:
            DiskFullError: there is no space left.
            RunError: the file could not be written.
            LedgerError: the ledger is damaged, cut short, or missing while its head is there.
        """
        self._read()  # a ledger that was deleted must not be created anew
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists() and not self.head.exists():
                # First a head that says "empty": a ledger without one has always lost it.
                _write_head(self.head, 0, _START)
            file = self.path.open("ab")
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._append(file.fileno(), entry)

    def _append(self, descriptor: int, entry: Entry) -> None:
        found = self._read()
        count = len(found.entries) + 1
        line, hash_ = _sealed({"number": count} | entry.to_dict(), found.hashes[-1])
        try:
            with disk_errors(self.path):
                os.ftruncate(descriptor, found.size)  # without the part that a crash left
                while line:
                    line = line[os.write(descriptor, line) :]
                os.fsync(descriptor)
            _write_head(self.head, count, hash_)
        except BaseException:
            if _read_head(self.head)[0] < count:
                with suppress(OSError):  # what cannot be taken back is there, and counts
                    os.ftruncate(descriptor, found.size)
                    os.fsync(descriptor)
            raise
        self._seen = (count, hash_)

    def _read(self) -> _Lines:
        """Read and check ledger and head."""
        try:
            # The head first: the ledger grows before it does, so is never the shorter one.
            head = _read_head(self.head) if self.head.exists() else None
            content = self.path.read_bytes() if self.path.exists() else None
        except OSError as error:
            raise LedgerError(
                f"privacy ledger {self.path} cannot be read: {error.strerror or error}",
                "Name a ledger's file, and one that may be read.",
            ) from error
        if head is None and (content is not None or self._seen[0]):
            raise self._refused(f"has lost its head file {self.head.name}")
        if content is None and head is not None and head[0]:
            raise self._refused("is missing, but its head file is there")
        *whole, part = (content or b"").split(b"\n")
        found = _Lines([], [_START], len(content or b"") - len(part))
        for line in whole:
            self._check(line, found)
        for count, hash_ in (head or self._seen, self._seen):
            if count > len(found.entries):
                has = f"{len(found.entries)} entries" + (" and part of one" if part else "")
                raise self._refused(f"is cut short: it has {has} and there were {count}")
            if found.hashes[count] != hash_:
                raise self._refused(f"is not the one of its head file: entry {count} differs")
        self._seen = max(self._seen, head or self._seen, key=lambda seen: seen[0])
        return found

    def _check(self, line: bytes, found: _Lines) -> None:
        """Add a line to those found."""
        number = len(found.entries) + 1
        body, seal = line[:-_SEALED], line[-_SEALED:]
        hash_ = _hash(body, found.hashes[-1])
        if seal != _SEAL + hash_.encode() + b'"}':
            raise self._refused(f"is damaged in line {number}, or a line before it is missing")
        try:
            entry = Entry.from_dict(json.loads(line))
        except (ValueError, KeyError, TypeError, PrivacyError) as error:
            raise self._refused(f"has a line {number} that is no entry: {error}") from error
        found.entries.append(entry)
        found.hashes.append(hash_)

    def _refused(self, reason: str) -> LedgerError:
        return LedgerError(
            f"privacy ledger {self.path} {reason}",
            "Do not train on these data: what was spent is not known. Restore the newest copy of "
            f"the ledger, together with {self.head.name}.",
        )


@dataclass(frozen=True)
class _Lines:
    """What a ledger's file holds: entries, the hash after so many of them, and their bytes."""

    entries: list[Entry]
    hashes: list[str]
    size: int


def head_of(path: Path) -> Path:
    """Return the head file that belongs to a ledger."""
    return path.with_name(f"{path.name}.head")


def _hash(body: bytes, before: str) -> str:
    return hashlib.sha256(before.encode() + body).hexdigest()


def _sealed(content: Mapping[str, Any], before: str) -> tuple[bytes, str]:
    """Return a line, its end included, and its hash over all before the hash itself."""
    body = json.dumps(content, allow_nan=False).encode()[:-1]
    hash_ = _hash(body, before)
    return body + _SEAL + hash_.encode() + b'"}\n', hash_


def _write_head(path: Path, count: int, hash_: str) -> None:
    write_json(path, {"version": _VERSION, "entries": count, "hash": hash_})


def _read_head(path: Path) -> tuple[int, str]:
    try:
        found = json.loads(path.read_bytes())
        version, count, hash_ = found["version"], found["entries"], found["hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged_head(path) from error
    if version != _VERSION:
        raise LedgerError(
            f"{path} is of version {version!r} and this FedGraft reads version {_VERSION}",
            "Update FedGraft.",
        )
    if not isinstance(count, int) or count < 0 or not isinstance(hash_, str):
        raise _damaged_head(path)
    return count, hash_


def _damaged_head(path: Path) -> LedgerError:
    return LedgerError(
        f"{path}, the head of a privacy ledger, is damaged",
        "Do not train on these data: what was spent is not known. Restore the newest copy of "
        "the ledger and its head.",
    )
