"""What relay and resident trainer agree on beside trainer.proto; imports no torch."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import grpc

from fedgraft.errors import ConfigError

PROTOCOL = 1
"""Counted up with every change of trainer.proto that an older side would misread."""
SOCKET = "FEDGRAFT_TRAINER"
"""Environment variable with the path of the trainer's socket."""
CLIENT = "FEDGRAFT_CLIENT"
"""Environment variable with the client's name, which stands in refusals where no trainer does."""
KINDS = ("query.hello", "train", "evaluate", "query.spent", "query.adapter")
"""The message types that a trainer answers."""
LARGEST_MESSAGE = 512 * 2**20
"""Bytes of one order or result: an adapter of 200 MiB with as much beside it fits."""
_RECONNECT_MILLISECONDS = (("initial", 50), ("min", 50), ("max", 250))
_LONGEST_SOCKET_PATH = 100
"""Bytes of a Unix socket's path; systems allow 104 to 108."""


def options() -> list[tuple[str, int]]:
    """Return gRPC's options for either side."""
    waits = [(f"grpc.{name}_reconnect_backoff_ms", ms) for name, ms in _RECONNECT_MILLISECONDS]
    return [
        ("grpc.max_send_message_length", LARGEST_MESSAGE),
        ("grpc.max_receive_message_length", LARGEST_MESSAGE),
        *waits,
    ]


def address(socket: Path) -> str:
    """Return gRPC's name of a Unix socket: a URI, in which # and ? would end the path."""
    return f"unix:{quote(str(socket))}"


def check_socket(socket: Path) -> None:
    """Check that a Unix socket may have this path.

    Raises:
        ConfigError: it is too long.
    """
    if len(bytes(socket)) > _LONGEST_SOCKET_PATH:
        raise ConfigError(
            f"the socket's path {socket} is longer than {_LONGEST_SOCKET_PATH} bytes",
            "Let `state` be a folder with a shorter path.",
        )


def channel(socket: Path) -> grpc.Channel:
    """Open a channel to the trainer, which connects when the first call is made."""
    return grpc.insecure_channel(address(socket), options=options())
