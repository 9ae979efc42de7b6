"""What a task is: data in three splits, a model, a loss and a metric with its direction.

A task is built from a config and holds no model and no random state. Clients are numbered in a
simulation; how the training rows are dealt to them is the partition's business
(`fedgraft.tasks.partition`), the same for all tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedgraft.config import Config
from fedgraft.errors import ConfigError
from fedgraft.tasks.fingerprint import fingerprint
from fedgraft.tasks.questions import Question, Writing, as_it_stands

Direction = Literal["max", "min"]
"""Whether a larger or a smaller value of a metric is better."""
Batch = dict[str, Tensor]
"""Named tensors with the examples on the first axis, as the model's forward takes them."""


class Examples(Protocol):
    """Examples ready to be trained on: encoded once, picked by index many times."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> Batch:
        """Collate the examples at these indices, on the CPU."""
        ...


@dataclass(frozen=True)
class TensorExamples:
    """Examples of equal shape, held as tensors with the examples on the first axis."""

    tensors: Batch

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def batch(self, indices: np.ndarray) -> Batch:
        """Pick the examples at these indices."""
        picked = torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64))
        return {name: tensor[picked] for name, tensor in self.tensors.items()}


class Task(ABC):
    """One task of the registry `fedgraft.tasks`.

    Attributes:
        name: as `task.name` has it.
        metric: the metric that is watched and reported, a key of what `measure` returns; the
            class's own, or on an instance the one that `evaluate.metric` chooses.
        direction: whether a larger ("max") or smaller ("min") metric is better.
        peft_task_type: PEFT's TaskType for the adapter's config; None for none.
        default_targets: module names that LoRA attaches to unless `adapter.targets` says others.
        extras: modules that are trained whole beside the factors (PEFT's modules_to_save).
        evaluation_batch: examples a forward pass of an evaluation unless the config says other.
        packs: whether `train.packing` may lay several examples into one sequence.
    """

    name: ClassVar[str]
    metric: str
    direction: Direction
    peft_task_type: ClassVar[str | None] = None
    default_targets: list[str] | Literal["all-linear"] = "all-linear"
    extras: tuple[str, ...] = ()
    evaluation_batch: int = 256
    packs: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        if config.train.packing and not self.packs:
            raise ConfigError(
                f"train.packing is true, and examples of task {self.name} cannot be packed",
                "Set train.packing to false; packing is for causal-lm.",
            )
        self.config = config
        if (chosen := config.evaluate.metric) is not None:
            self.metric, self.direction = _watched(chosen, self.name, self.metrics())

    @abstractmethod
    def load_base(self) -> nn.Module:
        """Load the base model with its head, on the CPU, in `model.dtype`.

        Weights that the base does not bring (a new head) are drawn from a fixed named stream, so
        every machine holds the same base.

        Raises:
            ModelError: the folder or the Hub id cannot be loaded.
        """

    def structure(self) -> nn.Module | None:
        """Return the base's modules without their weights, to tell what it will take; or None."""
        return None

    def largest_batch(self, size: int) -> Batch:
        """Return a batch of so many examples, of the largest shape that can occur."""
        examples = self.train()
        return examples.batch(np.resize(np.arange(len(examples)), size))

    @abstractmethod
    def train(self, client: int | None = None) -> Examples:
        """Return one client's training examples; all clients' together for None."""

    @abstractmethod
    def validation(self, client: int | None = None) -> Examples:
        """Return the validation examples like one client's own; the whole split for None."""

    @abstractmethod
    def test(self, client: int | None = None) -> Examples:
        """Return the test examples like one client's own; the whole split for None.

        A run touches the test split twice: at the start and at the end.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss summed over what `count` counts, a scalar with a gradient."""

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """Return how many terms `loss` sums: examples, or tokens of a language model."""

    @abstractmethod
    def measure(self, model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
        """Return the metrics over all batches: at least `loss` (a mean) and `metric`.

        The caller has put the model in eval mode and switched gradients off.
        """

    def metrics(self) -> Mapping[str, Direction]:
        """Return what `evaluate.metric` may name: metrics of an evaluation, by their direction."""
        return {self.metric: self.direction}

    def questions(self, split: str, client: int | None, limit: int) -> Sequence[Question]:
        """Return the prompts of a split's first rows, with the responses that they have there.

        Args:
            split: "validation" or "test".
            client: whose rows; the whole split's for None.
            limit: so many at most.

        Raises:
            ConfigError: the task's model writes no text.
        """
        raise self._no_text()

    def writing(self) -> Writing:
        """Return what the model writes text with; raises as `questions` does."""
        raise self._no_text()

    def asked(self, prompt: str) -> Question:
        """Return a prompt as a question; raises as `questions` does."""
        return as_it_stands(prompt, self.writing().tokenizer)

    def _no_text(self) -> ConfigError:
        return ConfigError(
            f"task {self.name} writes no text, which evaluate.answers and evaluate.prompts ask for",
            "Leave both out, or use task causal-lm.",
        )

    def preparation(self) -> tuple[Any, ...]:
        """Return what prepares the base's inputs and is saved beside a merged model.

        Each has transformers' `save_pretrained`: a tokenizer, an image processor.
        """
        return ()

    def fingerprint(self, client: int) -> str:
        """Return what a privacy ledger knows a client's training data by.

        Of the examples as they are encoded; a task that has the rows as they were read takes those,
        which another encoding leaves as they are.
        """
        return fingerprint(self.train(client))

    def describe(self, client: int) -> str:
        """Say in a few words what one client's data is, for reports ("rotated +45")."""
        return ""

    def better(self, new: float, old: float | None) -> bool:
        """Whether a metric beats another one in this task's direction."""
        if old is None:
            return True
        return new > old if self.direction == "max" else new < old


def _watched(chosen: str, task: str, offered: Mapping[str, Direction]) -> tuple[str, Direction]:
    """Return the metric that `evaluate.metric` names, in its own spelling, and its direction.

    Raises:
        ConfigError: the task does not measure it.
    """
    name = chosen.replace("-", "_")
    if name not in offered:
        written = ", ".join(metric.replace("_", "-") for metric in offered)
        raise ConfigError(
            f"evaluate.metric is {chosen!r}, which task {task} does not measure",
            f"Set evaluate.answers to {written_as} with it."
            if (written_as := chosen.replace("_", "-")) in ("exact-match", "rouge-l")
            else f"Choose from {written}.",
        )
    return name, offered[name]
