"""The final adapter handed out: to every client that is there, with the reason where it failed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_grid import Answer, FakeGrid
from flwr.app import Error, Message

from fedgraft.adapter import PREFIX
from fedgraft.files import write_tensors, write_text
from fedgraft.messages import HELLO, FinalAdapter, Hello, Reply
from fedgraft.parcel import pack
from server.handout import hand_out
from strategies.roster import Roster

A = f"{PREFIX}layer.lora_A.weight"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    write_tensors(tmp_path / "adapter_model.safetensors", {A: torch.ones(2, 3)})
    write_text(tmp_path / "adapter_config.json", "{}")
    write_text(tmp_path / "README.md", "card")
    return tmp_path


class Keeper:
    """A client that answers what it is given with `answer`."""

    def __init__(self, name: str, answer: Answer) -> None:
        self.name, self.answer = name, answer
        self.given: list[FinalAdapter] = []

    def __call__(self, message: Message) -> Answer:
        if message.metadata.message_type == HELLO:
            return Hello(self.name).encode()
        self.given.append(FinalAdapter.decode(message.content))
        return self.answer


def test_who_keeps_it_and_who_does_not_is_told(adapter: Path) -> None:
    kept = Reply().encode()
    clients = [
        Keeper("10", kept),
        Keeper("2", kept),
        Keeper("bad", Reply(refusal="no room").encode()),
        Keeper("dead", Error(1, "killed")),
        Keeper("mute", None),
    ]
    grid = FakeGrid(dict(enumerate(clients, start=100)))
    found = hand_out(grid, Roster(ours=True), adapter, "abc", enough=0, silence=0.2)
    assert found.kept == ["2", "10"]
    assert found.missed == {"bad": "no room", "dead": "killed", "mute": "no reply"}
    (parcel,) = pack(clients[0].given[0].arrays).values()
    assert found.bytes_down == 5 * len(parcel.data)
    (given,) = clients[0].given
    assert (given.settings, given.card, given.lineage) == ("{}", "card", "abc")


def test_a_federation_that_has_left_is_no_error(adapter: Path) -> None:
    found = hand_out(FakeGrid({}), Roster(ours=True), adapter, "abc", enough=0, silence=0.2)
    assert (found.kept, found.missed, found.bytes_down) == ([], {}, 0)
