"""Bring a running server in line with its KEYS: who is registered, and whom the gateway knows."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from dataclasses import dataclass

from deploy import gateway
from deploy.keys import Keys
from deploy.lock import holder
from deploy.server_config import ServerConfig
from fedgraft.files import write_json
from fedgraft.nodes import Nodes, nodes_of


@dataclass(frozen=True)
class Changes:
    """What was done at the SuperLink, by name; `strangers` are registered nodes of nobody's."""

    registered: list[str]
    removed: list[str]
    strangers: list[int]


def settle(keys: Keys, config: ServerConfig) -> Changes:
    """Register every invited node, remove every revoked one, and let the gateway read both lists.

    The gateway comes first, so that a revoked client is shut out even where the SuperLink is down.

    Raises:
        RunError: the SuperLink does not answer.
    """
    gateway.write_nodes(config, keys.invited().values())
    pid = gateway.running_gateway(config)
    if pid is not None:
        with suppress(ProcessLookupError):  # it comes back, and reads both lists then
            os.kill(pid, signal.SIGHUP)
    with nodes_of(config.superlink_port, keys.server / "ca.crt") as nodes:
        return _register(keys, nodes)


def _register(keys: Keys, nodes: Nodes) -> Changes:
    there = {one.public_key: one for one in nodes.all() if one.status != "unregistered"}
    ids: dict[str, int | None] = {}
    changes = Changes([], [], [])
    for client in keys.clients():
        node = there.pop(client.public_key, None)
        if client.revoked is None:
            if node is None:
                changes.registered.append(client.name)
            ids[client.node_key] = (
                nodes.register(client.public_key, client.name) if node is None else node.node_id
            )
        else:
            if node is not None:
                nodes.unregister(node.node_id)
                changes.removed.append(client.name)
            ids[client.node_key] = None
    changes.strangers.extend(node.node_id for node in there.values())
    keys.set_node_ids(ids)
    return changes


def announce(keys: Keys, config: ServerConfig) -> None:
    """Write down, beside the keys, which server runs with them.

    Raises:
        RunError: the folder may not be written to.
    """
    told = config.model_dump(by_alias=True, mode="json")
    write_json(keys.running, told)


def running_server(keys: Keys) -> ServerConfig | None:
    """Return the config of the server that runs with these keys on this machine, if one does."""
    try:
        config = ServerConfig.model_validate(json.loads(keys.running.read_text()))
    except (OSError, ValueError):
        return None
    return config if holder(config.lock) is not None else None


def forget(keys: Keys) -> None:
    """Take back what `announce` wrote."""
    with suppress(OSError):
        keys.running.unlink(missing_ok=True)
