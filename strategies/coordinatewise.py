"""Rules that take a statistic over clients of every single entry of s B_k A_k.

A median of factors would mean nothing (see `strategies.robust`), so the entries are those of the
products, all d_out x d_in of them. They are made a block of rows at a time in float32 and sorted
over clients, and the mean of the values in the middle is kept: one matrix of the layer's size,
which the definition asks for, and from it the best rank-r approximation.

Cost: K r d_in d_out operations and a sort of K d_out d_in numbers, by far the most of all rules, so
for large layers rather take one that works on Gram matrices (Multi-Krum, the geometric median).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from strategies.low_rank import Term
from strategies.robust import Mixable, best_layer
from strategies.rule import (
    ExtraContext,
    ExtraResult,
    LayerContext,
    LayerResult,
    Weighing,
    WeightedExtra,
    WeightedLayer,
)

_BLOCK = 1 << 22
"""Entries of all clients together that are made at a time: 16 MiB."""
_TILE = 4096
"""So many rows are turned and sorted at a time: 800 KiB for 50 clients, which a cache holds."""


class Coordinatewise(Mixable):
    """A rule that takes the mean of the values in the middle, entry by entry.

    Every client counts alike.
    """

    @property
    def surveys(self) -> bool:
        """Only the mixing needs distances."""
        return self.options.mixing

    def share(self, gram: Tensor, shares: Sequence[float]) -> Weighing:
        """Return equal shares; `combine` takes the entries as they come."""
        return Weighing((1.0 / len(gram),) * len(gram))

    @abstractmethod
    def left_out(self, K: int) -> int:
        """Return how many of K values are left out on each side, fewer than K / 2."""

    def combine(self, updates: Sequence[WeightedLayer], context: LayerContext) -> LayerResult:
        """Return the best factors for the statistic of all products."""
        B = torch.stack([update.factors.B.float() for update in updates])
        A = torch.stack([update.factors.A.float() for update in updates])
        K, d_out, d_in = len(updates), B.shape[1], A.shape[2]
        product = torch.empty(d_out, d_in, device=B.device)
        step = max(1, _BLOCK // (K * d_in))
        for start in range(0, d_out, step):
            block = product[start : start + step]
            entries = (B[:, start : start + step] @ A).reshape(K, -1)
            block.copy_(self._middle(_mixed(entries, context)).reshape(block.shape))
        return LayerResult(best_layer([_as_term(product)], context.current))

    def combine_extra(self, updates: Sequence[WeightedExtra], context: ExtraContext) -> ExtraResult:
        """Return the statistic of all values."""
        values = torch.stack([update.value.double().flatten() for update in updates])
        return ExtraResult(self._middle(_mixed(values, context)).reshape(context.current.shape))

    def _middle(self, values: Tensor) -> Tensor:
        """Return the mean of the middle (n) of values (K, n)."""
        K = len(values)
        f = self.left_out(K)
        kept = rising(values)[:, f : K - f]
        # a product with 1 / (K - 2 f) takes a third of the time of a mean over short rows
        return torch.mv(kept, kept.new_full((K - 2 * f,), 1.0 / (K - 2 * f)))


def _mixed(values: Tensor, context: LayerContext | ExtraContext) -> Tensor:
    """Return the entries (K, n) of the mixed updates, or as they are where nothing is mixed."""
    M = context.shared.get("mixing")
    return values if M is None else M.to(values.dtype) @ values


def rising(values: Tensor) -> Tensor:
    """Return (n, K), each row in rising order, from (K, n)."""
    if values.device.type != "cpu":
        return values.T.sort(dim=1).values
    rows = values.new_empty(values.shape[1], len(values))
    for tile, columns in zip(
        torch.split(rows, _TILE), torch.split(values, _TILE, dim=1), strict=True
    ):
        # numpy sorts many short rows some thirty times faster than torch
        tile.copy_(columns.T).numpy().sort(axis=1)
    return rows


def _as_term(product: Tensor) -> Term:
    """Return a matrix as a product, the smaller side the inner one."""
    d_out, d_in = product.shape
    identity = torch.eye(min(d_out, d_in), dtype=product.dtype, device=product.device)
    return (1.0, product, identity) if d_in <= d_out else (1.0, identity, product)
