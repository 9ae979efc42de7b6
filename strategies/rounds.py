"""What a strategy tells its surroundings, round by round: state, outcome and hooks.

The strategy trains; whoever hosts it (FedGraft's ServerApp, or anybody's) evaluates, checkpoints
and tracks through `RoundHooks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedgraft.adapter import Adapter, Tensors
from fedgraft.privacy.events import Release
from strategies.diagnostics import AggregationBias
from strategies.signal import SignalToNoise


@dataclass(frozen=True)
class StrategyState:
    """All that the next round depends on; saving it is enough to resume bit for bit.

    Attributes:
        round: rounds done.
        adapter: the global adapter after them.
        rule: the rule's own named tensors.
        ranks: clients of a smaller rank than the adapter's, with that rank.
        holders: clients that hold what the rule sends only once, whose digest is `constants_hash`.
        counted: the last round in which each client's update was used.
        clips: under privacy by client, what each phase's contributions are clipped to next.
    """

    round: int
    adapter: Adapter
    rule: Tensors = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    holders: frozenset[str] = frozenset()
    constants_hash: str = ""
    counted: Mapping[str, int] = field(default_factory=dict)
    clips: tuple[float, ...] = ()


@dataclass(frozen=True)
class ClientReport:
    """One client's agreed numbers of a round: weight in examples, metrics by name."""

    examples: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundOutcome:
    """One round, as it went.

    Attributes:
        state: after the round.
        sampled: the clients asked, in natural order.
        reports: of the clients whose update was used, in natural order.
        failed: clients that gave no update, with the reason.
        refused: clients whose update was refused, with the reason.
        validation: every client's own evaluation of the new adapter; empty when not asked.
        test: every client's own test, where a part of the adapter never leaves the clients; before
            the first round.
        bytes_down, bytes_up: payload of arrays, over all messages of the round's training.
        bytes_evaluated: the same, of what clients were sent to evaluate.
        seconds: by phase (`train`, `aggregate`, `validate`).
        bias: None where single updates are not visible.
        notes: what the rule had to say.
        signal: by layer, how much of its change is noise, in a study of privacy by client.
    """

    state: StrategyState
    sampled: list[str] = field(default_factory=list)
    reports: dict[str, ClientReport] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    validation: dict[str, ClientReport] = field(default_factory=dict)
    test: dict[str, ClientReport] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    bytes_evaluated: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    bias: AggregationBias | None = None
    notes: tuple[str, ...] = ()
    signal: Mapping[str, SignalToNoise] = field(default_factory=dict)


class RoundHooks:
    """What may be done around rounds; every method does nothing unless overridden."""

    def durable_round(self) -> int:
        """Return the oldest round that the run could be resumed from."""
        return 0

    def on_start(self, outcome: RoundOutcome, descriptions: Mapping[str, str]) -> None:
        """See the state before the first round (also of a resumed run) and who is there."""

    def on_sampled(self, round: int, clients: list[str]) -> None:
        """See which clients were asked to train."""

    def on_reply(self, round: int, client: str, trouble: str) -> None:
        """See a client's reply arrive; `trouble` is empty when its update will be used."""

    def on_release(self, round: int, release: Release) -> None:
        """See what a round under privacy by client will release, before its clients are asked.

        Raise a BudgetSpentError to end the run instead.
        """

    def on_round(self, outcome: RoundOutcome) -> bool:
        """See a finished round; return True to stop."""
        return False

    def on_budget_spent(self, outcome: RoundOutcome) -> None:
        """See the last round there will be, since clients have no privacy budget for another."""

    def on_end(self, test: Mapping[str, ClientReport]) -> None:
        """See every client's own test after the last round, where the rule leaves parts on them."""
