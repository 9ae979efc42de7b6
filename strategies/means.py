"""Weighted means over clients: folded one by one, in float64, in the order that they come in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from fedgraft.adapter import Tensors


def weighted_mean(terms: Iterable[tuple[float, Mapping[str, Tensor]]]) -> Tensors:
    """Return the sums of share * tensor by name, in float64.

    One term is held at a time. Where the shares add up to 1 and all terms are the same float32
    tensors, the mean rounded to float32 is those tensors, bit for bit.

    Args:
        terms: pairs of a share p_k and named tensors; every term has the first one's names.
    """
    total: Tensors = {}
    for share, tensors in terms:
        if not total:
            total = {name: share * tensor.double() for name, tensor in tensors.items()}
            continue
        for name, sum_ in total.items():
            sum_.add_(tensors[name].double(), alpha=share)
    return total
