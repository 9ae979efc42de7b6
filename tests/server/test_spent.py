"""What clients' data have spent, asked at the end of a private run."""

from __future__ import annotations

from fake_grid import Answer, FakeGrid, Node
from flwr.app import Error, Message

from fedgraft.messages import HELLO, SPENT, Hello, Reply
from server.spent import ask_spent
from strategies.roster import Roster


def client(name: str, answer: Answer) -> Node:
    def answers(message: Message) -> Answer:
        if message.metadata.message_type == HELLO:
            return Hello(name).encode()
        assert message.metadata.message_type == SPENT
        return answer

    return answers


def test_every_client_that_may_have_taken_part_counts() -> None:
    told = {
        "a": Reply(metrics={"epsilon": 2.5, "epsilon-left": 0.5, "loss": 1.0}).encode(),
        "b": Reply(metrics={}).encode(),  # its policy does not let the figure leave
        "c": Reply(refusal="the ledger is damaged").encode(),
        "d": Reply(refusal="policy of client d, tasks: task.name is 'digits'").encode(),
        "e": Error(1, "killed"),
        "f": None,
        "g": Reply(metrics={"epsilon": float("inf")}).encode(),
    }
    nodes = {at: client(name, answer) for at, (name, answer) in enumerate(told.items(), start=9)}
    found = ask_spent(FakeGrid(nodes), Roster(ours=True), enough=0, silence=0.2)
    nothing: dict[str, float] = {}
    assert found == {"a": {"epsilon": 2.5, "epsilon-left": 0.5}} | dict.fromkeys("bcefg", nothing)


def test_a_federation_that_has_left_tells_nothing() -> None:
    assert ask_spent(FakeGrid({}), Roster(ours=True), enough=0, silence=0.2) == {}
