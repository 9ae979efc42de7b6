"""Packing: the rows of a batch laid end to end in few sequences, so that little is padding.

Packed rows must not see each other: positions start anew with each row, and
`fedgraft.tasks.packed_attention` keeps them apart by that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fedgraft.tasks.task import Batch

Tokens = NDArray[np.int64]
IGNORED = -100
"""The label of a token that no loss counts (torch's and transformers' convention)."""


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign rows to sequences by best-fit decreasing: the longest first, each where it fits best.

    Args:
        lengths: of the rows, tokens; one longer than `capacity` gets a sequence of its own.
        capacity: tokens a sequence.

    Returns:
        The positions in `lengths` that each sequence holds; equal lengths in their own order.
    """
    packs: list[list[int]] = []
    left: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda k: (-lengths[k], k)):
        fitting = [(left[pack], pack) for pack in range(len(packs)) if left[pack] >= lengths[row]]
        if not fitting:
            packs.append([])
            left.append(capacity)
            fitting = [(capacity, len(packs) - 1)]
        _, pack = min(fitting)
        packs[pack].append(row)
        left[pack] -= lengths[row]
    return packs


def packed(tokens: Sequence[Tokens], labels: Sequence[Tokens], pad: int, capacity: int) -> Batch:
    """Collate: input_ids, position_ids, attention_mask and labels, each (packs, fullest).

    The first token of each row is predicted by nothing, and its label is ignored. The mask is 0
    where a sequence is filled up; by its positions the filling is a row of its own.
    """
    packs = best_fit([len(row) for row in tokens], capacity)
    width = max(sum(len(tokens[row]) for row in pack) for pack in packs)
    ids = np.full((len(packs), width), pad, np.int64)
    positions = np.zeros((len(packs), width), np.int64)
    held = np.zeros((len(packs), width), np.int64)
    targets = np.full((len(packs), width), IGNORED, np.int64)
    for number, pack in enumerate(packs):
        at = 0
        for row in pack:
            end = at + len(tokens[row])
            ids[number, at:end] = tokens[row]
            positions[number, at:end] = np.arange(end - at)
            targets[number, at + 1 : end] = labels[row][1:]
            at = end
        held[number, :at] = 1
        positions[number, at:] = np.arange(width - at)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "attention_mask": torch.from_numpy(held),
        "labels": torch.from_numpy(targets),
    }
