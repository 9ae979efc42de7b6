"""The run's own bookkeeping, and summary.json made of it and of rounds.jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fedgraft.config import Config
from fedgraft.tasks.task import Task


@dataclass(frozen=True)
class Bookkeeping:
    """What a run remembers from round to round, kept in its checkpoints.

    Attributes:
        initial: the test metric of the untouched start.
        best_round: the round of the best validation metric so far.
        best: that metric.
        stale: evaluations since then.
        stopped_early: patience ran out.
        wall_seconds: over all sessions, evaluation and checkpoints included.
        descriptions: what each client says its data is.
    """

    initial: float
    best_round: int = 0
    best: float | None = None
    stale: int = 0
    stopped_early: bool = False
    wall_seconds: float = 0.0
    descriptions: Mapping[str, str] = field(default_factory=dict)

    def after_evaluation(self, task: Task, round: int, metric: float) -> Bookkeeping:
        """Return the books after a validation; a tie keeps the earlier round, NaN is no best."""
        if math.isfinite(metric) and task.better(metric, self.best):
            return replace(self, best_round=round, best=metric, stale=0)
        return replace(self, stale=self.stale + 1)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def strategy_label(config: Config) -> str:
    """Return what tables call this run's strategy: its name and the options that were set."""
    options = ", ".join(f"{key}={value}" for key, value in sorted(config.strategy.options.items()))
    return config.strategy.name + (f" ({options})" if options else "")


def summarise(
    config: Config,
    task: Task,
    books: Bookkeeping,
    records: Sequence[Mapping[str, Any]],
    final: float,
    peak_memory: int,
) -> dict[str, Any]:
    """Return summary.json's content.

    Args:
        config: the resolved config.
        task: gives the metric and its direction.
        books: the run's bookkeeping after its last round.
        records: rounds.jsonl.
        final: the test metric of the chosen adapter.
        peak_memory: of this process, in bytes.
    """
    return {
        "strategy": config.strategy.name,
        "label": strategy_label(config),
        "task": config.task.name,
        "seed": config.seed,
        "rounds": records[-1]["round"] if records else 0,
        "clients": config.federation.clients,
        "metric": task.metric,
        "direction": task.direction,
        "initial": books.initial,
        "final": final,
        "best_round": books.best_round,
        "validation_best": books.best,
        "stopped_early": books.stopped_early,
        "patience": config.evaluate.patience,
        "bytes_up": sum(record["bytes_up"] for record in records),
        "bytes_down": sum(record["bytes_down"] for record in records),
        "wall_seconds": round(books.wall_seconds, 3),
        "train_seconds": _seconds(records, "train"),
        "aggregate_seconds": _seconds(records, "aggregate"),
        "client_steps": int(sum(_client_values(records, "steps"))),
        "epsilon": None,
        "delta": None,
        "peak_memory_bytes": peak_memory,
        "refused_updates": sum(len(record["refused"]) for record in records),
        "failed_clients": sum(len(record["failed"]) for record in records),
        "client_descriptions": dict(books.descriptions),
    }


def _seconds(records: Iterable[Mapping[str, Any]], phase: str) -> float:
    total: float = sum(record["seconds"].get(phase, 0.0) for record in records)
    return round(total, 3)


def _client_values(records: Iterable[Mapping[str, Any]], name: str) -> Iterable[float]:
    for record in records:
        for client in record["clients"].values():
            yield client.get(name) or 0.0
