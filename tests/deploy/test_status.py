"""What `fedgraft status` makes of nodes, runs and run directories."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from command_line import call

from deploy import status as status_module
from deploy.runs_folder import RunsFolder
from deploy.server_config import ServerConfig
from deploy.status import status
from fedgraft.config import Config
from fedgraft.nodes import Node
from fedgraft.run_directory import RunDirectory
from fedgraft.runs import FlowerRun
from server.progress import REPLY, ROUND, SAMPLED, START, ProgressWriter

END = datetime(2030, 1, 2, tzinfo=UTC)


class Invited:
    expires = END


class Fakes:
    """A SuperLink's answers."""

    def __init__(self) -> None:
        now = time.time()
        self.nodes = [
            Node(1, "a", b"", "online", now + 60 - 12),
            Node(2, "b", b"", "online", now + 60 - 3),
            Node(3, "c", b"", "offline", None),
            Node(4, "gone", b"", "unregistered", None),
        ]
        self.runs = [FlowerRun(7, "running", "", "", 2_000_000, 1_000_000)]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServerConfig:
    fakes = Fakes()

    class Keys:
        def __init__(self, folder: Path) -> None: ...

        def invited(self) -> dict[str, Invited]:
            return {name: Invited() for name in ("c", "b", "a", "new")}

    class Nodes:
        def all(self) -> list[Node]:
            return fakes.nodes

    class Runs:
        def __init__(self, *arguments: Any) -> None: ...

        def newest(self, count: int) -> list[FlowerRun]:
            return fakes.runs

        def close(self) -> None: ...

    @contextmanager
    def nodes_of(*arguments: Any) -> Iterator[Nodes]:
        yield Nodes()

    for name, fake in (("Keys", Keys), ("Runs", Runs), ("nodes_of", nodes_of)):
        monkeypatch.setattr(status_module, name, fake)
    (tmp_path / "server.toml").write_text('keys = "KEYS"\nstate = "state"\n')
    return ServerConfig.load(tmp_path / "server.toml")


def at_work(server: ServerConfig, path: Path, **privacy: Any) -> RunDirectory:
    """A run that waits for client b in round 3; of a private one the file does not say for whom."""
    keys = {f"privacy.{key.replace('_', '-')}": value for key, value in privacy.items()}
    config = Config().with_overrides({"federation.rounds": 10, **keys})
    directory = RunDirectory.create(path, config, "abc", deployed=True)
    RunsFolder(server).note(7, path)
    for number in range(3):
        directory.append_round({"round": number, "epsilon": 1.5 * number if privacy else None})
    progress = ProgressWriter(directory.progress)
    progress.write(SAMPLED, round=9, clients=["c"])  # of a session before
    progress.write(START, round=1, rounds=10)
    progress.write(ROUND, round=2, value=0.7, loss=0.1)
    progress.write(SAMPLED, round=3, clients=[] if privacy else ["a", "b"])
    if not privacy:
        progress.write(REPLY, round=3, client="a", trouble="")
    progress.close()
    return directory


def test_a_run_at_work(server: ServerConfig, tmp_path: Path) -> None:
    at_work(server, tmp_path / "run")
    found = status(server)
    assert [(c.name, c.state) for c in found.clients] == [
        ("a", "idle"),
        ("b", "training"),
        ("c", "offline"),
        ("new", "never seen"),
    ]
    ages = [client.heartbeat_age for client in found.clients]
    assert ages[0] == pytest.approx(12, abs=2) and ages[1] == pytest.approx(3, abs=2)
    assert ages[2:] == [None, None]
    run = found.run
    assert run is not None
    assert (run.state, run.round, run.rounds, run.validation) == ("running", 2, 10, 0.7)
    assert (run.asked, run.answered, run.at_work) == (("a", "b"), ("a",), ("b",))
    assert (run.epsilon, run.epsilon_left, run.at_round) == (None, None, 3)
    assert (run.bytes_down, run.bytes_up) == (2_000_000, 1_000_000)


PRIVATE = {"mode": "example", "target_epsilon": 8.0}


def test_a_private_run_tells_budgets_and_not_who_is_at_work(
    server: ServerConfig, tmp_path: Path
) -> None:
    """Left is the less of what a policy's lifetime and the run's target leave."""
    before = RunDirectory.create(tmp_path / "before", Config(), "abc", deployed=True)
    before.write_clients({"c": {"epsilon": 0.5, "epsilon-left": 1.5}, "a": {"epsilon": 0.1}})
    RunsFolder(server).note(6, before.path)
    time.sleep(0.01)
    directory = at_work(server, tmp_path / "run", **PRIVATE)
    told = {"a": {"epsilon": 3.0}, "b": {"epsilon": 2.0, "epsilon-left": 0.25}, "new": {}}
    directory.write_clients(told)
    found = status(server)
    assert [(c.name, c.state, c.epsilon, c.epsilon_left) for c in found.clients] == [
        ("a", "online", 3.0, 5.0),
        ("b", "online", 2.0, 0.25),
        ("c", "offline", 0.5, 1.5),
        ("new", "never seen", None, None),
    ]
    run = found.run
    assert run is not None and run.hidden and run.at_work == ()
    assert (run.epsilon, run.epsilon_left, run.at_round) == (3.0, 5.0, 3)
    assert found.to_json()["run"]["epsilon_left"] == 5.0


def test_the_command_says_the_same_in_words_and_as_json(
    server: ServerConfig, tmp_path: Path
) -> None:
    directory = at_work(server, tmp_path / "run", **PRIVATE)
    directory.write_clients({"b": {"epsilon": 2.0, "epsilon-left": 0.25}})
    server.parts.parent.mkdir(exist_ok=True)
    part = {"pid": 1, "starts": 2, "ready": True}
    server.parts.write_text(json.dumps({"superlink": part, "gateway": part | {"starts": 1}}))
    done = call("status", "--to", tmp_path / "server.toml")
    assert done.status == 0, done.err
    assert "superlink ready (started 2 times), gateway ready" in done.out
    assert "running; 2 of 10 rounds done; round 3 at work; 2.0 MB down, 1.0 MB up" in done.out
    assert "epsilon spent" in done.out and "2.00" in done.out and "0.25" in done.out
    assert "epsilon 3.00 spent, 5.00 left" in done.out
    assert "never seen" in done.out and "2030-01-02" in done.out
    told = json.loads(call("status", "--to", tmp_path / "server.toml", "--json").out)
    assert told["run"]["asked"] == [] and told["clients"][1]["state"] == "online"


def test_a_run_whose_directory_nobody_noted_or_that_is_gone(
    server: ServerConfig, tmp_path: Path
) -> None:
    run = status(server).run
    assert run is not None and (run.run_id, run.directory, run.round) == (7, None, None)
    RunsFolder(server).note(7, tmp_path / "deleted")
    run = status(server).run
    assert run is not None and run.directory is not None and run.round is None
