"""Flower's SuperLink as a part of a server: on loopback, with TLS, known nodes and a database."""

from __future__ import annotations

import re
import sys

from deploy.keys import Keys
from deploy.server_config import ServerConfig
from deploy.supervisor import Part, greets, listens
from fedgraft.flower import flower_environment, write_connection

NAME = "superlink"
_NOISE = re.compile(r"ListNodes|ListRuns|/v1/control/list-(nodes|runs) ")
"""What `fedgraft status` and `fedgraft submit` ask again and again."""


def superlink(config: ServerConfig, keys: Keys) -> Part:
    """Return the SuperLink as a part to supervise, and write the connection that leads to it."""
    write_connection(config.flower_home, config.superlink_port, keys.server / "ca.crt")
    command = [
        *(sys.executable, "-P", "-m", "deploy.patient_superlink"),
        *("--host", "127.0.0.1", "--port", str(config.superlink_port)),
        *("--ssl-ca-certfile", str(keys.server / "ca.crt")),
        *("--ssl-certfile", str(keys.server / "server.crt")),
        *("--ssl-keyfile", str(keys.server / "server.key")),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        *("--database", str(config.state / "superlink.db")),
    ]
    environment = flower_environment(config.flower_home) | {
        # It starts but one ServerApp a run, and each question of its costs the database a write.
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
        "PYTHONUNBUFFERED": "1",
    }
    ready = listens(config.superlink_port)
    return Part(
        NAME,
        command,
        ready,
        environment=environment,
        folder=config.state,
        hides=_NOISE,
        answers=greets(config.superlink_port),
        silent_seconds=config.silent_seconds,
    )
