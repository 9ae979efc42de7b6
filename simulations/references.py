"""The reference rows of a comparison: what a federation's results are to be read against.

Base: the untouched model. Alone: each client trains only on its own data, rounds x steps optimizer
steps of its batch size, its optimizer kept (mean and range over clients). Centralised: the pooled
data, rounds x steps optimizer steps, each on as many examples as all sampled clients see in one
step, its optimizer kept: the same optimizer steps and examples as the federation, an upper bound.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from client.trainer import Assignment, train
from fedgraft.adapter import Adapter
from fedgraft.config import Config, TrainConfig
from fedgraft.generation import evaluate
from fedgraft.resident_model import ResidentModel, resident_model, resident_task
from fedgraft.tasks.task import Examples, Task
from strategies.sampling import sample_size

_BASE = (
    "task",
    "model",
    "evaluate.fraction",
    "evaluate.samples",
    "evaluate.metric",
    "evaluate.answers",
    "evaluate.answer-samples",
    "evaluate.max-new-tokens",
)
_TRAINED = (
    *_BASE,
    "adapter.type",
    "adapter.rank",
    "adapter.alpha",
    "adapter.rank-pattern",
    "adapter.alpha-pattern",
    "adapter.dropout",
    "adapter.targets",
    "adapter.init",
    "federation.clients",
    "federation.rounds",
    "federation.partition",
    "federation.concentration",
    "federation.partition-column",
    "train",
)
_DEPENDS_ON = {
    "base": _BASE,
    "alone": _TRAINED,
    "centralised": (*_TRAINED, "federation.fraction"),
}
NAMES = tuple(_DEPENDS_ON)
_TUNED = (
    "adapter.type",
    "adapter.alpha",
    "adapter.alpha-pattern",
    "adapter.dropout",
    "adapter.init",
    "train.lr",
    "train.lr-ratio",
    "train.optimizer",
    "train.optimizer-state",
    "train.momentum",
    "train.weight-decay",
    "train.schedule",
    "train.proximal-mu",
    "train.grad-clip",
    "train.micro-batch",
)
"""How a strategy trains best, and not what it has to train on, how long and with how many weights:
set for one strategy, these make no reference row of its own."""


def depends_on(name: str, key: str) -> bool:
    """Whether a reference row depends on a config key, other than the seed."""
    return any(key == known or key.startswith(f"{known}.") for known in _DEPENDS_ON[name])


def is_tuned(key: str) -> bool:
    """Whether a config key is a matter of taste that a strategy may have of its own."""
    return key in _TUNED


def reference(name: str, config: Config) -> dict[str, Any]:
    """Compute one reference row, on the test split.

    Args:
        name: "base", "alone" or "centralised".
        config: the federation that the row stands beside; seed and data are its own.

    Returns:
        An entry of comparison.json's "references"; `low` and `high` are the range over clients.

    Raises:
        FedGraftError: training failed.
    """
    task = resident_task(config)
    model = resident_model(task, config)
    row: dict[str, Any] = {"name": name, "seed": config.seed, "metric": task.metric}
    start = model.initial_adapter(config.seed)
    if name == "base":
        return row | {"final": _test(model, task, start)}
    if name == "centralised":
        sampled = sample_size(config.federation.fraction, config.federation.clients)
        settings = config.train.model_copy(update={"batch_size": config.train.batch_size * sampled})
        return row | {"final": _long(model, task, start, config, settings, task.train(), "pooled")}
    finals = [
        _long(model, task, start, config, config.train, task.train(client), str(client))
        for client in range(config.federation.clients)
    ]
    return row | {"final": fmean(finals), "low": min(finals), "high": max(finals)}


def _long(
    model: ResidentModel,
    task: Task,
    start: Adapter,
    config: Config,
    settings: TrainConfig,
    examples: Examples,
    client: str,
) -> float:
    """Train once for as many optimizer steps as the federation takes, then test."""
    steps = config.federation.rounds * _steps_a_round(task, config)
    trained = train(
        model,
        task,
        examples,
        start,
        Assignment(
            settings=settings.model_copy(update={"steps": steps, "epochs": None}),
            seed=config.seed,
            round=1,
            rounds=1,
            client=client,
        ),
    )
    return _test(model, task, start.with_tensors(trained.tensors))


def _steps_a_round(task: Task, config: Config) -> int:
    """Return a client's optimizer steps a round; the mean over clients where epochs are set."""
    clients = range(config.federation.clients)
    return round(fmean(config.train.steps_for(len(task.train(client))) for client in clients))


def _test(model: ResidentModel, task: Task, adapter: Adapter) -> float:
    return evaluate(model, task, adapter, "test")[task.metric]
