"""What server.toml and client.toml share: how they are read, and where a state folder has what."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, ValidationError

from deploy.lock import open_strange
from fedgraft.config import Group, known_keys
from fedgraft.config_errors import config_error
from fedgraft.errors import ConfigError
from fedgraft.settings import read_toml, unflatten

DEFAULT_GATEWAY = "127.0.0.1:9443"
"""Where the example server listens, and the example client looks for it."""
TRAINER, NODE = "trainer", "supernode"
"""The two parts of a client."""
_MOST_TOLD = 1 << 16
"""Characters that a supervisor may have to say of its parts."""
FilePath = Annotated[Path, Field(strict=False)]


@dataclass(frozen=True)
class House:
    """What a supervisor keeps for itself in a folder.

    Attributes:
        folder: where.
        side: "server" or "client".
    """

    folder: Path
    side: str

    @property
    def log(self) -> Path:
        """The readable log of all that it runs."""
        return self.folder / "log" / f"{self.side}.log"

    @property
    def parts(self) -> Path:
        """What runs, while it runs: {part: {"pid", "starts", "ready"}}."""
        return self.folder / "parts.json"

    @property
    def lock(self) -> Path:
        """Held by the one supervisor here, with its process id in it."""
        return self.folder / f"{self.side}.lock"

    def running(self) -> dict[str, Any]:
        """Return what `parts` says; {} where nothing runs, or it is just being written."""
        try:
            with open_strange(self.parts) as file:
                found = json.loads(file.read(_MOST_TOLD))
        except (OSError, ValueError, RecursionError):  # another user may have written it
            return {}
        return found if isinstance(found, dict) else {}


class WithState(Group):
    """A config file of one side, which has a state folder of its own.

    Attributes:
        state: the folder of database, logs and whatever else must survive.
    """

    SIDE: ClassVar[str]
    """The command that is started with such a file: "server" or "client"."""

    state: FilePath

    def house(self) -> House:
        """Return where the supervisor keeps its log and lock."""
        return House(self.state, self.SIDE)

    @property
    def log(self) -> Path:
        """The readable log of all parts."""
        return self.house().log

    @property
    def parts(self) -> Path:
        """What runs, while this side runs."""
        return self.house().parts

    @property
    def lock(self) -> Path:
        """Held by the one process of this state folder."""
        return self.house().lock

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file as it is written, its paths relative.

        Raises:
            ConfigError: no such file, no TOML, an unknown key (the nearest valid one is named), a
                missing one, a wrong type or value.
        """
        try:
            return cls.model_validate(unflatten(read_toml(path)))
        except ValidationError as error:
            first = error.errors()[0]
            if first["type"] == "missing":
                example = f"fedgraft {cls.SIDE} --init {path} --keys KEYS"
                raise ConfigError(
                    f"config key {first['loc'][0]} is missing in {path}",
                    f"Set it, or write an example with: {example}",
                ) from None
            raise config_error(error, known_keys(cls), str(path), option=False) from None


def check_new(*files: Path) -> None:
    """Check that example files may be written.

    Raises:
        ConfigError: one of them exists.
    """
    for file in files:
        if file.exists():
            raise ConfigError(f"{file} exists already", "Name another file, or edit that one.")


def as_written_in(file: Path, target: Path) -> Path:
    """Return a path as `file` names it: relative where it lies below the file's folder."""
    folder, whole = file.resolve().parent, target.resolve()
    return whole.relative_to(folder) if whole.is_relative_to(folder) else whole
