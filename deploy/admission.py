"""Who is let in, kept in line with KEYS while a server runs.

The server looks at its KEYS several times a second. When somebody was invited or revoked, it tells
the gateway, then registers and removes nodes at the SuperLink, and then says in KEYS/running.json
what it has taken in: `fedgraft keys` waits for that, so that "revoked" means out.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from deploy import gateway
from deploy.certificates import read_key_file
from deploy.keys import Keys
from deploy.lock import holder
from deploy.server_config import ServerConfig
from fedgraft.errors import ConfigError, RunError
from fedgraft.files import write_json
from fedgraft.nodes import Nodes, nodes_of

_RETRY_SECONDS = 1.0


def digest(keys: Keys) -> str:
    """Return a digest of who is invited with which node key, and who is revoked.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    lines = [f"{one.name} {one.node_key} {one.revoked}" for one in keys.clients()]
    return hashlib.sha256("\n".join(lines).encode() + read_key_file(keys.crl)).hexdigest()


def register(keys: Keys, nodes: Nodes) -> tuple[list[str], dict[str, int | None]]:
    """Register every invited node that is not, and remove every revoked one.

    Returns:
        What was done, a line each, and the id of each node by its key, None for a revoked one.

    Raises:
        RunError: the SuperLink does not answer.
    """
    there = {one.public_key: one for one in nodes.all() if one.status != "unregistered"}
    lines, ids = [], dict[str, int | None]()
    for client in keys.clients():
        node = there.pop(client.public_key, None)
        if client.revoked is not None:
            ids[client.node_key] = None
            if node is not None:
                nodes.unregister(node.node_id)
                lines.append(f"removed the node of client {client.name}")
        elif node is not None:
            ids[client.node_key] = node.node_id
        else:
            ids[client.node_key] = nodes.register(client.public_key, client.name)
            lines.append(f"registered the node of client {client.name}")
    lines += [
        f"warning: node {node.node_id} is in the database and not in clients.json; the gateway "
        "refuses it"
        for node in there.values()
    ]
    return lines, ids


@dataclass
class Admission:
    """What a server does about who is let in.

    Args:
        keys: its KEYS.
        config: its config.
        say: takes a line for the log.
        told: digest of what the gateway was started with.
    """

    keys: Keys
    config: ServerConfig
    say: Callable[[str], None]
    told: str
    _seen: tuple[object, ...] = ()  # the files' state when they were last read
    _wanted: str = ""  # digest of what they say
    _settled: str = ""  # digest of what all know
    _next: float = 0.0  # monotonic seconds at which the SuperLink is tried again
    _complaints: set[str] = field(default_factory=set)  # said already

    def tick(self) -> None:
        """Take in what has changed; what fails is said once and tried again."""
        try:
            self._read()
            if self._wanted != self.told:
                gateway.write_nodes(self.config, self.keys.invited().values())
                gateway.reload(self.config)
                self.told = self._wanted
            if self._wanted != self._settled and time.monotonic() >= self._next:
                self._next = time.monotonic() + _RETRY_SECONDS
                self._settle()
                self._complaints.clear()
        except (ConfigError, RunError) as error:
            line = str(error).replace("\n", ". ")
            if line not in self._complaints:
                self.say(f"warning: {line}")
                self._complaints.add(line)

    def close(self) -> None:
        """Take back what was said in KEYS."""
        with suppress(OSError):
            self.keys.running.unlink(missing_ok=True)

    def _read(self) -> None:
        now = tuple(_state(path) for path in (self.keys.records, self.keys.crl))
        if now != self._seen:
            self._wanted = digest(self.keys)
            self._seen = now

    def _settle(self) -> None:
        wanted = self._wanted
        with nodes_of(self.config.superlink_port, self.keys.server / "ca.crt") as nodes:
            lines, ids = register(self.keys, nodes)
        for line in lines:
            self.say(line)
        self._settled = wanted
        self.keys.set_node_ids(ids)
        told = {"state": str(self.config.state), "log": str(self.config.log), "knows": wanted}
        write_json(self.keys.running, told)


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def wait_for_server(keys: Keys, seconds: float = 30.0) -> bool:
    """Wait until the server that runs with these keys has taken them in; False where none runs.

    Raises:
        RunError: a server runs and does not answer.
    """
    limit = time.monotonic() + seconds
    wanted = digest(keys)
    while True:
        try:
            told = json.loads(keys.running.read_text())
            state, log, knows = Path(told["state"]), told["log"], told["knows"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        lock = state / "server.lock"
        with suppress(PermissionError):  # another user's server: believed to run
            if lock.exists() and holder(lock) is None:
                return False
        if knows == wanted:
            return True
        if time.monotonic() > limit:
            raise RunError(
                f"the change is written, but the server on {state} has not taken it in",
                f"See {log}; if it does not run any more, delete {keys.running}.",
            )
        time.sleep(0.05)
