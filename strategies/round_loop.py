"""The loop over rounds: what Flower's `Strategy.start` is in its own strategies.

Flower's loop has no first round, no hooks, and holds every reply in memory; this one has the first
two, and gives replies to the strategy as they arrive.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedgraft.errors import BudgetSpentError
from fedgraft.messages import array_bytes
from strategies.replies import mean_metrics
from strategies.roster import exchange
from strategies.rounds import ClientReport, RoundOutcome, StrategyState

if TYPE_CHECKING:
    from strategies.strategy import AdapterStrategy

log = logging.getLogger(__name__)


@dataclass
class RoundLoop:
    """One call of `AdapterStrategy.start`.

    Attributes:
        strategy: configures, aggregates and holds the state.
        grid: carries the messages.
        last: the last round's number.
        deadline: seconds to wait for clients and for replies.
        train_config, evaluate_config: passed on to the clients.
        evaluate_fn: the caller's own evaluation of the whole adapter, if there is one.
        result: what Flower's caller gets.
    """

    strategy: AdapterStrategy
    grid: Grid
    last: int
    deadline: float
    train_config: ConfigRecord
    evaluate_config: ConfigRecord
    evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None
    result: Result = field(default_factory=Result)
    _evaluated: int = 0  # bytes sent to be evaluated in this round

    def run(self, state: StrategyState, *, new: bool) -> Result:
        """Go from a state to the last round, or until a hook or the clients' budgets say stop.

        Args:
            state: to start from.
            new: it is no resume, so the clients' ranks are given out first.

        Raises:
            RunError: too few clients connected, or too few usable updates in a round.
        """
        strategy = self.strategy
        strategy.adopt(state)
        strategy.roster.wait(self.grid, strategy.clients, self.deadline)
        if new:
            state = replace(state, ranks=strategy.smaller_ranks(state.adapter))
            strategy.adopt(state)
        self.result.arrays = strategy.current_arrays()
        self._evaluate_centrally(state.round)
        self._evaluated = 0
        validation = self._validate(state.round) if strategy.evaluate_every else {}
        test = self._test(state.round)
        before = RoundOutcome(
            state, validation=validation, test=test, bytes_evaluated=self._evaluated
        )
        strategy.hooks.on_start(before, strategy.roster.descriptions)
        outcome = before
        for round in range(state.round + 1, self.last + 1):
            try:
                outcome = self._round(round)
            except BudgetSpentError as error:
                if round == 1:  # nothing has come of the run
                    raise
                log.warning("%s: the run ends with what it has", error.message)
                strategy.hooks.on_budget_spent(outcome)
                break
            self._evaluate_centrally(round)
            if strategy.hooks.on_round(outcome):
                break
        strategy.hooks.on_end(self._test(strategy.state.round))
        return self.result

    def _round(self, round: int) -> RoundOutcome:
        strategy = self.strategy
        began = time.perf_counter()
        arrays = strategy.current_arrays()
        messages = strategy.configure_train(round, arrays, self.train_config, self.grid)
        replies = self._timed(messages, began)
        made, metrics = strategy.aggregate_train(round, replies)
        assert made is not None
        self.result.arrays = made
        if metrics is not None:
            self.result.train_metrics_clientapp[round] = metrics
        began = time.perf_counter()
        self._evaluated = 0
        validation = {}
        every = strategy.evaluate_every
        if every and (round % every == 0 or round == self.last):
            validation = self._validate(round)
        seconds = strategy.outcome.seconds | {"validate": time.perf_counter() - began}
        return replace(
            strategy.outcome,
            validation=validation,
            bytes_evaluated=self._evaluated,
            seconds=seconds,
        )

    def _timed(self, messages: Iterable[Message], began: float) -> Iterator[Message]:
        """Yield the replies, and note the seconds once the last one has come."""
        yield from exchange(self.grid, messages, self.deadline)
        self.strategy.note_seconds("train", time.perf_counter() - began)

    def _validate(self, round: int) -> dict[str, ClientReport]:
        strategy = self.strategy
        messages = strategy.configure_evaluate(
            round, strategy.current_arrays(), self.evaluate_config, self.grid
        )
        reports = self._reports(round, messages)
        metrics = mean_metrics(reports)
        if metrics is not None:
            self.result.evaluate_metrics_clientapp[round] = metrics
        return reports

    def _test(self, round: int) -> dict[str, ClientReport]:
        """Let every client test what it holds, where a part of that never leaves it."""
        strategy = self.strategy
        if not strategy.rule.capabilities.personal:
            return {}
        messages = strategy.ask(
            round, strategy.state, self.evaluate_config, self.grid, split="test"
        )
        return self._reports(round, messages)

    def _reports(self, round: int, messages: Iterable[Message]) -> dict[str, ClientReport]:
        asked = list(messages)
        self._evaluated += sum(array_bytes(message.content) for message in asked)
        return self.strategy.reports(round, exchange(self.grid, asked, self.deadline))

    def _evaluate_centrally(self, round: int) -> None:
        if self.evaluate_fn is None:
            return
        metrics = self.evaluate_fn(round, self.strategy.current_arrays())
        if metrics is not None:
            self.result.evaluate_metrics_serverapp[round] = metrics
