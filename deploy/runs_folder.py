"""Which Flower run works on which run directory: one small file a run in the server's state."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deploy.server_config import ServerConfig
from fedgraft.files import write_json

_KEPT = 1000


@dataclass(frozen=True)
class Submitted:
    """A Flower run that a submit started.

    Attributes:
        run_id: Flower's id.
        directory: the run directory, absolute.
        at: Unix time of the start.
    """

    run_id: int
    directory: Path
    at: float


class RunsFolder:
    """The notes that a server keeps of what was submitted to it."""

    def __init__(self, server: ServerConfig) -> None:
        self._folder = server.state / "runs"

    def note(self, run_id: int, directory: Path) -> None:
        """Note a new Flower run.

        Raises:
            RunError: the disk is full or refuses the write.
        """
        told = {"directory": str(directory.absolute()), "at": time.time()}
        write_json(self._folder / f"{run_id}.json", told)
        for old in self.all()[_KEPT:]:
            (self._folder / f"{old.run_id}.json").unlink(missing_ok=True)

    def all(self) -> list[Submitted]:
        """Return all notes, the newest first; a damaged one is passed over."""
        found = []
        for path in self._folder.glob("*.json"):
            with suppress(ValueError, KeyError, TypeError, OSError):
                told = json.loads(path.read_text())
                one = Submitted(int(path.stem), Path(told["directory"]), float(told["at"]))
                found.append(one)
        return sorted(found, key=lambda one: one.at, reverse=True)

    def run_of(self, directory: Path) -> int | None:
        """Return the newest Flower run of a run directory."""
        absolute = directory.absolute()
        return next((one.run_id for one in self.all() if one.directory == absolute), None)
