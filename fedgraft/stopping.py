"""Long work that ends early when nobody waits for its result any more.

Whoever starts the work says how to tell, and the loops in it ask before each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fedgraft.errors import StoppedError

_asked: ContextVar[Callable[[], bool] | None] = ContextVar("asked", default=None)


@contextmanager
def stopping_when(asked: Callable[[], bool]) -> Iterator[None]:
    """Let work inside the block, on this thread, end at its next step once `asked` says so."""
    token = _asked.set(asked)
    try:
        yield
    finally:
        _asked.reset(token)


def stop_if_asked() -> None:
    """Go on, unless somebody has asked this work to end.

    Raises:
        StoppedError: somebody has.
    """
    asked = _asked.get()
    if asked is not None and asked():
        raise StoppedError("nobody waits for the result any more")
