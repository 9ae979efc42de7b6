"""How classifiers are trained and scored: cross-entropy over logits, accuracy and F1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedgraft.tasks.task import Batch, Direction

CLASSIFIER_METRICS: Mapping[str, Direction] = {"accuracy": "max", "macro_f1": "max", "loss": "min"}
"""What `evaluate.metric` may name for a classifier."""
MOST_CLASSES = 20
"""Of more classes than these no single F1 is reported."""


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the class scores (n, classes) in float32; the batch is all inputs but `labels`."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits: Tensor = model(**inputs).logits
    return logits.float()


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy (nats) summed over the examples, a scalar with a gradient."""
    return functional.cross_entropy(logits_of(model, batch), batch["labels"], reduction="sum")


def score_classes(
    model: nn.Module, batches: Iterator[Batch], names: Sequence[str]
) -> dict[str, float]:
    """Return accuracy, macro F1, loss and, for up to 20 classes, each one's F1 as `f1[name]`.

    All of them are of the whole split, not means over batches. A class's F1 is
    2 TP / (2 TP + FP + FN); macro F1 is the mean over the classes that occur among labels or
    predictions, so one that a small split lacks does not count as 0.

    Args:
        model: a classifier.
        batches: one at least.
        names: of the classes, in the order of their numbers.
    """
    loss = 0.0
    hits, guessed, actual = torch.zeros((3, len(names)), dtype=torch.int64)
    for batch in batches:
        logits, labels = logits_of(model, batch), batch["labels"]
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
        guesses = logits.argmax(-1)
        hits += _counts(labels[guesses == labels], len(names))
        guessed += _counts(guesses, len(names))
        actual += _counts(labels, len(names))
    seen = int(actual.sum())
    f1 = {
        name: 2 * int(hits[k]) / total
        for k, name in enumerate(names)
        if (total := int(guessed[k] + actual[k]))
    }
    scores = {
        "accuracy": int(hits.sum()) / seen,
        "macro_f1": sum(f1.values()) / len(f1),
        "loss": loss / seen,
    }
    if len(names) <= MOST_CLASSES:
        scores |= {f"f1[{name}]": value for name, value in f1.items()}
    return scores


def _counts(numbers: Tensor, classes: int) -> Tensor:
    return torch.bincount(numbers, minlength=classes).cpu()
