"""Curves and bars over seeds, as plain numbers: what the plots draw and the report's tables say.

A curve is the mean over seeds with the lowest and highest seed beside it, at the rounds that every
seed has: where one seed stopped early, the curve ends with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from server.results import Run
from server.units import number

EXACT = 1e-6
"""A relative aggregation bias below this is round-off: the rule is exact."""


@dataclass(frozen=True)
class Curve:
    """A metric's mean over seeds, with the lowest and the highest seed, all of shape (points,)."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: int


@dataclass(frozen=True)
class ClientResult:
    """One client's validation metric over seeds, at the chosen round and at the start.

    Attributes:
        start: of the untouched adapter (round 0), NaN where it was not measured.
        examples: training examples, the mean over seeds; NaN where no round names them.
    """

    client: str
    description: str
    mean: float
    low: float
    high: float
    start: float
    examples: float


def metric_by_round(runs: Sequence[Run], metric: str) -> Curve:
    """Return the validation metric of one strategy's runs against the round."""
    values = [_validation(run, metric) for run in runs]
    shared = _shared(values)
    return _curve(np.array(shared, dtype=float), [[v[r] for r in shared] for v in values])


def metric_by_bytes(runs: Sequence[Run], metric: str) -> Curve:
    """Return the validation metric against the bytes sent so far, up and down, all clients."""
    values = [_validation(run, metric) for run in runs]
    shared = _shared(values)
    sent = [_sent(run) for run in runs]
    x = np.array([np.mean([by_round[r] for by_round in sent]) for r in shared])
    return _curve(x, [[v[r] for r in shared] for v in values])


def bias_by_round(
    runs: Sequence[Run], which: Literal["before", "after", "repairable", "removed"]
) -> Curve:
    """Return a round's relative aggregation bias, or a share of it.

    Args:
        runs: of one strategy.
        which: the bias before or after the rule's correction; the share of it that is repairable,
            or that the rule has removed (1 - after / before).

    Rounds where no seed knows it are NaN, a gap in the plot.
    """
    rounds = sorted({r for run in runs for r in run.rounds if r > 0})
    values = []
    for run in runs:
        records = [run.rounds.get(r, {}).get("aggregation_bias") or {} for r in rounds]
        if which == "removed":
            values.append([_removed(record) for record in records])
        else:
            values.append([number(record.get(which)) for record in records])
    return _curve(np.array(rounds, dtype=float), values)


def is_exact(runs: Sequence[Run]) -> bool:
    """Whether a rule's runs never had an aggregation bias above round-off."""
    after = bias_by_round(runs, "after").high
    return bool(np.isfinite(after).any() and np.nanmax(after) < EXACT)


def clients_at_chosen_round(runs: Sequence[Run], metric: str) -> dict[str, ClientResult]:
    """Return each client's validation metric at its run's chosen round, in natural order."""
    found: dict[str, list[float]] = {}
    starts: dict[str, list[float]] = {}
    examples: dict[str, list[float]] = {}
    descriptions: dict[str, set[str]] = {}
    for run in runs:
        chosen = _clients(run, int(run.summary["best_round"]), metric)
        start = _clients(run, 0, metric)
        described = run.summary.get("client_descriptions") or {}
        for client, value in chosen.items():
            found.setdefault(client, []).append(value)
            starts.setdefault(client, []).append(start.get(client, math.nan))
            descriptions.setdefault(client, set()).add(str(described.get(client) or ""))
        for record in run.rounds.values():
            for client, report in (record.get("clients") or {}).items():
                if "examples" in report:
                    examples.setdefault(client, []).append(number(report["examples"]))
    results = {}
    for client in sorted(found, key=natural):
        told = descriptions[client]
        results[client] = ClientResult(
            client=client,
            description=next(iter(told)) if len(told) == 1 else "",
            mean=float(np.mean(found[client])),
            low=min(found[client]),
            high=max(found[client]),
            start=float(np.mean(starts[client])),
            examples=float(np.mean(examples.get(client, [math.nan]))),
        )
    return results


def natural(name: str) -> tuple[int, int, str]:
    """Return a sort key that puts client 2 before client 10, and names after numbers."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _removed(record: Mapping[str, object]) -> float:
    before, after = number(record.get("before")), number(record.get("after"))
    return 1 - after / before if before > 0 else math.nan


def _validation(run: Run, metric: str) -> dict[int, float]:
    """Return a run's validation metric by round, only where it is finite."""
    values = {r: number((run.rounds[r].get("validation") or {}).get(metric)) for r in run.rounds}
    return {r: value for r, value in values.items() if math.isfinite(value)}


def _clients(run: Run, round: int, metric: str) -> dict[str, float]:
    reports = run.rounds.get(round, {}).get("clients") or {}
    values = {c: number((r.get("validation") or {}).get(metric)) for c, r in reports.items()}
    return {client: value for client, value in values.items() if math.isfinite(value)}


def _sent(run: Run) -> dict[int, float]:
    """Return the bytes sent, up and down, by the end of each round."""
    total = 0.0
    sent = {}
    for r in sorted(run.rounds):
        total += float(run.rounds[r].get("bytes_up") or 0) + float(
            run.rounds[r].get("bytes_down") or 0
        )
        sent[r] = total
    return sent


def _shared(values: Sequence[dict[int, float]]) -> list[int]:
    return sorted(set.intersection(*(set(by_round) for by_round in values)))


def _curve(x: np.ndarray, values: Sequence[Sequence[float]]) -> Curve:
    """Return the curve of values (seeds, points); NaN counts as absent."""
    table = np.array(values, dtype=float).reshape(len(values), len(x))
    known = np.isfinite(table)
    count = known.sum(axis=0)
    mean = np.where(known, table, 0.0).sum(axis=0) / np.where(count, count, 1)
    low = np.where(known, table, np.inf).min(axis=0)
    high = np.where(known, table, -np.inf).max(axis=0)
    gap = count == 0
    return Curve(
        x,
        np.where(gap, np.nan, mean),
        np.where(gap, np.nan, low),
        np.where(gap, np.nan, high),
        len(values),
    )
