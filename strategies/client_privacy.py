"""Privacy by client: what a round's noise is, and what it costs (central differential privacy).

"Learning Differentially Private Recurrent Language Models"
H. Brendan McMahan, Daniel Ramage, Kunal Talwar, Li Zhang. ICLR 2018.
https://arxiv.org/abs/1710.06963

Of N clients each takes part with probability q, by itself. What a client adds to a sum, as one
vector x_k over all layers and extras, is clipped to a norm of C, and with z the noise multiplier

    mean = (sum_k x_k min(1, C / ||x_k||) + N(0, (z C)^2 I)) / (q N).

Clients weigh the same and the denominator is fixed: a weight in examples, or a division by how many
took part, would tell something of a client that no noise covers. A sum then changes by C at most
when a client joins or leaves. A rule of several phases answers one such query a phase on the same
sampled clients, and all of them are one release.

The clip may follow the median of the norms:

"Differentially Private Learning with Adaptive Clipping"
Galen Andrew, Om Thakkar, H. Brendan McMahan, Swaroop Ramaswamy. NeurIPS 2021.
https://arxiv.org/abs/1905.03871 (algorithm 1)

    C <- C exp(-eta (b - 1/2)),   b = 1/2 + (sum_k (b_k - 1/2) + N(0, sigma_b^2)) / (q N),

b_k being 1 where the norm is at most C, 0 elsewhere. A client moves that sum by 1/2, so the count
is a query of multiplier 2 sigma_b, and the vector's is raised to

    z_v = (z^-2 - (2 sigma_b)^-2)^(-1/2),

with which both together cost what z says. sigma_b is q N / 20 as in the paper, and at least so
large that the count takes no more than a tenth of z^-2: the paper's has no solution for few
clients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fedgraft.privacy.events import Release
from fedgraft.privacy.randomness import Randomness

_CLIP_RATE = 0.2
"""eta of the adaptive clip, the paper's."""
_COUNT_SHARE = 0.1
"""What the count may take of z^-2 at most."""


@dataclass(frozen=True)
class ClientPrivacy:
    """How a run's sums are clipped and noised.

    Attributes:
        noise_multiplier: z, standard deviation over sensitivity, of each phase of a rule.
        clip: C, the largest norm of what a client adds to a phase; where it adapts, the first one.
        rate: q, the probability with which each client takes part in a round, by itself.
        clients: N, a fixed number, whoever is there.
        randomness: gives the source of a purpose in a round; "sample" and "noise" are drawn.
        adaptive: the clip follows the median of the norms.
        study: nothing is released, so that figures which no noise covers may be shown.
    """

    noise_multiplier: float
    clip: float
    rate: float
    clients: int
    randomness: Callable[[str, int], Randomness]
    adaptive: bool = False
    study: bool = False

    @property
    def denominator(self) -> float:
        """q N, what sums are divided by."""
        return self.rate * self.clients

    @property
    def count_scale(self) -> float:
        """sigma_b, the standard deviation of the count's noise."""
        least = self.noise_multiplier / (2.0 * math.sqrt(_COUNT_SHARE))
        return max(self.denominator / 20.0, least)

    @property
    def vector_multiplier(self) -> float:
        """z_v, the multiplier of the noise on the vectors."""
        z = self.noise_multiplier
        if not self.adaptive or z == 0.0:
            return z
        return 1.0 / math.sqrt(z**-2 - (2.0 * self.count_scale) ** -2)

    def release(self, phases: int) -> Release:
        """Return what a round of so many phases releases."""
        one: tuple[float, ...] = (self.vector_multiplier,)
        if self.adaptive:
            one = (self.vector_multiplier, 2.0 * self.count_scale)
        return Release(one * phases, self.rate)

    def next_clip(self, clip: float, below: float) -> float:
        """Return the next round's clip.

        Args:
            clip: this round's.
            below: sum_k (b_k - 1/2) with its noise.
        """
        if not self.adaptive:
            return clip
        share = min(1.0, max(0.0, 0.5 + below / self.denominator))
        return clip * math.exp(-_CLIP_RATE * (share - 0.5))
