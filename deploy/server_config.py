"""server.toml: where a server's keys and state lie, where it listens and what it lets through."""

from __future__ import annotations

import re
from json import dumps
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from deploy.config_file import DEFAULT_GATEWAY, FilePath, WithState, as_written_in, check_new
from fedgraft.config import Group, Positive
from fedgraft.errors import ConfigError
from fedgraft.files import write_text

Port = Annotated[int, Field(gt=0, lt=65536)]
_LISTEN = re.compile(r"(?P<host>[^\s;{}\[\]:]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})")

EXAMPLE = """\
# A FedGraft server. Start it with: fedgraft server --config {file}
# Relative paths are relative to this file.

keys = {keys}  # what `fedgraft keys init` made
state = {state}  # database, logs and runs; one server only

# The gateway: the one port that clients reach. 0.0.0.0:9443 for all of this machine's addresses.
listen = {listen}

# Flower's SuperLink, on loopback. Whoever may log in to this machine reaches it.
superlink-port = 8000
silent-seconds = 120.0  # after so long without an answer it is killed and started again

[limits]
body-mib = 64  # the largest request; adapters travel in pieces of 5 MiB
requests-per-second = 200  # of one client; what is more waits, and far more is refused
connections = 32  # of one client at a time
"""


class LimitsConfig(Group):
    """`[limits]`: what the gateway lets one client do."""

    body_mib: Positive = 64  # MiB, the largest request
    requests_per_second: Positive = 200
    connections: Positive = 32


class ServerConfig(WithState):
    """What `fedgraft server` is started with; paths are absolute once it is loaded."""

    SIDE: ClassVar[str] = "server"

    keys: FilePath
    listen: Annotated[str, Field(min_length=1)] = "0.0.0.0:9443"
    superlink_port: Port = 8000
    silent_seconds: Annotated[float, Field(ge=15.0)] = 120.0  # of the SuperLink
    limits: LimitsConfig = LimitsConfig()

    @property
    def host(self) -> str:
        """The address that the gateway listens on, without an IPv6 address's brackets."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port that the gateway listens on."""
        return int(self.listen.rpartition(":")[2])

    @property
    def flower_home(self) -> Path:
        """FLWR_HOME of everything that speaks to this server's SuperLink."""
        return self.state / "flower"

    @property
    def access_log(self) -> Path:
        """One JSON object for each request that reached the gateway."""
        return self.state / "log" / "access.jsonl"

    @classmethod
    def load(cls, path: Path) -> ServerConfig:
        """Read server.toml; relative paths become absolute, from the file's folder on.

        Raises:
            ConfigError: no such file, no TOML, an unknown key (the nearest valid one is named), a
                missing one, a wrong type or value.
        """
        read = cls.read(path)
        match = _LISTEN.fullmatch(read.listen)
        if match is None or not 0 < int(match["port"]) < 65536:
            raise ConfigError(
                f"config key listen in {path} is {read.listen!r}, and must be HOST:PORT",
                'Set it like listen = "0.0.0.0:9443".',
            )
        if read.port == read.superlink_port:
            raise ConfigError(
                f"listen and superlink-port in {path} are the same port, {read.port}",
                "Set them to different ports.",
            )
        folder = path.resolve().parent
        return read.model_copy(update={"keys": folder / read.keys, "state": folder / read.state})


def write_example(path: Path, keys: Path) -> None:
    """Write a commented server.toml that runs as it stands on one machine.

    Raises:
        ConfigError: the file exists.
    """
    check_new(path)
    values = {
        "keys": str(as_written_in(path, keys)),
        "state": f"{path.stem}-state",
        "listen": DEFAULT_GATEWAY,
    }
    # JSON's text is TOML's basic string.
    quoted = {key: dumps(value) for key, value in values.items()}
    write_text(path, EXAMPLE.format(file=path, **quoted))
