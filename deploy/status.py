"""How a server and its run are: who is there, which round it is, who is at work, what is spent."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE

from deploy.keys import Keys
from deploy.runs_folder import RunsFolder
from deploy.server_config import ServerConfig
from fedgraft.adapter import natural_order
from fedgraft.errors import FedGraftError
from fedgraft.nodes import Node, nodes_of
from fedgraft.privacy.account import EPSILON, EPSILON_LEFT
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
        state: "training", "idle", "offline" or "never seen"; "online" where a private run tells
            nobody who is at work.
        heartbeat_age: seconds since its node was last heard of; None when offline.
        certificate_until: when its certificate ends, ISO 8601.
        epsilon: what its data have spent, as it last told; None where it has told nothing.
        epsilon_left: what they may still spend: of its policy's lifetime, as it told, or of the
            run's `privacy.target-epsilon`, the less of both.
    """

    name: str
    state: str
    heartbeat_age: float | None
    certificate_until: str
    epsilon: float | None = None
    epsilon_left: float | None = None


@dataclass(frozen=True)
class RunStatus:
    """The run at work, or the last one.

    Attributes:
        run_id: Flower's.
        state: "pending", "starting", "running", or how it ended: "completed", "failed", "stopped".
        directory: the run directory; None where no submit of this server's noted it.
        round: done.
        at_round: the one at work; None where none is.
        rounds: of the run.
        asked, answered: clients of the round at work; empty where the run keeps them back.
        validation: the metric after the last round that was looked at.
        bytes_down, bytes_up: what all clients have pulled and pushed, as the SuperLink counts it.
        epsilon: spent, as far as clients tell, or the server's own ledger.
        target: `privacy.target-epsilon`; None where none is set.
        hidden: who is at work is told to nobody.
        bounds_clients: the target bounds what each client's own ledger holds.
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
    target: float | None = None
    hidden: bool = False
    bounds_clients: bool = False
    at_round: int | None = None

    @property
    def epsilon_left(self) -> float | None:
        """What is left of the target."""
        return None if self.target is None else max(0.0, self.target - (self.epsilon or 0.0))

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
        tree: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        if self.run is not None:
            tree["run"] |= {"epsilon_left": self.run.epsilon_left, "at_work": self.run.at_work}
        return tree


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
    folder = RunsFolder(server)
    run = None if chosen is None else _run(chosen, folder)
    told = _told(folder)
    invited = Keys(server.keys).invited()
    clients = tuple(
        _with_budget(
            _client(name, nodes.get(name), run, invited[name].expires.isoformat()),
            told.get(name, {}),
            run,
        )
        for name in sorted(invited, key=natural_order)
    )
    return Status(server.listen, server.house().running(), clients, run)


def _client(name: str, node: Node | None, run: RunStatus | None, until: str) -> ClientStatus:
    if node is None or node.status == "registered":
        return ClientStatus(name, "never seen", None, until)
    if node.online_until is None:
        return ClientStatus(name, "offline", None, until)
    age = max(0.0, time.time() + _HEARD_FOR - node.online_until)
    state = "idle"
    if run is not None and run.state == "running":
        state = "training" if name in run.at_work else "online" if run.hidden else "idle"
    return ClientStatus(name, state, round(age, 1), until)


def _told(folder: RunsFolder) -> dict[str, dict[str, Any]]:
    """Return what each client told of its budget in the newest run in which it told any.

    It is the last word as long as its data were asked by no other server since.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in dict.fromkeys(one.directory for one in folder.all()[:_LOOKED_AT]):
        with suppress(OSError, ValueError):  # it has been moved or deleted
            for name, told in RunDirectory(path).clients().items():
                if EPSILON in told:
                    found.setdefault(name, told)
    return found


def _with_budget(
    client: ClientStatus, told: Mapping[str, Any], run: RunStatus | None
) -> ClientStatus:
    spent, target = told.get(EPSILON), run.target if run and run.bounds_clients else None
    left = [told.get(EPSILON_LEFT)]
    if spent is not None and target is not None:
        left.append(max(0.0, target - spent))
    least = min((value for value in left if value is not None), default=None)
    return replace(client, epsilon=spent, epsilon_left=least)


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
    at_round, asked, answered = _round_at_work(directory.progress)
    return replace(
        run,
        round=done,
        rounds=config.federation.rounds,
        at_round=at_round if run.state == "running" else None,
        asked=asked,
        answered=answered,
        validation=next(iter(values), None),
        epsilon=spent,
        target=target,
        hidden=config.privacy.mode != "none",
        bounds_clients=config.privacy.against_server,
    )


def _round_at_work(progress: Path) -> tuple[int | None, tuple[str, ...], tuple[str, ...]]:
    """Return the round at work, who was asked in it, and who has answered."""
    at: int | None = None
    asked: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()
    for event in ProgressReader.of_session(progress).events():
        kind = event["event"]
        if kind == SAMPLED:
            at, asked, answered = int(event["round"]), tuple(event["clients"]), ()
        elif kind == REPLY:
            answered = (*answered, event["client"])
        elif kind in (ROUND, START):
            at, asked, answered = None, (), ()
    return at, asked, answered
