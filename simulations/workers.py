"""Worker processes for runs side by side: deaf to Ctrl-C, and gone when their parent is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import ModuleType
from typing import TypeVar

from tqdm import tqdm

from fedgraft.errors import RunError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@contextmanager
def at_work(
    count: int, function: Callable[[_Item], _Result], items: Iterable[_Item]
) -> Iterator[dict[Future[_Result], _Item]]:
    """Work on the items in worker processes, in their order, for as long as the block lasts.

    Args:
        count: how many workers.
        function: of a module, not of the caller's script, which no worker imports.
        items: what it is called with; they can be pickled.

    Yields:
        The future of each item. When the block ends early, the workers are ended at once.

    Raises:
        RunError: a worker died.
    """
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(count, context, initializer=_prepare)
    try:
        with _start_of_processes():
            futures = {executor.submit(function, item): item for item in items}
        yield futures
    except BrokenProcessPool as error:
        raise RunError(
            "a worker process died; most likely memory ran out",
            "Set threads to the number of cores, so that one run goes at a time.",
        ) from error
    except BaseException:
        for process in list((executor._processes or {}).values()):
            process.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def _start_of_processes() -> Iterator[None]:
    """Let processes that are started here inherit neither Ctrl-C nor the caller's script.

    Ctrl-C at a terminal goes to all of its processes, and the parent ends the workers. And spawned
    processes import the main module: a user's script would run once more in each of them.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        sys.modules["__main__"] = main


def _prepare() -> None:
    """End this worker when its parent is gone, however it went, and leave nothing behind then.

    Bars of libraries share a lock between processes, which a worker that is ended would leak.
    """

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    tqdm.set_lock(threading.RLock())
    threading.Thread(target=watch, daemon=True).start()
