"""Packing: the rows of a batch laid end to end in few sequences, so that little is padding.

Packed rows must not see each other. Positions start anew with each row; transformers reads from
positions alone, where no attention mask is given, which tokens belong together, and masks the rest
in every attention implementation. `check_packs` holds the loaded base to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedgraft.errors import ConfigError

if TYPE_CHECKING:
    from fedgraft.tasks.task import Batch

Tokens = NDArray[np.int64]
IGNORED = -100
"""The label of a token that no loss counts (torch's and transformers' convention)."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""How far apart scores may be that should be equal, relative to the largest; half types: 5%."""


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
    """Collate: input_ids, position_ids and labels, each (packs, fullest), and no attention mask.

    The first token of each row is predicted by nothing, and its label is ignored. What fills up
    is a row of its own to the attention, which no loss counts.
    """
    packs = best_fit([len(row) for row in tokens], capacity)
    width = max(sum(len(tokens[row]) for row in pack) for pack in packs)
    ids = np.full((len(packs), width), pad, np.int64)
    positions = np.zeros((len(packs), width), np.int64)
    targets = np.full((len(packs), width), IGNORED, np.int64)
    for number, pack in enumerate(packs):
        at = 0
        for row in pack:
            end = at + len(tokens[row])
            ids[number, at:end] = tokens[row]
            positions[number, at:end] = np.arange(end - at)
            targets[number, at + 1 : end] = labels[row][1:]
            at = end
        positions[number, at:] = np.arange(width - at)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "labels": torch.from_numpy(targets),
    }


@torch.no_grad()
def check_packs(model: nn.Module) -> None:
    """Refuse a base that cannot keep packed rows apart.

    A short row is scored alone, and behind two different ones: its scores must stay the same.

    Raises:
        ConfigError: its forward takes no positions, or packed rows see each other.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    remedy = "Set train.packing to false for this base."
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"train.packing needs a base that takes positions, and {kind} does not", remedy
        )
    device = next(model.parameters()).device
    row, others = [1, 2, 3, 4], ([5, 6, 7, 8, 9], [9, 5, 8, 6, 5])
    alone = _scores(model, row, [*range(4)], device)
    behind = [
        _scores(model, [*other, *row], [*range(5), *range(4)], device)[5:] for other in others
    ]
    largest = float(alone.abs().max())
    allowed = TOLERANCE.get(next(model.parameters()).dtype, 5e-2) * largest
    apart = max(float((scores - alone).abs().max()) for scores in behind)
    if not apart <= allowed:  # NaN, too
        raise ConfigError(
            f"packed rows see each other in a base of type {kind}: their scores change by "
            f"{apart:.2g}",
            remedy,
        )


def _scores(
    model: nn.Module, ids: list[int], positions: list[int], device: torch.device
) -> torch.Tensor:
    output = model(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        use_cache=False,
    )
    scores: torch.Tensor = output.logits[0].float()
    return scores
