"""What a run says while it runs: one JSON line an event in progress.jsonl.

The run writes, the screen follows the file, and neither knows the other, so the screen is the same
whether the run is in this process, in a worker of a comparison or in one of Flower's processes.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedgraft.errors import ConfigError, FedGraftError, RunError

START, SAMPLED, REPLY, ROUND, HANDED_OUT, FINISHED, FAILED = (
    "start",
    "sampled",
    "reply",
    "round",
    "handed-out",
    "finished",
    "failed",
)


class ProgressWriter:
    """Append events to a run's progress file.

    Raises:
        RunError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        from fedgraft.files import disk_errors  # with torch, which the screen does without

        with disk_errors(path):
            self._file = path.open("ab", buffering=0)  # what fails is not tried again on closing

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; a full disk must not end a run for the screen's sake."""
        with suppress(OSError):
            self._file.write(json.dumps({"event": event, **fields}).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ProgressReader:
    """Follow a progress file that another process may still be writing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    @classmethod
    def of_session(cls, path: Path) -> ProgressReader:
        """Return a reader that begins with the last start of the run."""
        reader = cls(path)
        if path.exists():
            mark = json.dumps({"event": START})[:-1].encode()
            reader._offset = max(0, path.read_bytes().rfind(mark))
        return reader

    def events(self) -> list[dict[str, Any]]:
        """Return the events since the last call; a line not yet whole waits for the next.

        What a crash or a full disk has cut is passed over.
        """
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole, newline, _ = text.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        events = []
        for line in whole.splitlines():
            with suppress(ValueError):
                events.append(json.loads(line))
        return events


def failure(event: dict[str, Any]) -> FedGraftError:
    """Return the error that a `failed` event of another process tells of."""
    kind = ConfigError if event["status"] == ConfigError.exit_status else RunError
    return kind(event["message"], event["remedy"])
