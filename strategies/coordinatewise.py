"""Rules that take a statistic over clients of every single entry of s B_k A_k.

A median of factors would mean nothing (see `strategies.robust`), so the entries are those of the
products, all d_out x d_in of them. They are made a block of rows at a time in float32, sorted over
clients, and the statistic is kept in float64: one matrix of the layer's size, which the definition
asks for, and from it the best rank-r approximation.

Cost: K r d_in d_out operations and a sort of K d_out d_in numbers, by far the most of all rules, so
for large layers rather take one that works on Gram matrices (Multi-Krum, the geometric median).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from strategies.low_rank import Term
from strategies.robust import ROBUST, ProductRule, best_layer
from strategies.rule import (
    ExtraContext,
    ExtraResult,
    LayerContext,
    LayerResult,
    WeightedExtra,
    WeightedLayer,
)

_BLOCK = 1 << 24
"""Entries of all clients together that are sorted at a time: 64 MiB."""


class Coordinatewise(ProductRule):
    """A rule that takes a statistic over clients, entry by entry; every client counts alike."""

    capabilities = ROBUST

    @abstractmethod
    def statistic(self, ordered: Tensor) -> Tensor:
        """Return the statistic (n), float64, of values in rising order (n, K)."""

    def combine(self, updates: Sequence[WeightedLayer], context: LayerContext) -> LayerResult:
        """Return the best factors for the statistic of all products."""
        B = torch.stack([update.factors.B.float() for update in updates])
        A = torch.stack([update.factors.A.float() for update in updates])
        K, d_out, d_in = len(updates), B.shape[1], A.shape[2]
        product = torch.empty(d_out, d_in, dtype=torch.float64, device=B.device)
        step = max(1, _BLOCK // (K * d_in))
        for start in range(0, d_out, step):
            block = product[start : start + step]
            entries = (B[:, start : start + step] @ A).reshape(K, -1)
            block.copy_(self.statistic(rising(entries)).reshape(block.shape))
        return LayerResult(best_layer([_as_term(product)], context.current))

    def combine_extra(self, updates: Sequence[WeightedExtra], context: ExtraContext) -> ExtraResult:
        """Return the statistic of all values."""
        values = torch.stack([update.value.float().flatten() for update in updates])
        return ExtraResult(self.statistic(rising(values)).reshape(context.current.shape))


def rising(values: Tensor) -> Tensor:
    """Return (n, K), each row in rising order, from (K, n)."""
    rows = values.T.contiguous()
    if rows.device.type == "cpu":  # numpy sorts many short rows some thirty times faster than torch
        return torch.from_numpy(np.sort(rows.numpy(), axis=1))
    return rows.sort(dim=1).values


def _as_term(product: Tensor) -> Term:
    """Return a matrix as a product, the smaller side the inner one."""
    d_out, d_in = product.shape
    identity = torch.eye(min(d_out, d_in), dtype=product.dtype, device=product.device)
    return (1.0, product, identity) if d_in <= d_out else (1.0, identity, product)
