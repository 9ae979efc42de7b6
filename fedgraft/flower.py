"""The parts of Flower that are not its public interface, isolated here, and its processes.

Everything private that FedGraft touches is in this file, nodes.py and runs.py, and where it is of
the deployed processes in deploy's launchers of them, each with a test, so that a new Flower release
breaks one place and says so.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil
import tomli_w
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.task_identity import TaskIdentity

from fedgraft.errors import RunError
from fedgraft.files import write_text
from fedgraft.logs import quiet_environment

CONNECTION = "fedgraft"
"""Name of the SuperLink connection in the configuration that we write for Flower."""
_START_SECONDS = 60.0
_STOP_SECONDS = 10.0
OBJECT_SECONDS = 0.05
"""How long to wait before a message's object is asked for again that was not there yet."""
SERVER_NODE = 1
"""Node id of the server in an in-process federation; clients come after it."""


def set_identity(run_id: int, node_id: int = SERVER_NODE) -> None:
    """Tell Flower which run and node this process acts for; messages cannot be made without."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id
    TaskIdentity.task_id = 1


def ask_soon_for_objects(most: float | None = None) -> None:
    """Let this process ask soon again for an object that is still on its way to the other side.

    A message is announced before the objects that it consists of. Flower waits a second before it
    asks again, and twice as long each further time, which we leave as it is.

    Args:
        most: seconds after which a message is given up whose objects do not come: whoever sends it
            may have died over it, and no other message is read meanwhile. None leaves that to the
            SuperLink, which takes three minutes.
    """
    functions: Any = inflatable_utils
    for pull in (functions.pull_objects, functions.pull_and_inflate_object_from_tree):
        pull.__kwdefaults__["initial_backoff"] = OBJECT_SECONDS
        if most is not None:
            pull.__kwdefaults__["max_time"] = most


def leave_out_empty_lines() -> None:
    """Let this process say nothing where Flower would log a line with nothing in it."""
    logging.getLogger("flwr").addFilter(lambda record: bool(record.getMessage().strip()))


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message the id that a SuperLink would have given it."""
    message.metadata.__dict__["_message_id"] = message_id


def error_reply(message: Message, error: Exception) -> Message:
    """Return the reply that a SuperNode sends when its ClientApp raises."""
    code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    return Message(Error(code=code, reason=f"{type(error).__name__}: {error}"), reply_to=message)


def say_who_was_asked(reply: Message, node: int) -> None:
    """Let a reply come from the node that was asked.

    Where that one is gone Flower answers itself, in the name of the SuperLink.
    """
    reply.metadata.__dict__["_src_node_id"] = node


def is_lost(reply: Message) -> bool:
    """Whether a message got no answer since a SuperNode or a ClientApp died with it."""
    lost = (
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,  # it died while it sent the answer
        ErrorCode.MESSAGE_UNAVAILABLE,  # as well: the answer was announced and never came
    )
    return reply.has_error() and reply.error.code in lost


def write_app(
    folder: Path,
    run_config: Mapping[str, str | int | float | bool],
    server_app: str = "server.app:app",
    client_app: str = "client.app:app",
) -> None:
    """Write the app folder that Flower is handed: one pyproject.toml, no code.

    Configuration travels, code does not: each side runs the FedGraft that is installed on it.
    """
    flower = {
        "publisher": "fedgraft",
        "fab-include": ["/pyproject.toml"],
        "components": {"serverapp": server_app, "clientapp": client_app},
        "config": dict(run_config),
    }
    project = {
        "name": "fedgraft-run",
        "version": "1.0.0",
        "description": "A run of FedGraft; the code is what is installed.",
        "license": "Apache-2.0",
        "dependencies": [],
    }
    tree = {"project": project, "tool": {"flwr": {"app": flower}}}
    write_text(folder / "pyproject.toml", tomli_w.dumps(tree))


def write_connection(home: Path, port: int, root_certificates: Path | None = None) -> None:
    """Write Flower's own configuration: one connection, to a SuperLink of ours on loopback.

    Args:
        home: what FLWR_HOME will be.
        port: where the SuperLink listens.
        root_certificates: the CA of its certificate; None: it speaks plain HTTP.
    """
    connection: dict[str, str | bool] = {"address": f"127.0.0.1:{port}"}
    if root_certificates is None:
        connection["insecure"] = True
    else:
        connection["root-certificates"] = str(root_certificates)
    tree = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
    write_text(home / "config.toml", tomli_w.dumps(tree))


def simulation_settings(nodes: int, cpus: int, gpus: float) -> str:
    """Return the value of `flwr run --federation-config` for a simulation.

    Args:
        nodes: simulated clients.
        cpus: cores that one client's work takes; Ray runs as many side by side as fit.
        gpus: GPUs that one client's work takes, a fraction to share one.
    """
    return (
        f"num-supernodes={nodes} client-resources-num-cpus={cpus} "
        f"client-resources-num-gpus={float(gpus)}"
    )


def flower_environment(home: Path) -> dict[str, str]:
    """Return the environment for Flower's processes: ours, quiet, with a home of its own."""
    return (
        os.environ
        | quiet_environment()
        | {
            "FLWR_HOME": str(home),
            # Without it the SuperLink installs torch and all the rest anew for every run.
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }
    )


def free_port() -> int:
    """Return a port on loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def started(
    command: list[str], log: IO[str], folder: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """Run a process, with all that it starts, for as long as the block lasts.

    It gets a session of its own, so that Ctrl-C reaches us alone and we stop it in order.
    """
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        cwd=folder,
        env=dict(environment),
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    """End a process and everything it started.

    Who descends from it is noted first: Ray's agents outlive their parents, in other sessions.
    """
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    process.kill()
    process.wait()
    for descendant in family:
        with suppress(psutil.NoSuchProcess):
            descendant.terminate()
    _, alive = psutil.wait_procs(family, timeout=_STOP_SECONDS)
    for descendant in alive:
        with suppress(psutil.NoSuchProcess):
            descendant.kill()


def wait_for_port(port: int, process: subprocess.Popen[str], log: Path) -> None:
    """Wait until something listens on a loopback port.

    Raises:
        RunError: the process ended before, or does not listen in time.
    """
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RunError(f"Flower's SuperLink did not start (exit {process.poll()})", f"See {log}.")
