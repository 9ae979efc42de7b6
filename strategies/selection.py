"""The largest entries of a whole adapter: what rules that send little choose by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedgraft.adapter import Tensors, natural_order


def largest(scores: Mapping[str, Tensor], count: int) -> Tensors:
    """Return masks, by the names of the scores, that are True at exactly `count` largest entries.

    Of equal entries the first ones count, by name in natural order and then by position: Adam's
    first step moves all entries equally far, so ties are common, and the choice must be the same on
    every machine.

    Args:
        scores: at least one, of any shapes; all of their entries compete.
        count: how many; all, where there are no more.
    """
    order = sorted(scores, key=natural_order)
    total = sum(scores[name].numel() for name in order)
    if count >= total:
        return {name: torch.ones_like(scores[name], dtype=torch.bool) for name in order}
    if count <= 0:
        return {name: torch.zeros_like(scores[name], dtype=torch.bool) for name in order}
    flat = torch.cat([scores[name].reshape(-1) for name in order])
    threshold = flat.kthvalue(total - count + 1).values
    masks: Tensors = {name: scores[name] > threshold for name in order}
    left = count - sum(int(mask.sum()) for mask in masks.values())
    for name in order:
        ties = (scores[name] == threshold).reshape(-1)
        taken = ties & (ties.cumsum(0) <= left)
        masks[name] |= taken.reshape(masks[name].shape)
        left -= int(taken.sum())
    return masks
