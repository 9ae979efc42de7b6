"""How classifiers are trained and scored: cross-entropy over logits, and accuracy."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional

from fedgraft.tasks.task import Batch


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the class scores (n, classes) in float32; the batch is all inputs but `labels`."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits: Tensor = model(**inputs).logits
    return logits.float()


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy (nats) summed over the examples, a scalar with a gradient."""
    return functional.cross_entropy(logits_of(model, batch), batch["labels"], reduction="sum")


def accuracy_and_loss(model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
    """Return `accuracy` (a share) and `loss` (mean cross-entropy, nats) over at least one batch."""
    right = seen = 0
    loss = 0.0
    for batch in batches:
        logits = logits_of(model, batch)
        loss += float(functional.cross_entropy(logits, batch["labels"], reduction="sum"))
        right += int((logits.argmax(-1) == batch["labels"]).sum())
        seen += len(logits)
    return {"accuracy": right / seen, "loss": loss / seen}
