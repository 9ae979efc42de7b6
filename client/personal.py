"""Personal state: what a client keeps between rounds and nobody else ever sees.

It is keyed by the run's lineage (an id that a resume keeps), the client and the round after which
it was saved. A request names the round it belongs to, so a round that is run again after a crash
starts from the state it started from the first time. It also names the last round whose update the
server used: what was kept of an update that was refused or lost counts as little as the update.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from fedgraft.adapter import Tensors
from fedgraft.files import read_tensors, write_tensors

_VERSION = re.compile(r"round-(\d+)\.safetensors")


@dataclass(frozen=True)
class PersonalStore:
    """Versions of one client's personal state in one lineage.

    Attributes:
        folder: where this client keeps personal state of all runs.
        lineage: the run's id.
        client: the client's name.
    """

    folder: Path
    lineage: str
    client: str

    @property
    def _home(self) -> Path:
        # Names come from outside; a digest is a safe file name, whatever they hold.
        name = hashlib.sha256(f"{self.lineage}\x1f{self.client}".encode()).hexdigest()[:24]
        return self.folder / name

    def _versions(self) -> dict[int, Path]:
        found = {}
        for path in self._home.glob("round-*.safetensors"):
            if match := _VERSION.fullmatch(path.name):
                found[int(match[1])] = path
        return found

    def load(self, before: int, counted: int = -1) -> Tensors | None:
        """Return the newest state saved before a round; None when there is none.

        Args:
            before: the round; a version of it or of a later one is of a run that was cut off.
            counted: the last round whose update the server used; versions between it and `before`
                are void and removed. -1 where the server does not say.

        Raises:
            RunError: the file is damaged.
        """
        versions = self._versions()
        earlier = [round for round in versions if round < before]
        if counted >= 0:
            for void in (round for round in earlier if round > counted):
                versions[void].unlink(missing_ok=True)
            earlier = [round for round in earlier if round <= counted]
        if not earlier:
            return None
        return read_tensors(versions[max(earlier)])[0]

    def save(self, tensors: Tensors, round: int, durable_round: int) -> None:
        """Save the state after a round, and drop versions that no resume can ask for.

        Args:
            tensors: the state by name.
            round: the round it was made in.
            durable_round: the oldest round that the server may resume from. The newest version
                up to it stays, and every later one; with a checkpoint each round that is two.

        Raises:
            RunError: the disk is full.
        """
        write_tensors(self._home / f"round-{round:06d}.safetensors", tensors)
        versions = self._versions()
        needed_from = max((r for r in versions if r <= durable_round), default=0)
        for version, path in versions.items():
            if version < needed_from:
                path.unlink(missing_ok=True)
