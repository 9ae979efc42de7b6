"""What a run's releases amount to: by the server's own ledger, or as its clients tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flwr.serverapp import Grid

from fedgraft.config import Config
from fedgraft.errors import BUDGET, POLICY
from fedgraft.privacy.account import EPSILON, EPSILON_LEFT
from fedgraft.run_directory import RunDirectory
from server.client_privacy import PrivateFederation
from server.spent import ask_spent
from server.summary import Bookkeeping
from server.tracking import finite
from strategies.roster import Roster
from strategies.rounds import RoundOutcome


class Spending:
    """Keeps a run's books of epsilon, and clients.json.

    Args:
        config: the run's.
        directory: where clients.json lies, from an earlier session maybe.
        private: holds the server's own ledger, under privacy by client.

    Attributes:
        told: what clients last told, see `told_by_clients`.
    """

    def __init__(
        self, config: Config, directory: RunDirectory, private: PrivateFederation | None
    ) -> None:
        self._config = config
        self._directory = directory
        self._private = private
        self.told = directory.clients()

    def after_round(self, books: Bookkeeping, outcome: RoundOutcome) -> Bookkeeping:
        """Return the books with what a round has cost, as far as that is known.

        What clients tell is no secret in any mode: budgets are told in those in which the server
        may know who was asked, and of a client whose policy refuses nothing has been released.
        """
        self._keep(told_by_clients(self._config, outcome))
        if self._private is not None:
            return replace(books, epsilon=self._private.account.epsilon())
        if not self._config.privacy.against_server:
            return books
        owing = set(books.owing)
        told: list[float | None] = [books.epsilon]
        for name in outcome.sampled:
            report = outcome.reports.get(name)
            reason = outcome.failed.get(name, "")
            if report is not None and EPSILON in report.metrics:
                told.append(report.metrics[EPSILON])
                owing.discard(name)
            elif not reason.startswith((POLICY, BUDGET)):  # which say that nothing was paid
                owing.add(name)
        return replace(books, epsilon=_largest(told), owing=sorted(owing))

    def at_the_end(self, books: Bookkeeping, grid: Grid, roster: Roster) -> Bookkeeping:
        """Return the books with what ledgers hold now, rounds without a result included."""
        if self._private is not None:
            return replace(books, epsilon=self._private.account.epsilon())
        if not self._config.privacy.against_server:
            return books
        told = ask_spent(grid, roster, enough=self._config.federation.min_clients)
        self._keep(told)
        silent = {name for name, said in told.items() if EPSILON not in said}
        untold = len(silent | (set(books.owing) - told.keys()))
        spent = [books.epsilon, *(said.get(EPSILON) for said in told.values())]
        return replace(books, epsilon=_largest(spent), untold=untold)

    def _keep(self, found: Mapping[str, Mapping[str, Any]]) -> None:
        new = {name: {**self.told.get(name, {}), **said} for name, said in found.items() if said}
        if new:
            self.told |= new
            self._directory.write_clients(self.told)


def told_by_clients(config: Config, outcome: RoundOutcome) -> dict[str, dict[str, Any]]:
    """Return what clients told in a round that anybody may know, as clients.json holds it.

    Args:
        config: the run's.
        outcome: the round.

    Returns:
        By client `epsilon` and `epsilon-left`, where its data pay for the run and it tells them,
        and `policy`, the clause that it refused the round by; None is more than any number.
    """
    found: dict[str, dict[str, Any]] = {}
    if config.privacy.against_server:
        for name, report in outcome.reports.items():
            budget = {k: v for k, v in report.metrics.items() if k in (EPSILON, EPSILON_LEFT)}
            if budget:
                found[name] = dict(finite(budget))
    for name, reason in outcome.failed.items():
        if reason.startswith(f"{POLICY} {name}, "):
            found[name] = {"policy": reason}
    return found


def _largest(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
