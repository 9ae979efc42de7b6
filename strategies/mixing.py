"""Nearest-neighbour mixing: before a robust rule looks at updates, each is averaged with its like.

"Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity"
Youssef Allouah, Sadegh Farhadkhani, Rachid Guerraoui, Nirupam Gupta, Rafaël Pinot, John Stephan.
AISTATS 2023. https://arxiv.org/abs/2302.01772 (algorithm 2)

Of n updates f may be hostile. Each update D_i is replaced by the mean of the n - f updates nearest
to it, itself among them,

    Y_i = 1 / (n - f) sum over the nearest j of D_j,   or   Y = M D,

and the rule aggregates the Y_i. Honest updates differ by their data and their batches, and a median
of few scattered values is pulled by any three that agree; among means of n - f updates little of
that scatter is left. Distances are those of the products (`strategies.robust`).

Y is linear in D, so nothing of the adapter's size is made: the Gram matrix of the mixed updates is
M G M^T, shares c of them are shares M^T c of the updates, and entries of the mixed products are M
times the entries. Of equal distances the first in the order of client names counts as nearer (the
paper leaves ties open).
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from strategies.gram import squared_distances
from strategies.options import RuleOptions


class MixingOptions(RuleOptions):
    """Options of robust rules that nearest-neighbour mixing may go before.

    Attributes:
        byzantine: f, how many of a round's clients may be hostile; unset, the largest with
            n >= 3 f + 1 for the round's n updates.
        mixing: whether every update is averaged with the n - f nearest to it before.
    """

    byzantine: Annotated[int, Field(ge=0)] | None = None
    mixing: bool = False


def nearest_neighbours(gram: Tensor, byzantine: int) -> Tensor:
    """Return M (n, n), float64: row i has 1 / (n - f) for the n - f updates nearest to update i.

    Args:
        gram: inner products of the updates, (n, n), float64.
        byzantine: f, below n.
    """
    distances = squared_distances(gram)
    n = len(distances)
    nearest = distances.fill_diagonal_(-1.0).argsort(dim=1, stable=True)[:, : n - byzantine]
    return torch.zeros_like(distances).scatter_(1, nearest, 1.0 / (n - byzantine))
