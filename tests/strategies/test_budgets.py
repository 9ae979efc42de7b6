"""Clients whose privacy budget is spent: the run goes on without them, and ends without any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from fake_grid import NAMES, Answer, Client, FakeGrid, Seen, nodes, run

from fedgraft.errors import BUDGET, BudgetSpentError, ConfigError, RunError
from fedgraft.messages import Reply, TrainRequest
from strategies.rounds import RoundOutcome

SPENT = f"{BUDGET}: this round would bring epsilon to 3.1, and privacy.target-epsilon is 3"


@dataclass
class Budgeted(Client):
    """Refuses from a round on, for the budget or for another reason."""

    until: int = 0
    reason: str = SPENT

    def reply(self, request: TrainRequest) -> Answer:
        if request.round > self.until:
            return Reply(refusal=self.reason).encode()
        return super().reply(request)


@dataclass
class Told(Seen):
    """Keeps the outcome that the run ended with for budgets."""

    ended: RoundOutcome | None = None

    def on_budget_spent(self, outcome: RoundOutcome) -> None:
        self.ended = outcome


def budgets(*until: int, reason: str = SPENT) -> FakeGrid:
    """A grid of clients that refuse after these rounds, the last for `reason`."""
    clients: dict[str, Callable[..., Any] | Budgeted] = {
        f"c{name}": Budgeted(name, until=last) for name, last in zip(NAMES, until, strict=True)
    }
    clients[f"c{NAMES[-1]}"] = Budgeted(NAMES[-1], until=until[-1], reason=reason)
    return FakeGrid(nodes(**clients))


def test_the_run_goes_on_while_one_has_something_left_and_then_ends() -> None:
    seen = run(grid=budgets(1, 1, 3, 2), rounds=9, hooks=Told())
    assert [outcome.state.round for outcome in seen.outcomes] == [0, 1, 2, 3]
    assert [list(outcome.reports) for outcome in seen.outcomes[1:]] == [
        list("0123"),
        list("23"),
        ["2"],
    ]
    assert seen.last.failed == {"0": SPENT, "1": SPENT, "3": SPENT}
    assert isinstance(seen, Told) and seen.ended is seen.last


def test_too_few_for_min_clients_is_an_end_too() -> None:
    seen = run(grid=budgets(1, 1, 9, 9), rounds=9, min_clients=3, hooks=Told())
    assert [outcome.state.round for outcome in seen.outcomes] == [0, 1]


def test_another_reason_beside_it_is_an_error() -> None:
    with pytest.raises(RunError, match="round 2: 0 usable updates") as caught:
        run(grid=budgets(1, 1, 1, 1, reason="the disk is full"), rounds=9)
    assert not isinstance(caught.value, BudgetSpentError)
    assert "client 3: the disk is full" in caught.value.message


def test_a_lifetime_that_is_spent_is_an_end_too() -> None:
    """Of the client that says so, and of no other one that it names."""
    own = "policy of client 3, lifetime-epsilon: epsilon is at 4, and 4 is all that these data ..."
    seen = run(grid=budgets(1, 1, 1, 1, reason=own), rounds=9, hooks=Told())
    assert isinstance(seen, Told) and seen.ended is seen.last and seen.last.state.round == 1
    with pytest.raises(BudgetSpentError) as caught:
        run(grid=budgets(0, 0, 0, 0, reason=own), rounds=9)
    assert caught.value.message.endswith(f"{BUDGET} of client 0, 1, 2, 3; {own}")
    for other in (own.replace("client 3", "client 2"), own.replace("lifetime-epsilon", "tasks")):
        with pytest.raises(RunError) as failed:
            run(grid=budgets(1, 1, 1, 1, reason=other), rounds=9)
        assert not isinstance(failed.value, BudgetSpentError)


def test_policies_that_all_refuse_are_a_matter_of_the_config() -> None:
    """Another try would do no better, as it might where one client has another reason."""
    reasons = {name: f"policy of client {name}, tasks: digits is not allowed" for name in NAMES}

    def grid() -> FakeGrid:
        clients = {f"c{name}": Budgeted(name, reason=why) for name, why in reasons.items()}
        return FakeGrid(nodes(**clients))

    with pytest.raises(ConfigError, match=r"round 1: 0 usable updates.*policy of client 2, tasks"):
        run(grid=grid(), rounds=2)
    reasons["0"] = "the disk is full"
    with pytest.raises(RunError, match="the disk is full"):
        run(grid=grid(), rounds=2)


def test_a_run_without_any_round_says_so() -> None:
    with pytest.raises(BudgetSpentError, match=r"the privacy budget is spent of client 0, 1, 2, 3"):
        run(grid=budgets(0, 0, 0, 0), rounds=9)
