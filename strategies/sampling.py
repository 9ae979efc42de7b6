"""How many clients a round samples: said once, for the strategy and for rules that count on it."""

from __future__ import annotations


def sample_size(fraction: float, clients: int) -> int:
    """Return how many of the clients a round samples: at least one, halves rounded up."""
    return max(1, int(fraction * clients + 0.5))
