"""A client's update is untrusted input: it is checked before it touches anything.

Flower's FedAvg takes any reply: one NaN poisons the mean, a wrong shape broadcasts, a negative
weight subtracts. Here a bad update is refused with the tensor and the reason, and the round goes on
with the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedgraft.errors import UpdateError

MAX_WEIGHT = 1e9
"""Examples above which a self-reported weight is taken for nonsense."""
_WIRE_TYPES = {torch.float32, torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class Expected:
    """What a valid update of this round looks like.

    Attributes:
        tensors: names and shapes, by the tensors that the round started from.
        max_norm: largest Euclidean norm over all tensors together.
    """

    tensors: Mapping[str, Tensor]
    max_norm: float

    def check(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Check an update.

        Raises:
            UpdateError: names the first tensor that is missing, extra, of a wrong shape or dtype,
                or not finite; or says that the weight or the norm is out of bounds.
        """
        check_weight(weight)
        for name in self.tensors:
            if name not in tensors:
                raise UpdateError(f"tensor {name!r} is missing")
        square = 0.0
        for name, tensor in tensors.items():
            if name not in self.tensors:
                raise UpdateError(f"tensor {name!r} is not part of the adapter")
            wanted = self.tensors[name]
            if tensor.shape != wanted.shape:
                raise UpdateError(
                    f"tensor {name!r} has shape {tuple(tensor.shape)}, not {tuple(wanted.shape)}"
                )
            if tensor.dtype not in _WIRE_TYPES | {wanted.dtype}:
                raise UpdateError(f"tensor {name!r} has dtype {tensor.dtype}, not {wanted.dtype}")
            # The sum of squares is finite exactly when every entry is, up to overflow in float64.
            norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
            if not math.isfinite(norm):
                raise UpdateError(f"tensor {name!r} holds NaN or Inf")
            square += norm**2
        if square > self.max_norm**2:
            raise UpdateError(
                f"its norm {math.sqrt(square):.3g} is absurd; the limit is {self.max_norm:.3g}"
            )


def check_weight(weight: float) -> None:
    """Check a self-reported number of examples.

    Raises:
        UpdateError: it is not a positive number, or more than `MAX_WEIGHT`.
    """
    if not math.isfinite(weight) or weight <= 0:
        raise UpdateError(f"its weight (num-examples) is {weight:g}, not a positive number")
    if weight > MAX_WEIGHT:
        raise UpdateError(f"its weight (num-examples) is {weight:g}, more than {MAX_WEIGHT:g}")


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm over all tensors together, in float64."""
    return math.sqrt(
        sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors.values())
    )
