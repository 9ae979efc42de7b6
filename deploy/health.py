"""Whether the parts of a server or client answer: cheap, so that it may be asked every minute.

It imports no torch and opens no base; what a watchdog asks (a container's health check, say) costs
about as much as starting Python.
"""

from __future__ import annotations

import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from client.resident.protocol import PROTOCOL, channel
from client.resident.trainer_pb2 import Greeting, Welcome
from client.resident.trainer_pb2_grpc import ResidentTrainerStub
from deploy.client_config import ClientConfig
from deploy.config_file import NODE, TRAINER, House
from deploy.lock import holder
from deploy.server_config import ServerConfig
from fedgraft import __version__

SUPERVISOR = "supervisor"
_PARTS = ("superlink", "gateway", TRAINER, NODE)
_SECONDS = 5.0


@dataclass(frozen=True)
class Health:
    """One part.

    Attributes:
        part: its name.
        good: whether it answers.
        text: how it is.
    """

    part: str
    good: bool
    text: str


def server_health(server: ServerConfig) -> list[Health]:
    """Look at a server on this machine: what its supervisor says, and whether each port answers."""
    found = _supervised(server.house())
    ports = {"superlink": ("127.0.0.1", server.superlink_port)}
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)
    ports["gateway"] = (host, server.port)
    authority = server.keys / "server" / "ca.crt"
    return [
        _speaks_tls(one, *ports[one.part], authority) if one.good and one.part in ports else one
        for one in found
    ]


def client_health(client: ClientConfig) -> list[Health]:
    """Look at the parts of a client that run on this machine, or in this container.

    Started together they have one supervisor, and started apart one each; what this user may not
    see counts as running elsewhere.
    """
    told: dict[str | None, list[Health]] = {}
    for only in (None, TRAINER, NODE):
        house = client.house(only)
        if os.access(house.parts, os.R_OK):
            told[only] = _supervised(house)
    # The two ways of running exclude each other; what a kill left behind of the other is nothing.
    together = told.pop(None, [])
    apart = [one for parts in told.values() for one in parts]
    runs_apart = any(one.part != SUPERVISOR for one in apart)
    runs_together = any(one.part != SUPERVISOR for one in together)
    found = apart if runs_apart and not runs_together else together or apart
    if not found:
        return [Health("client", False, f"it does not run on {client.state}")]
    return [_greeted(client) if one.part == TRAINER and one.good else one for one in found]


def greet(socket: Path, seconds: float) -> Welcome:
    """Ask a trainer who it is, as a ClientApp does; it says so while it trains, too.

    Raises:
        grpc.RpcError: it does not answer within so many seconds.
    """
    with channel(socket) as connection:
        greeting = Greeting(protocol=PROTOCOL, fedgraft=__version__)
        there: Welcome = ResidentTrainerStub(connection).Greet(greeting, timeout=seconds)
        return there


def _supervised(house: House) -> list[Health]:
    """Return what a supervisor says of its parts, or that it does not run."""
    pid, told = holder(house.lock), house.running()
    if pid is None or not told:
        return [Health(SUPERVISOR, False, f"it does not run on {house.folder}")]
    return [
        Health(name, True, "ready") if one.get("ready") is True else Health(name, False, "starting")
        for name, one in told.items()
        if name in _PARTS and isinstance(one, dict)
    ]


def _speaks_tls(one: Health, host: str, port: int, authority: Path) -> Health:
    """Shake hands as somebody without a certificate; nothing is asked after that."""
    try:
        context = ssl.create_default_context(cafile=str(authority))
        with socket.create_connection((host, port), _SECONDS) as plain:
            context.wrap_socket(plain, server_hostname="localhost").close()
    except OSError as error:
        return Health(one.part, False, f"port {port} does not answer: {error}")
    return Health(one.part, True, f"answers on port {port}")


def _greeted(client: ClientConfig) -> Health:
    """Ask the trainer how it is."""
    try:
        there = greet(client.socket, _SECONDS)
    except grpc.RpcError as error:
        return Health(TRAINER, False, f"it does not answer: {error.code().name}")
    if (there.protocol, there.fedgraft) != (PROTOCOL, __version__):
        return Health(TRAINER, False, f"it is FedGraft {there.fedgraft}: start it again")
    base = f"holds base {there.base[:12]}" if there.base else "holds no base"
    return Health(TRAINER, True, f"{'at work' if there.busy else 'idle'}, {base}")
