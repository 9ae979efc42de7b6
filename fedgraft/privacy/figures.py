"""Epsilons for people to read, which never promise more than was reached."""

from __future__ import annotations

import math


def rounded_up(value: float | None) -> str:
    """Return an epsilon with four significant digits, never a smaller one; None is infinite."""
    if value is None:
        return "infinite"
    if value == 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value / step - 1e-9) * step:.4g}"
