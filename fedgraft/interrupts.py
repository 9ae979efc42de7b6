"""Ctrl-C, remembered.

Python raises KeyboardInterrupt wherever the program happens to be. Inside a callback of a compiled
library that may come out as some other error (safetensors reports a tensor of unknown shape), which
a federation takes for one client's trouble, and goes on. So the key is noted as well, and the round
loop asks.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_pressed = threading.Event()


@contextmanager
def remembered() -> Iterator[None]:
    """Note Ctrl-C inside the block; an error that follows it is taken for its consequence.

    Raises:
        KeyboardInterrupt: the block failed after Ctrl-C.
    """
    _pressed.clear()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # no signal comes here
        return

    def note(number: int, frame: FrameType | None) -> None:
        _pressed.set()
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception:
        check()
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def check() -> None:
    """Stop where Ctrl-C was pressed.

    Raises:
        KeyboardInterrupt: it was, in the present `remembered` block.
    """
    if _pressed.is_set():
        raise KeyboardInterrupt
