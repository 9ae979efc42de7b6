"""Coordinate median: the median of every single entry.

"Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates"
Dong Yin, Yudong Chen, Kannan Ramchandran, Peter Bartlett. ICML 2018.
https://arxiv.org/abs/1803.01498 (definition 1)

The median over clients of each entry of the products s B_k A_k (`strategies.coordinatewise`), where
the paper has gradients; of an even number of values, the mean of the two in the middle. It needs no
guess of how many clients are hostile, and holds while fewer than half are.
"""

from __future__ import annotations

from strategies.coordinatewise import Coordinatewise


class CoordinateMedian(Coordinatewise):
    """Take the median of every entry."""

    name = "coordinate-median"
    title = "Coordinate median"
    citation = "Yin et al., ICML 2018, arXiv:1803.01498"
    needs_byzantine = False

    def left_out(self, K: int) -> int:
        """Return all but the value in the middle, or the two."""
        return (K - 1) // 2
