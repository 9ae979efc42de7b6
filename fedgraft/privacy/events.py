"""What differential privacy pays for: Gaussian queries on Poisson samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedgraft.errors import PrivacyError


@dataclass(frozen=True)
class Release:
    """Gaussian queries answered on one Poisson sample, `count` times over.

    Queries on the same sample are one event: with noises s_1, s_2, ... over their sensitivities
    they tell as much as a single query with noise 1 / sqrt(1/s_1^2 + 1/s_2^2 + ...). Two queries
    with 3.0 each are accounted as one with 3.0 / sqrt(2), not as two that sample anew, which would
    count less than was spent. `count` times over means with a new sample each time: the steps of
    DP-SGD, or rounds.

    Attributes:
        noise_multipliers: standard deviation over L2 sensitivity, one a query on that same sample.
        sampling_rate: each unit's own probability to be in the sample; 1.0: everyone.
        count: how many samples were drawn and answered so.

    Raises:
        PrivacyError: there is no query, a noise multiplier is not positive and finite, the rate is
            not within (0, 1], or the count is less than 1.
    """

    noise_multipliers: tuple[float, ...]
    sampling_rate: float
    count: int = 1

    def __post_init__(self) -> None:
        noise = self.noise_multipliers
        if not noise or not all(math.isfinite(sigma) and sigma > 0 for sigma in noise):
            raise PrivacyError(
                f"noise multipliers are {list(noise)}: each query needs a positive one",
                "Set privacy.noise-multiplier above 0.",
            )
        if not 0 < self.sampling_rate <= 1:
            raise PrivacyError(
                f"the sampling rate is {self.sampling_rate}: it must be above 0 and at most 1"
            )
        if self.count < 1:
            raise PrivacyError(f"a release was made {self.count} times: at least 1 is needed")

    @property
    def noise_multiplier(self) -> float:
        """The joint noise multiplier of all queries on the sample."""
        return 1 / math.hypot(*(1 / sigma for sigma in self.noise_multipliers))
