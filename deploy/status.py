"""How a server and its run are: who is there, which round it is, who is at work, what is spent."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE

from deploy.keys import Keys
from deploy.runs_folder import RunsFolder
from deploy.server_config import ServerConfig
from fedgraft.adapter import natural_order
from fedgraft.errors import FedGraftError
from fedgraft.nodes import Node, nodes_of
from fedgraft.run_directory import RunDirectory
from fedgraft.runs import FlowerRun, Runs
from server.progress import REPLY, ROUND, SAMPLED, START, ProgressReader

_LOOKED_AT = 20
_HEARD_FOR = HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL
"""Seconds after its last heartbeat at which Flower counts a node as offline."""


@dataclass(frozen=True)
class ClientStatus:
    """One invited client.

    Attributes:
        name: its name.
        state: "training", "idle", "offline", or "never seen".
        heartbeat_age: seconds since its node was last heard of; None when offline.
        certificate_until: when its certificate ends, ISO 8601.
    """

    name: str
    state: str
    heartbeat_age: float | None
    certificate_until: str


@dataclass(frozen=True)
class RunStatus:
    """The run at work, or the last one.

    Attributes:
        run_id: Flower's.
        state: "pending", "starting", "running", or how it ended: "completed", "failed", "stopped".
        directory: the run directory; None where no submit of this server's noted it.
        round: done.
        rounds: of the run.
        asked, answered: clients of the round at work; empty where the run keeps them back.
        validation: the metric after the last round that was looked at.
        bytes_down, bytes_up: what all clients have pulled and pushed, as the SuperLink counts it.
        epsilon: spent, as far as clients tell, or the server's own ledger.
        epsilon_left: of `privacy.target-epsilon`; None where none is set.
    """

    run_id: int
    state: str
    directory: str | None
    round: int | None = None
    rounds: int | None = None
    asked: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()
    validation: float | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    epsilon: float | None = None
    epsilon_left: float | None = None

    @property
    def at_work(self) -> tuple[str, ...]:
        """The clients that have not answered yet."""
        if self.state != "running":
            return ()
        return tuple(name for name in self.asked if name not in self.answered)


@dataclass(frozen=True)
class Status:
    """A server as it is now.

    Attributes:
        listen: where its clients reach it.
        parts: what runs: {part: {"pid", "starts", "ready"}}; empty where the server does not run.
        clients: all that are invited, in natural order.
        run: the run at work, or else the last one.
    """

    listen: str
    parts: Mapping[str, Any]
    clients: tuple[ClientStatus, ...]
    run: RunStatus | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


def status(server: ServerConfig) -> Status:
    """Look at a server that runs on this machine.

    Raises:
        ConfigError: its keys cannot be read.
        RunError: its SuperLink does not answer.
    """
    certificate = server.keys / "server" / "ca.crt"
    with nodes_of(server.superlink_port, certificate) as listed:
        nodes = {node.name: node for node in listed.all() if node.status != "unregistered"}
    with closing(Runs(server.superlink_port, certificate)) as runs:
        newest = runs.newest(_LOOKED_AT)
    chosen = next((run for run in newest if not run.finished), next(iter(newest), None))
    run = None if chosen is None else _run(chosen, RunsFolder(server))
    at_work = () if run is None else run.at_work
    invited = Keys(server.keys).invited()
    clients = tuple(
        _client(name, nodes.get(name), name in at_work, invited[name].expires.isoformat())
        for name in sorted(invited, key=natural_order)
    )
    return Status(server.listen, _parts(server.parts), clients, run)


def _client(name: str, node: Node | None, at_work: bool, until: str) -> ClientStatus:
    if node is None or node.status == "registered":
        return ClientStatus(name, "never seen", None, until)
    if node.online_until is None:
        return ClientStatus(name, "offline", None, until)
    age = max(0.0, time.time() + _HEARD_FOR - node.online_until)
    return ClientStatus(name, "training" if at_work else "idle", round(age, 1), until)


def _parts(path: Path) -> Mapping[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found


def _run(run: FlowerRun, folder: RunsFolder) -> RunStatus:
    state = run.outcome if run.finished else run.status
    path = next((one.directory for one in folder.all() if one.run_id == run.run_id), None)
    found = RunStatus(
        run.run_id,
        state,
        None if path is None else str(path),
        bytes_down=run.bytes_down,
        bytes_up=run.bytes_up,
    )
    if path is None:
        return found
    with suppress(FedGraftError, OSError):  # it has been moved or deleted
        return _with_directory(found, RunDirectory.open(path))
    return found


def _with_directory(run: RunStatus, directory: RunDirectory) -> RunStatus:
    config, records = directory.config(), directory.rounds()
    done = max((int(record["round"]) for record in records), default=0)
    spent = records[-1].get("epsilon") if records else None
    target = config.privacy.target_epsilon
    values: Iterable[float] = (
        event["value"]
        for event in reversed(ProgressReader.of_session(directory.progress).events())
        if event["event"] == ROUND and event.get("value") is not None
    )
    asked, answered = _round_at_work(directory.progress)
    return RunStatus(
        run.run_id,
        run.state,
        run.directory,
        done,
        config.federation.rounds,
        asked,
        answered,
        next(iter(values), None),
        run.bytes_down,
        run.bytes_up,
        spent,
        None if target is None else max(0.0, target - (spent or 0.0)),
    )


def _round_at_work(progress: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return who was asked in the round at work, and who has answered."""
    asked: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()
    for event in ProgressReader.of_session(progress).events():
        kind = event["event"]
        if kind == SAMPLED:
            asked, answered = tuple(event["clients"]), ()
        elif kind == REPLY:
            answered = (*answered, event["client"])
        elif kind in (ROUND, START):
            asked, answered = (), ()
    return asked, answered
