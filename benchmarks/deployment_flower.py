"""Flower as shipped: a SuperLink and SuperNodes on loopback with TLS and node authentication."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from deployment_apps import CLIENTS, FOLDER, ROUNDS, STARTS
from deployment_fedgraft import make_keys, python_path

from fedgraft.flower import (
    CONNECTION,
    flower_environment,
    free_port,
    started,
    wait_for_port,
    write_app,
    write_connection,
)

BIN = Path(sys.executable).parent
APPS = ("deployment_apps:idle_server", "deployment_apps:idle_client")
_SECONDS = 900.0


def flower_rounds(folder: Path, clients: int, rounds: int) -> list[float]:
    """Run no-op rounds; return the seconds from one round's start to the next one's.

    Args:
        folder: holds the payload; everything else is written there.
        clients: how many SuperNodes.
        rounds: at least 2.
    """
    (folder / STARTS).unlink(missing_ok=True)
    keys = make_keys(folder / "keys", clients)
    authority = keys / "server" / "ca.crt"
    port, home = free_port(), folder / "home"
    write_connection(home, port, authority)
    environment = flower_environment(home) | {"PYTHONPATH": python_path()}
    del environment["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"]  # as shipped
    link = [
        str(BIN / "flower-superlink"),
        *("--ssl-ca-certfile", str(authority)),
        *("--ssl-certfile", str(keys / "server" / "server.crt")),
        *("--ssl-keyfile", str(keys / "server" / "server.key")),
        *("--enable-supernode-auth", "--database", str(folder / "state.db")),
        *("--disable-runtime-dependency-installation", "--host", "127.0.0.1", "--port", str(port)),
    ]
    log = folder / "flower.log"
    with ExitStack() as stack:
        out = stack.enter_context(log.open("w"))
        process = stack.enter_context(started(link, out, folder, environment))
        wait_for_port(port, process, log)
        for k in range(clients):
            own = keys / "clients" / str(k)
            register = [str(BIN / "flwr"), "supernode", "register", str(own / "node.pub")]
            subprocess.run(
                [*register, CONNECTION], check=True, env=environment, stdout=out, stderr=out
            )
            node = [
                str(BIN / "flower-supernode"),
                *("--root-certificates", str(own / "ca.crt"), "--superlink", f"127.0.0.1:{port}"),
                *("--host", "127.0.0.1", "--port", str(free_port())),
                *("--auth-supernode-private-key", str(own / "node")),
            ]
            stack.enter_context(started(node, out, folder, environment))
        config = {FOLDER: str(folder), ROUNDS: rounds, CLIENTS: clients}
        write_app(folder / "app", config, *APPS)
        run = [str(BIN / "flwr"), "run", str(folder / "app"), CONNECTION]
        subprocess.run(run, check=True, env=environment, stdout=out, stderr=out)
        end = time.monotonic() + _SECONDS
        while not (folder / STARTS).exists():
            if time.monotonic() > end or process.poll() is not None:
                raise SystemExit(f"Flower's run did not end:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
    starts = json.loads((folder / STARTS).read_text())
    return [after - before for before, after in pairwise(starts)]
