"""What a watchdog is told of parts that run, start or are gone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import call

from deploy.client_config import ClientConfig
from deploy.lock import only_one
from fedgraft.files import write_json
from fedgraft.flower import free_port

CLIENT = """
server = "127.0.0.1:8000"
name = "north"
policy = "policy.toml"
state = "state"
[data]
path = "rows.jsonl"
"""


@pytest.fixture
def client(tmp_path: Path) -> ClientConfig:
    (tmp_path / "client.toml").write_text(CLIENT)
    return ClientConfig.load(tmp_path / "client.toml")


@contextmanager
def supervised(client: ClientConfig, only: str | None, **ready: bool) -> Iterator[None]:
    """What a supervisor leaves for others to read, held by a process that lives."""
    house = client.house(only)
    with only_one(house.lock, "client"):
        told = {
            name: {"pid": os.getpid(), "starts": 1, "ready": one} for name, one in ready.items()
        }
        write_json(house.parts, told)
        yield


def asked(client: ClientConfig) -> tuple[int, dict[str, str]]:
    done = call("status", "--client", client.state.parent / "client.toml", "--json")
    told = json.loads(done.out)
    assert told["good"] == (done.status == 0)
    return done.status, {one["part"]: one["text"] for one in told["parts"]}


def test_a_client_that_does_not_run_is_not_well(client: ClientConfig) -> None:
    status, told = asked(client)
    assert status == 1 and told["client"].startswith("it does not run on ")


def test_a_supervisor_that_was_killed_is_noticed(client: ClientConfig) -> None:
    with supervised(client, None, trainer=True, supernode=True):
        pass  # the lock is let go, and parts.json stays
    status, told = asked(client)
    assert status == 1 and list(told) == ["supervisor"]


def test_parts_that_run_apart_are_looked_at_each_in_its_folder(client: ClientConfig) -> None:
    with supervised(client, "supernode", supernode=True):
        assert asked(client) == (0, {"supernode": "ready"})
        with supervised(client, "trainer", trainer=False):
            assert asked(client) == (1, {"trainer": "starting", "supernode": "ready"})


def test_what_a_killed_client_left_does_not_count_beside_the_other_way_of_running(
    client: ClientConfig,
) -> None:
    with supervised(client, None, trainer=True, supernode=True):
        pass
    with supervised(client, "supernode", supernode=True):
        assert asked(client) == (0, {"supernode": "ready"})
    status, told = asked(client)
    assert status == 1 and list(told) == ["supervisor"]
    client.house().parts.unlink()
    with supervised(client, "trainer", trainer=False):  # and the SuperNode's was killed
        status, told = asked(client)
        assert status == 1 and told.keys() == {"trainer", "supervisor"}


def test_a_trainer_that_does_not_answer_is_not_well(client: ClientConfig) -> None:
    with supervised(client, "trainer", trainer=True):
        status, told = asked(client)
    assert status == 1 and told["trainer"] == "it does not answer: UNAVAILABLE"


def test_a_server_that_does_not_run_is_not_well(tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    path.write_text(f'keys = "KEYS"\nstate = "state"\nsuperlink-port = {free_port()}\n')
    done = call("status", "--to", path, "--parts")
    assert done.status == 1 and done.out.startswith("supervisor it does not run on ")
