"""The two processes of a client, as the supervisor keeps them running."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import grpc

from client.resident.protocol import CLIENT, SOCKET
from deploy import supernode
from deploy.client_config import ClientConfig, user_and_group
from deploy.config_file import NODE, TRAINER
from deploy.health import greet
from deploy.supervisor import Part, listens
from fedgraft.flower import flower_environment, free_port

_KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "FEDGRAFT_TEST")
"""What the SuperNode's processes, which count as the server's, see of our own environment."""
_SILENT_SECONDS, _ANSWER_SECONDS = 300.0, 20.0
"""How long a part may not answer at all, and how long for one answer is waited."""
_POLL_SECONDS = "2.0"  # between two questions of the SuperExec, which is told of work


def parts(config: ClientConfig, file: Path, only: str | None = None) -> list[Part]:
    """Return the trainer and the SuperNode, or one of them.

    Args:
        config: what `file` holds.
        file: client.toml, which the trainer reads itself.
        only: the one part that is wanted; its user is then whoever starts it.
    """
    takes_user = only is None and config.two_users
    found = [] if only == NODE else [_trainer(config, file, takes_user)]
    return found if only == TRAINER else [*found, _node(config, takes_user)]


def _trainer(config: ClientConfig, file: Path, takes_user: bool) -> Part:
    environment = {k: v for k, v in os.environ.items() if k != "FEDGRAFT_SIMULATION"}
    if config.two_users:
        environment["HOME"] = str(config.kept)
    return Part(
        name=TRAINER,
        command=[
            *as_user(config.trainer_user if takes_user else None),
            *(sys.executable, "-P", "-m", "deploy.trainer", str(file.resolve())),
        ],
        ready=lambda: _listens(config.socket),
        environment=environment,
        folder=config.kept,
        before=lambda: config.socket.unlink(missing_ok=True),
        stop_seconds=30.0,  # a step of training may take as long
        ready_seconds=180.0,
        answers=lambda: _greets(config.socket),
        silent_seconds=_SILENT_SECONDS,
    )


def _node(config: ClientConfig, takes_user: bool) -> Part:
    port = free_port()
    environment = {
        name: value
        for name, value in flower_environment(config.node / "flower").items()
        if name in _KEPT or name.startswith("FLWR_")
    }
    environment |= {
        "HOME": str(config.node),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": _POLL_SECONDS,
        "OPENBLAS_NUM_THREADS": "1",  # relays do not calculate, and a fork takes no threads along
        "SPT_NOENV": "1",  # ClientApps write their name over their arguments alone
        SOCKET: str(config.socket),
        CLIENT: config.client,
    }
    options = ["--superlink", config.server, "--host", "127.0.0.1", "--port", str(port)]
    if config.keys is None:
        options.append("--insecure")
    else:
        keys = config.node_keys if takes_user else config.keys
        environment[supernode.CERTIFICATE] = str(keys / "client.crt")
        environment[supernode.KEY] = str(keys / "client.key")
        options += ["--root-certificates", str(keys / "ca.crt")]
        options += ["--auth-supernode-private-key", str(keys / "node")]
    return Part(
        name=NODE,
        command=[
            *as_user(config.node_user if takes_user else None),
            *(sys.executable, "-P", "-m", "deploy.supernode", *options),
        ],
        ready=listens(port),
        environment=environment,
        folder=config.node,
        answers=lambda: _replies(port),
        silent_seconds=_SILENT_SECONDS,
    )


def as_user(user: str | int | None) -> list[str]:
    """Return what starts a command as a Unix user; nothing for our own.

    It begins as root in a folder, and with a home, that the user may write to: -P and -s keep
    Python from importing what lies there.
    """
    if user is None:
        return []
    return [sys.executable, "-P", "-s", "-m", "deploy.as_user", *map(str, user_and_group(user))]


def _greets(path: Path) -> bool:
    """Whether the trainer says who it is, which it does while it trains, too."""
    with suppress(grpc.RpcError):
        greet(path, _ANSWER_SECONDS)
        return True
    return False


def _replies(port: int) -> bool:
    """Whether a SuperNode answers on the port of its ClientApps: "not found" is an answer."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=_ANSWER_SECONDS)) as connection:
        with suppress(OSError, HTTPException):
            connection.request("GET", "/")
            connection.getresponse()
            return True
        return False


def _listens(path: Path) -> bool:
    """Whether something accepts connections on a Unix socket."""
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.connect(str(path))
        return True
    return False
