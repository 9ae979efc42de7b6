"""Trimmed mean: entry by entry, without the largest and the smallest.

"Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates"
Dong Yin, Yudong Chen, Kannan Ramchandran, Peter Bartlett. ICML 2018.
https://arxiv.org/abs/1803.01498 (definition 2)

Of the K values of an entry the f largest and the f smallest are left out and the mean of the others
is taken; f is at least the number of hostile clients and below K / 2. Entries are those of the
products s B_k A_k (`strategies.coordinatewise`), where the paper has gradients.

The paper trims a share beta of the values from each side; here it is f of them, the same
`strategy.byzantine` as Krum's. Where a round has no more than 2 f updates, as many are trimmed as
leave a median.
"""

from __future__ import annotations

from fedgraft.config import Config
from fedgraft.errors import ConfigError
from strategies.coordinatewise import Coordinatewise
from strategies.robust import clients_a_round


class TrimmedMean(Coordinatewise):
    """Average every entry without its extremes."""

    name = "trimmed-mean"
    title = "Trimmed mean"
    citation = "Yin et al., ICML 2018, arXiv:1803.01498"

    def check(self, config: Config) -> None:
        """Refuse 2 f clients a round or fewer, an f of 0 that nobody set, and to keep optimizers.

        Raises:
            ConfigError: naming the rule that leaves as few as possible.
        """
        super().check(config)
        f, n = self.options.byzantine or 0, clients_a_round(config)
        if self.options.byzantine is None and n > 1 and self.hostile(n) == 0:
            raise ConfigError(
                f"trimmed-mean leaves nothing out among {n} clients a round: unset, "
                "strategy.byzantine is the largest f with n >= 3 f + 1",
                "Sample more clients, set strategy.byzantine=1 (of at least 3), or take "
                "strategy.name=coordinate-median.",
            )
        if n <= 2 * f:
            raise ConfigError(
                f"trimmed-mean leaves out 2 x strategy.byzantine = {2 * f} values of each entry, "
                f"and federation.clients and federation.fraction make {n} clients a round",
                "Sample more clients, lower strategy.byzantine, or take "
                "strategy.name=coordinate-median.",
            )

    def left_out(self, K: int) -> int:
        """Return f, or as many as leave a median."""
        return self.hostile(K)
