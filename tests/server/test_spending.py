"""What a run's releases amount to, as far as clients tell."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from fake_grid import FakeGrid, Node
from flwr.app import Message

from fedgraft.adapter import Adapter, LoraLayer
from fedgraft.config import Config
from fedgraft.messages import HELLO, Hello, Reply
from fedgraft.run_directory import RunDirectory
from server.spending import Spending, told_by_clients
from server.summary import Bookkeeping
from strategies.roster import Roster
from strategies.rounds import ClientReport, RoundOutcome, StrategyState

STATE = StrategyState(Adapter({"q": LoraLayer(torch.ones(2, 3), torch.ones(4, 2), 2.0)}), 1)
PRIVATE = Config().with_overrides({"privacy.mode": "example", "privacy.noise-multiplier": 1.0})


def test_budgets_and_policies_may_be_told_and_nothing_else() -> None:
    """Budgets only where the clients' own data pay; a policy only by the client that it is of."""
    seen = RoundOutcome(
        STATE,
        reports={
            "0": ClientReport(1.0, {"epsilon": 1.5, "epsilon-left": math.inf, "loss": 0.3}),
            "1": ClientReport(1.0, {"steps": 2.0}),
        },
        failed={"2": "policy of client 2, tasks: no", "3": "policy of client 2, tasks: no"},
    )
    refused = {"2": {"policy": "policy of client 2, tasks: no"}}
    assert told_by_clients(Config(), seen) == refused
    keys = {"privacy.mode": "local", "privacy.noise-multiplier": 1.0}
    private = Config().with_overrides(keys)
    assert told_by_clients(private, seen) == refused | {"0": {"epsilon": 1.5, "epsilon-left": None}}


def spending(path: Path) -> Spending:
    return Spending(PRIVATE, RunDirectory.create(path, PRIVATE, "lineage"), None)


def outcome(told: dict[str, float | None], failed: dict[str, str]) -> RoundOutcome:
    """A round in which clients told an epsilon, or none, and others gave no update."""
    metrics: dict[str, dict[str, float]] = {
        name: {} if epsilon is None else {"epsilon": epsilon} for name, epsilon in told.items()
    }
    reports = {name: ClientReport(1.0, found) for name, found in metrics.items()}
    return RoundOutcome(STATE, sampled=[*told, *failed], reports=reports, failed=failed)


def client(name: str, **metrics: float) -> Node:
    def answers(message: Message) -> Any:
        hello = message.metadata.message_type == HELLO
        return Hello(name).encode() if hello else Reply(metrics=metrics).encode()

    return answers


def test_who_may_have_paid_and_left_without_a_word_leaves_epsilon_unknown(tmp_path: Path) -> None:
    """a tells; b fails in round 1 and is gone; c is refused by its policy and pays nothing."""
    reasons = {"b": "no reply within the deadline", "c": "policy of client c, tasks: no"}
    found = spending(tmp_path / "run")
    books = found.after_round(Bookkeeping(initial=0.5), outcome({"a": 1.5}, reasons))
    assert books.epsilon == 1.5 and list(books.owing) == ["b"]
    end = found.at_the_end(books, FakeGrid({7: client("a", epsilon=1.75)}), Roster(ours=True))
    assert (end.epsilon, end.untold) == (1.75, 1)
    back = FakeGrid({7: client("a", epsilon=1.75), 8: client("b", epsilon=2.5)})
    end = found.at_the_end(books, back, Roster(ours=True))
    assert (end.epsilon, end.untold) == (2.5, 0)
    assert found.told["b"] == {"epsilon": 2.5} and "policy" in found.told["c"]


def test_who_tells_later_owes_nothing_and_who_tells_and_leaves_has_told(tmp_path: Path) -> None:
    found = spending(tmp_path / "run")
    books = found.after_round(Bookkeeping(initial=0.5), outcome({"a": None}, {}))
    assert list(books.owing) == ["a"] and books.epsilon is None
    books = found.after_round(books, outcome({"a": 2.0}, {}))
    assert list(books.owing) == [] and books.epsilon == 2.0
    end = found.at_the_end(books, FakeGrid({}), Roster(ours=True))
    assert (end.epsilon, end.untold) == (2.0, 0)
