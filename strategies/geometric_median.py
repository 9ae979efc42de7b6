"""RFA: the geometric median of the clients' updates.

"Robust Aggregation for Federated Learning"
Krishna Pillutla, Sham M. Kakade, Zaid Harchaoui. IEEE Transactions on Signal Processing 2022
(first 2019). https://arxiv.org/abs/1912.13445 (equation 3, algorithm 2)

The update v that minimises sum_k w_k ||v - D_k||, by the smoothed Weiszfeld iteration:

    c_k = w_k / max(nu, ||v - D_k||),   v = sum c_k D_k / sum c_k,

started from the mean. It holds while less than half of the weight is hostile, and needs no guess of
how many are. D_k is what client k changes of the products, over the whole adapter
(`strategies.robust`). v is a weighted mean of the D_k in every iteration, so all of it runs on
their Gram matrix (K, K): with shares c that add up to 1,

    ||v - D_k||^2 = c^T G c - 2 (G c)_k + G_kk.

Differences from the paper. The paper stops after a few iterations, each of which costs its clients
a secure sum; here they cost nothing and run until the shares stand still. nu is relative: to the
typical distance between one client and half of the others, so that it means the same at any size of
the updates. The paper weighs by examples; see `strategy.weights` for why equal is the default here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from strategies.gram import squared_distances
from strategies.mixing import MixingOptions
from strategies.robust import Mixable, WeightOptions
from strategies.rule import Weighing

_ITERATIONS = 10_000
_ROUNDING = 1e-9
"""What weights that add up to a half may be above it."""
_STILL = 1e-9
"""The largest change at the end, relative to each share: that of a huge update is tiny."""


class GeometricMedianOptions(WeightOptions, MixingOptions):
    """Options of the geometric median.

    Attributes:
        smoothing: nu, relative to the typical distance between clients.
    """

    smoothing: Annotated[float, Field(gt=0.0)] = 1e-6


def typical_distance(distances: Tensor) -> float:
    """Return how far the nearest half of the clients lies from the client that lies best; above 0.

    Less than half of the clients cannot move it beyond what honest ones differ by. Where half of
    them agree it is the smallest distance that is not 0.

    Args:
        distances: squared, (K, K).
    """
    others = distances.sort(dim=1).values  # the first is the client itself
    half = others[:, len(others) // 2].min()
    if half == 0.0:
        half = distances[distances > 0.0].min()
    return float(half.sqrt())


def weiszfeld(gram: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """Return the shares (K) that make the geometric median of D_k, from their Gram matrix.

    Args:
        gram: <D_i, D_j>, (K, K), float64.
        weights: w_k, (K), which add up to 1.
        smoothing: nu over the typical distance.
    """
    distances = squared_distances(gram)
    agreed = (distances == 0.0).double() @ weights
    if agreed.max() > 0.5 + _ROUNDING:  # where most of it lies, no pull of the rest is stronger
        there = weights * (distances[agreed.argmax()] == 0.0)
        return there / there.sum()
    nu = smoothing * typical_distance(distances)
    shares = weights
    for _ in range(_ITERATIONS):
        inner = gram @ shares
        squares = shares @ inner - 2.0 * inner + gram.diagonal()
        pulls = weights / squares.clamp(min=nu**2).sqrt()
        moved = pulls / pulls.sum()
        still = bool(((moved - shares).abs() <= _STILL * moved).all())
        shares = moved
        if still:
            break
    return shares


class GeometricMedian(Mixable):
    """Hand out the update from which the distances to all clients' add up to the least."""

    name = "geometric-median"
    title = "Geometric median (RFA)"
    citation = "Pillutla et al., IEEE TSP 2022, arXiv:1912.13445"
    Options = GeometricMedianOptions
    options: GeometricMedianOptions
    needs_byzantine = False

    def share(self, gram: Tensor, shares: Sequence[float]) -> Weighing:
        """Return the shares of the smoothed Weiszfeld iteration's limit."""
        weights = self.options.weights_of(shares).to(gram.device)
        return Weighing(tuple(weiszfeld(gram, weights, self.options.smoothing).tolist()))
