"""A client's update is untrusted input: it is checked before it touches anything.

Flower's FedAvg takes any reply: one NaN poisons the mean, a wrong shape broadcasts, a negative
weight subtracts. Here a bad update is refused with the tensor and the reason, and the round goes on
with the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from fedgraft.adapter import Adapter, Tensors
from fedgraft.errors import UpdateError
from strategies.ranks import RankScaling, cut_factor, padded, ranks_of

ABSURD = 100.0
"""An update's norm may be so many times that of the global adapter (or 1), and what a rule sends
beside it so many times the round's median."""
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


@dataclass(frozen=True)
class Intake:
    """How the updates of one round are checked and put into the server's terms.

    Attributes:
        adapter: the global one that the round started from.
        names: the tensors that come up.
        max_norm: largest Euclidean norm over all tensors of an update.
        companions: shapes of what the rule sends beside them.
        ranks: of the clients whose rank is smaller than the server's.
        scaling: gives a smaller rank's scaling.
        prunes: a client may send factors of a smaller rank than it has.
        differences: what comes up are differences from the global adapter.
    """

    adapter: Adapter
    names: frozenset[str]
    max_norm: float
    companions: Mapping[str, tuple[int, ...]]
    ranks: Mapping[str, int]
    scaling: RankScaling
    prunes: bool = False
    differences: bool = False

    @property
    def sparse_entries(self) -> dict[str, int]:
        """How many entries a tensor may have that comes up written in bits, by name."""
        whole = self.adapter.tensors() if self.differences else {}
        return {name: tensor.numel() for name, tensor in whole.items()}

    def check(
        self,
        client: str,
        tensors: Mapping[str, Tensor],
        companions: Mapping[str, Tensor],
        weight: float,
    ) -> int | None:
        """Check an update; return the rank of its factors where it is not the server's.

        Raises:
            UpdateError: names the first tensor that is not as it should be, see `Expected`.
        """
        rank = self.ranks.get(client)
        if self.prunes and (sent := ranks_of(tensors)):
            least = min(sent.values())
            full = rank or max(layer.rank for layer in self.adapter.layers.values())
            rank = least if 1 <= least < full else rank
        whole = self.adapter.tensors()
        wanted = {
            name: cut_factor(name, tensor, rank)
            for name, tensor in whole.items()
            if name in self.names
        }
        Expected(wanted, self.max_norm).check(tensors, weight)
        for name, shape in self.companions.items():
            if name not in companions:
                raise UpdateError(f"tensor {name!r} is missing")
            if tuple(companions[name].shape) != tuple(shape):
                found = tuple(companions[name].shape)
                raise UpdateError(f"tensor {name!r} has shape {found}, not {tuple(shape)}")
        for name, tensor in companions.items():
            if name not in self.companions:
                raise UpdateError(f"tensor {name!r} is not what the rule sends")
            if tensor.dtype not in _WIRE_TYPES:
                raise UpdateError(f"tensor {name!r} has dtype {tensor.dtype}, not torch.float32")
            if not bool(torch.isfinite(tensor).all()):
                raise UpdateError(f"tensor {name!r} holds NaN or Inf")
        return rank

    def in_server_terms(self, tensors: Tensors, rank: int | None) -> Tensors:
        """Return checked tensors as values, in the server's rank and scaling."""
        if rank is not None:
            tensors = padded(tensors, self.adapter, self.scaling)
        if self.differences:
            current = self.adapter.tensors()
            tensors = {name: current[name].float() + t.float() for name, t in tensors.items()}
        return tensors


def outliers(norms: Mapping[str, float]) -> dict[str, str]:
    """Return the clients whose companions' norm is absurd beside the round's median, and why.

    What rules send beside the adapter has no scale that the server could know, so the clients are
    compared with one another. Of two no one can tell which is right.
    """
    limit = ABSURD * median(norms.values()) if norms else 0.0
    if limit == 0.0:
        return {}
    return {
        client: f"the norm of what it sent beside the adapter, {norm:.3g}, is absurd; the limit is "
        f"{limit:.3g}, {ABSURD:g} times the round's median"
        for client, norm in norms.items()
        if norm > limit
    }


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
