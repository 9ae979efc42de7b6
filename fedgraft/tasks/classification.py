"""What text and image classification share: classes from labels, cross-entropy, accuracy."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fedgraft.config import Config
from fedgraft.errors import DataError
from fedgraft.tasks.base_models import head_modules, load_config, load_model, structure_of
from fedgraft.tasks.rows import RowsTask
from fedgraft.tasks.scoring import CLASSIFIER_METRICS, cross_entropy, score_classes
from fedgraft.tasks.task import Batch, Direction

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedConfig


class Classification(RowsTask):
    """One class an example, from a transformers model with a classification head.

    The classes are the labels of the whole task's training rows, in sorted order (as numbers where
    all of them are whole numbers). The head is trained whole and travels with the adapter; its
    modules, which depend on the architecture, are `extras`.
    """

    metric = "accuracy"
    direction: Direction = "max"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.base_config: PreTrainedConfig = load_config(config)
        self.extras = head_modules(self.auto_class(), self.base_config)

    @staticmethod
    @abstractmethod
    def auto_class() -> Any:
        """Return the auto class of transformers that loads this task's models."""

    @property
    @abstractmethod
    def label_column(self) -> str:
        """The column with the labels."""

    def load_base(self) -> nn.Module:
        """Load the base with a head for these classes; raises as `load_model` does."""
        names = [str(name) for name in self.classes]
        return load_model(
            self.auto_class(),
            self.config,
            heads=self.extras,
            id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
        )

    def structure(self) -> nn.Module:
        """Return the base's modules without weights; raises as `structure_of` does."""
        return structure_of(self.auto_class(), self.config, num_labels=len(self.classes))

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The labels of the training rows, in the order of their class numbers.

        Raises:
            DataError: there are fewer than two.
        """
        labels = set(self.tables["train"][self.label_column])
        if len(labels) < 2:
            raise DataError(
                f"every training row of {self.config.task.data} has the label {labels.pop()!r}",
                "Bring rows of two classes or more.",
            )
        if all(label.removeprefix("-").isdecimal() for label in labels):
            return tuple(sorted(labels, key=int))
        return tuple(sorted(labels))

    def targets(self, table: datasets.Dataset, split: str) -> NDArray[np.int64]:
        """Return each row's class number, (n,).

        Raises:
            DataError: a label that no training row has.
        """
        numbers: Mapping[str, int] = {name: number for number, name in enumerate(self.classes)}
        labels = list(table[self.label_column])
        unknown = sorted(set(labels) - set(numbers))
        if unknown:
            raise DataError(
                f"the {split} split of {self.config.task.data} has the label {unknown[0]!r}, "
                f"which no training row has (they have {', '.join(self.classes[:10])})",
                "Mend the label, or add training rows of that class.",
            )
        return np.array([numbers[label] for label in labels], dtype=np.int64)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy (nats) summed over the examples."""
        return cross_entropy(model, batch)

    def count(self, batch: Batch) -> int:
        """Return the number of examples."""
        return len(batch["labels"])

    def measure(self, model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
        """Return accuracy, macro F1, loss (mean cross-entropy in nats) and each class's F1."""
        return score_classes(model, batches, self.classes)

    def metrics(self) -> Mapping[str, Direction]:
        """Return what `evaluate.metric` may name."""
        return CLASSIFIER_METRICS
