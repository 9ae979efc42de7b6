"""Who belongs to a supervised part, and the process that ends them all when their supervisor dies.

A part is started in a session of its own, with a mark in its environment. What it starts is found
by the session, by the mark (in another session, and after its parent is gone) and as children of
those. The leash is a small process that waits on a pipe from the supervisor: the pipe closes when
the supervisor ends, also by kill -9, and then whatever it left is killed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

MARK = "FEDGRAFT_SUPERVISED"
"""The environment variable that marks a part's processes: "<supervisor>.<part>"."""
_SECONDS = 10.0


def family(belongs: Callable[[int, str], bool]) -> list[psutil.Process]:
    """Return the living processes that belong, and all that they started.

    Args:
        belongs: takes a process's session and its mark ("" without one).
    """
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and belongs(os.getsid(process.pid), _mark(process)):
                found |= {p.pid: p for p in (process, *process.children(recursive=True))}
    return [process for process in found.values() if _lives(process)]


def end(belongs: Callable[[int, str], bool]) -> list[int]:
    """Kill a family until nobody is left; return the ids of those that would not go in 10 s."""
    limit = time.monotonic() + _SECONDS
    while (left := family(belongs)) and time.monotonic() < limit:
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.02)  # psutil would wait, and so take a child's exit status from its Popen
    return [process.pid for process in left]


def _mark(process: psutil.Process) -> str:
    try:
        return process.environ().get(MARK, "")
    except (psutil.Error, OSError):  # another user's, or a kernel thread
        return ""


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def main() -> None:
    """Wait until standard input closes, then end every session named there, and all with the mark.

    Lines are "+ SESSION" and "- SESSION"; the supervisor's own mark is the first argument.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    supervisor, sessions = sys.argv[1], set[int]()
    for line in sys.stdin:
        sign, session = line.split()
        (sessions.add if sign == "+" else sessions.discard)(int(session))
    end(lambda own, mark: own in sessions or mark.startswith(f"{supervisor}."))


if __name__ == "__main__":
    main()
