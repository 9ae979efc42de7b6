"""Krum and Multi-Krum: take the client, or the clients, that lie closest to their neighbours.

"Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent"
Peva Blanchard, El Mahdi El Mhamdi, Rachid Guerraoui, Julien Stainer. NeurIPS 2017.
https://proceedings.neurips.cc/paper/2017/hash/f4b9ec30ad9f68f89b29639786cb62ef-Abstract.html
(the longer version is arXiv:1703.02757, https://arxiv.org/abs/1703.02757)

Of n updates f may be hostile. Client i's score is the sum of its squared distances to the n - f - 2
clients closest to it,

    score(i) = sum over the closest j of d(i, j)^2,

Krum hands out the update of the lowest score as it is, Multi-Krum the mean of the m lowest. Both
need n >= 2 f + 3. Distances are those of the products, over the whole adapter
(`strategies.robust`), where the paper has gradient vectors.

Multi-Krum's mean is plain, as in the paper: a client's own count of examples does not enter. m is
n - f unless set, which is what the paper's experiments take. Equal scores go to the first in the
order of client names (the paper leaves ties open).

Krum throws away what all other clients learned, so with different data per client it costs accuracy
when nobody is hostile; Multi-Krum costs less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedgraft.config import Config
from fedgraft.errors import ConfigError
from strategies.gram import squared_distances
from strategies.mixing import MixingOptions
from strategies.robust import Mixable, clients_a_round
from strategies.rule import Weighing


class MultiKrumOptions(MixingOptions):
    """Options of Multi-Krum.

    Attributes:
        selected: m, how many clients are averaged, at most n - f; n - f when unset.
    """

    selected: Annotated[int, Field(ge=1)] | None = None


def krum_scores(distances: Tensor, byzantine: int) -> Tensor:
    """Return the scores (n) from squared distances (n, n); at least one neighbour counts.

    They are in units of their median and rounded to nine digits, so that equal scores are equal
    whatever order their sums ran in.
    """
    n = len(distances)
    others = distances.clone().fill_diagonal_(torch.inf).sort(dim=1).values
    scores = others[:, : min(max(n - byzantine - 2, 1), n - 1)].sum(1)
    typical = scores.median()
    return scores if typical == 0.0 else (scores / typical).round(decimals=9)


class Krum(Mixable):
    """Hand out the update that lies closest to its neighbours."""

    name = "krum"
    title = "Krum"
    citation = "Blanchard et al., NeurIPS 2017, arXiv:1703.02757"

    def check(self, config: Config) -> None:
        """Refuse fewer than 2 f + 3 clients a round, and to keep optimizers.

        Raises:
            ConfigError: naming the rule that gets by with fewer.
        """
        super().check(config)
        f, n = self.options.byzantine or 0, clients_a_round(config)
        if n < 2 * f + 3:
            raise ConfigError(
                f"{self.name} needs 2 f + 3 = {2 * f + 3} clients a round to hold against "
                f"strategy.byzantine = {f}, and federation.clients and federation.fraction "
                f"make it {n}",
                "Sample more clients, lower strategy.byzantine, or take "
                "strategy.name=geometric-median, which needs 2 f + 1.",
            )

    def selected(self, n: int, byzantine: int) -> int:
        """Return how many of n updates are averaged."""
        return 1

    def hostile(self, n: int) -> int:
        """Return f for a round of n updates, at most what leaves 2 f + 3."""
        return min(super().hostile(n), max((n - 3) // 2, 0))

    def share(self, gram: Tensor, shares: Sequence[float]) -> Weighing:
        """Return equal shares for the updates of the lowest scores, and 0 for the others."""
        n = len(gram)
        asked, f = self.options.byzantine, self.hostile(n)
        chosen = torch.argsort(krum_scores(squared_distances(gram), f), stable=True)
        m = self.selected(n, f)
        taken = set(chosen[:m].tolist())
        notes: tuple[str, ...] = ()
        if n < 3:
            notes = (f"{self.name} cannot tell a hostile update among {n}: it takes 3",)
        elif asked is not None and f < asked:
            notes = (f"{self.name} holds against {f} hostile updates of {n}, not {asked}",)
        return Weighing(tuple(1.0 / m if k in taken else 0.0 for k in range(n)), notes)


class MultiKrum(Krum):
    """Average the updates that lie closest to their neighbours."""

    name = "multi-krum"
    title = "Multi-Krum"
    Options: ClassVar[type[MultiKrumOptions]] = MultiKrumOptions
    options: MultiKrumOptions

    def check(self, config: Config) -> None:
        """Refuse fewer than 2 f + 3 clients a round for an f of 1, and more selected than n - f.

        Raises:
            ConfigError: naming what to set.
        """
        super().check(config)
        m, n = self.options.selected, clients_a_round(config)
        f = self.hostile(n)
        if f == 0 and self.options.byzantine is None and n > 1:
            raise ConfigError(
                f"multi-krum leaves nobody out of {n} clients a round: it takes 5 to hold against "
                "one",
                "Sample more clients, or take strategy.name=geometric-median, which takes 3.",
            )
        if m is not None and m > n - f:
            raise ConfigError(
                f"strategy.selected is {m}, and of {n} clients a round {n - f} count as honest "
                f"(strategy.byzantine is {f}{' when unset' * (self.options.byzantine is None)})",
                f"Set strategy.selected to {n - f} or less.",
            )

    def selected(self, n: int, byzantine: int) -> int:
        """Return m, at most n - f."""
        return min(self.options.selected or n, n - byzantine)
