"""Whether this process is at work in a simulation, which only the machine itself may say.

Under privacy a deployed client takes batches and noise from the operating system and writes to its
own ledger; a simulated one follows the run's seed. What travels in a run's config comes from the
server and must not decide it, so simulations say it in the environment of their own processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_SIMULATION = "FEDGRAFT_SIMULATION"


def is_deployed() -> bool:
    """Whether nothing on this machine has said that it simulates."""
    return os.environ.get(_SIMULATION) != "1"


@contextmanager
def simulation() -> Iterator[None]:
    """Say inside the block, to this process and to those it starts, that they simulate."""
    before = os.environ.get(_SIMULATION)
    os.environ[_SIMULATION] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SIMULATION]
        else:
            os.environ[_SIMULATION] = before
