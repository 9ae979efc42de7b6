"""The run's own bookkeeping, and summary.json made of it and of rounds.jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, pstdev
from typing import Any

from fedgraft.adapter import natural_order
from fedgraft.config import Config
from fedgraft.privacy.account import EPSILON, EPSILON_LEFT
from fedgraft.tasks.task import Task
from server.tracking import finite


@dataclass(frozen=True)
class Bookkeeping:
    """What a run remembers from round to round, kept in its checkpoints.

    Attributes:
        initial: the test metric of the untouched start.
        initial_metrics: all test metrics of it.
        best_round: the round of the best validation metric so far.
        best: that metric.
        stale: evaluations since then.
        stopped_early: patience ran out.
        budget_spent: the clients' privacy budget ran out.
        epsilon: the largest that a client has told of so far; None without privacy.
        untold: clients that do not tell theirs.
        owing: clients that may have paid for a round without having told of it.
        wall_seconds: over all sessions, evaluation and checkpoints included.
        descriptions: what each client says its data is.
    """

    initial: float
    best_round: int = 0
    best: float | None = None
    stale: int = 0
    stopped_early: bool = False
    budget_spent: bool = False
    epsilon: float | None = None
    untold: int = 0
    owing: Sequence[str] = ()
    wall_seconds: float = 0.0
    descriptions: Mapping[str, str] = field(default_factory=dict)
    initial_metrics: Mapping[str, float] = field(default_factory=dict)

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
    final: Mapping[str, float],
    peak_memory: int,
    estimated_memory: int | None,
    privacy: Mapping[str, Any] | None = None,
    told: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return summary.json's content.

    Args:
        config: the resolved config.
        task: gives the metric and its direction.
        books: the run's bookkeeping after its last round.
        records: rounds.jsonl.
        final: the test metrics of the chosen adapter.
        peak_memory: of this process, in bytes.
        estimated_memory: what training was told to take, in bytes; None for small models.
        privacy: what the run promises, see `server.guarantee`.
        told: by clients, see `server.tracking.told_by_clients`.
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
        "final": final[task.metric],
        "test": {
            "initial": finite(books.initial_metrics),
            "final": finite(final),
        },
        "best_round": books.best_round,
        "validation_best": books.best,
        "stopped_early": books.stopped_early,
        "patience": config.evaluate.patience,
        "budget_spent": books.budget_spent,
        "bytes_up": _bytes(records, "bytes_up"),
        "bytes_down": _bytes(records, "bytes_down"),
        "bytes_evaluated": _bytes(records, "bytes_evaluated"),
        "wall_seconds": round(books.wall_seconds, 3),
        "train_seconds": _seconds(records, "train"),
        "aggregate_seconds": _seconds(records, "aggregate"),
        "client_steps": int(sum(_client_values(records, "steps"))),
        "epsilon": None if privacy is None else privacy["epsilon"],
        "delta": None if privacy is None else privacy["delta"],
        "privacy": None if privacy is None else dict(privacy),
        "client_epsilon": _told(told, EPSILON, EPSILON_LEFT),
        "policy_refusals": {n: said["policy"] for n, said in _told(told, "policy").items()},
        "peak_memory_bytes": peak_memory,
        "estimated_memory_bytes": estimated_memory,
        "refused_updates": sum(len(record["refused"]) for record in records),
        "failed_clients": sum(len(record["failed"]) for record in records),
        "client_descriptions": dict(books.descriptions),
        "client_examples": _examples(records),
        "validation_examples": _validation_examples(records),
        "client_metric": client_metric(records, books.best_round, task),
    }


def client_metric(
    records: Iterable[Mapping[str, Any]], round: int, task: Task
) -> dict[str, Any] | None:
    """Return how far apart the clients are: their own validation metric in one round.

    Args:
        records: rounds.jsonl.
        round: the round of the chosen adapter.
        task: gives the metric and its direction.

    Returns:
        The worst client and the best with their values, and mean and standard deviation over
        clients, each counted once; None where no client evaluated.
    """
    clients: Mapping[str, Any] = next((r["clients"] for r in records if r["round"] == round), {})
    values = {
        name: float(value)
        for name, client in clients.items()
        if (value := (client.get("validation") or {}).get(task.metric)) is not None
        and math.isfinite(value)
    }
    if not values:
        return None
    lowest, highest = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    worst, best = (lowest, highest) if task.direction == "max" else (highest, lowest)
    return {
        "clients": len(values),
        "worst_client": worst,
        "worst": values[worst],
        "best_client": best,
        "best": values[best],
        "mean": fmean(values.values()),
        "sd": pstdev(values.values()),
    }


def _told(told: Mapping[str, Mapping[str, Any]] | None, *keys: str) -> dict[str, dict[str, Any]]:
    """Return those keys of what clients told, of the clients that told any of them."""
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(told or {}, key=natural_order):
        kept = {key: value for key, value in (told or {})[name].items() if key in keys}
        found |= {name: kept} if kept else {}
    return found


def _validation_examples(records: Sequence[Mapping[str, Any]]) -> int | None:
    """Return how many examples the rounds were watched on."""
    counts = [(record["validation"] or {}).get("examples") for record in records]
    return next((int(count) for count in reversed(counts) if count is not None), None)


def _examples(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the training examples of every client that has trained, as it last said."""
    found: dict[str, int] = {}
    for record in records:
        found |= {n: int(c["examples"]) for n, c in record["clients"].items() if "examples" in c}
    return {name: found[name] for name in sorted(found, key=natural_order)}


def _bytes(records: Iterable[Mapping[str, Any]], key: str) -> int | None:
    """Return the traffic of all rounds; None where they keep it back."""
    counts = [record.get(key, 0) for record in records]  # a run resumed from an older version
    return None if None in counts else sum(counts)


def _seconds(records: Iterable[Mapping[str, Any]], phase: str) -> float | None:
    """Return the seconds of a phase in all rounds; None where they keep them back."""
    spent = [record["seconds"][phase] for record in records if phase in record["seconds"]]
    return round(sum(spent), 3) if spent else None


def _client_values(records: Iterable[Mapping[str, Any]], name: str) -> Iterable[float]:
    for record in records:
        for client in record["clients"].values():
            yield client.get(name) or 0.0
