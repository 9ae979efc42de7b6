"""Learning-rate schedules over the whole run, the same for client and server to know."""

from __future__ import annotations

import math

from fedgraft.config import TrainConfig


def learning_rate(settings: TrainConfig, step: int, total: int) -> float:
    """Return the learning rate of one optimizer step.

    Args:
        settings: `lr` and `schedule`.
        step: counted from 0 over all rounds, not anew each round.
        total: optimizer steps of the whole run.
    """
    done = min(step / total, 1.0)
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1.0 + math.cos(math.pi * done))
    if settings.schedule == "linear":
        return settings.lr * (1.0 - done)
    return settings.lr
