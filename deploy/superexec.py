"""Flower's SuperExec on a client, which takes its ClientApps from a nursery and is told of work.

`python -m deploy.superexec OPTIONS` takes flower-superexec's own options. Flower's asks its
SuperNode for work again and again; ours waits for a signal from it, and asks but rarely. What is
touched of Flower is here, with a test.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

from flwr.supercore import log
from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor import subprocess_executor

from deploy.kept_superexec import WORK
from deploy.nursery import CLIENT_APP, Nursery


def take_from(nursery: Nursery) -> None:
    """Let the executor take ClientApps from a nursery; whatever else it starts stays as it is."""

    def start(words: list[str], **options: Any) -> subprocess.Popen[bytes] | None:
        if words[0] == CLIENT_APP and not options:
            if nursery.bear(words[1:]):
                return None  # Flower does not look at what it has started
            log(logging.WARNING, "The ClientApps' nursery is gone; this one starts from nothing")
        return subprocess.Popen(words, **options)

    module: Any = subprocess_executor
    module.subprocess = SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL)


def wait_for_work() -> None:
    """Let the pauses between two questions end as soon as the SuperNode sends its signal.

    It is blocked from before our start until now, so that one that comes early is kept.
    """
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(WORK, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {WORK})

    def sleep(seconds: float) -> None:
        if select.select([woken], [], [], seconds)[0]:
            os.read(woken, 4096)

    module: Any = run_superexec
    module.time = SimpleNamespace(sleep=sleep)


def main() -> None:
    """Run the SuperExec in this process."""
    take_from(Nursery())
    wait_for_work()
    sys.argv[0] = "flower-superexec"
    flower_superexec()


if __name__ == "__main__":
    main()
