"""What a ledger says was spent: by data and by run, and what a budget leaves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from fedgraft.privacy.accounting import ADJACENCY, Accountant, epsilon
from fedgraft.privacy.events import Release
from fedgraft.privacy.ledger import Entry, Ledger

MOST_ROUNDS = 1_000_000
"""Up to so many rounds are counted that a budget still has room for."""


def statement(
    ledger: Ledger, delta: float | None, budget: float | None, accountant: Accountant
) -> dict[str, Any]:
    """Return what a ledger holds, by data and run, as `fedgraft privacy --json` prints it.

    Args:
        ledger: an open ledger.
        delta: the guarantee's delta; None takes the smallest recorded one.
        budget: the epsilon that may be spent on each set of data, or None.
        accountant: "rdp" or "pld".

    Returns:
        `path`, `accountant`, `adjacency`, `delta`, `budget` and `data`: one object a fingerprint.
        Epsilon is null where it is infinite. `left` is the budget less what is spent, at least 0;
        `rounds_left` is how many more rounds as noisy as the last one it has room for.

    Raises:
        LedgerError: the ledger is damaged.
    """
    entries = ledger.entries
    if delta is None and entries:
        delta = min(entry.delta for entry in entries)
    by_data: dict[str, list[Entry]] = {}
    for entry in entries:
        by_data.setdefault(entry.fingerprint, []).append(entry)
    return {
        "path": str(ledger.path),
        "accountant": accountant,
        "adjacency": ADJACENCY,
        "delta": delta,
        "budget": budget,
        "data": [
            _about(fingerprint, found, delta, budget, accountant)
            for fingerprint, found in by_data.items()
            if delta is not None  # as it is where there is an entry
        ],
    }


def _about(
    fingerprint: str,
    entries: list[Entry],
    delta: float,
    budget: float | None,
    accountant: Accountant,
) -> dict[str, Any]:
    """Return what was released about one set of data."""
    by_run: dict[str, list[Entry]] = {}
    for entry in entries:
        by_run.setdefault(entry.run, []).append(entry)
    runs, releases = [], []
    for run, found in by_run.items():
        own = [entry.release for entry in found]
        releases += own
        runs.append(
            {
                "run": run,
                "rounds": len({entry.round for entry in found}),
                "first_round": min(entry.round for entry in found),
                "last_round": max(entry.round for entry in found),
                "first": min(entry.when for entry in found),
                "last": max(entry.when for entry in found),
                "modes": _distinct(entry.mode for entry in found),
                "units": _distinct(entry.unit for entry in found),
                "relations": _distinct(entry.relation for entry in found),
                "purposes": _distinct(entry.purpose for entry in found),
                "noise_multipliers": _distinct(r.noise_multipliers for r in own),
                "joint_noise_multipliers": _distinct(r.noise_multiplier for r in own),
                "sampling_rates": _distinct(r.sampling_rate for r in own),
                "releases": sum(release.count for release in own),
                "epsilon": _finite(epsilon(own, delta, accountant)),
                "epsilon_total": _finite(epsilon(releases, delta, accountant)),
            }
        )
    total = epsilon(releases, delta, accountant)
    last = [e.release for e in entries if (e.run, e.round) == (entries[-1].run, entries[-1].round)]
    return {
        "fingerprint": fingerprint,
        "protects": [
            {"mode": mode, "unit": unit, "relation": relation}
            for mode, unit, relation in _distinct((e.mode, e.unit, e.relation) for e in entries)
        ],
        "epsilon": _finite(total),
        "left": None if budget is None else max(0.0, budget - total),
        "over": budget is not None and total > budget,
        "rounds_left": None
        if budget is None
        else _rounds_left(releases, last, delta, budget, accountant),
        "runs": runs,
    }


def _rounds_left(
    spent: Sequence[Release],
    last: Sequence[Release],
    delta: float,
    budget: float,
    accountant: Accountant,
) -> int:
    """Return how many more rounds like the last one the budget has room for."""

    def fits(rounds: int) -> bool:
        more = [replace(release, count=release.count * rounds) for release in last]
        return epsilon([*spent, *more], delta, accountant) <= budget

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        if high >= MOST_ROUNDS:
            return MOST_ROUNDS
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
