"""ClientApps at the ready: a process that has imported everything, and forks for each message.

Flower starts a process for every message, which imports Flower anew for more than a second. Here
one process does so once; a fork of it is a ClientApp within milliseconds. It belongs to the same
user as the SuperNode and imports nothing but Flower's code and ours: what a server's bundle carries
is loaded in the fork alone, which ends with its message.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, NoReturn

import httpcore  # noqa: F401  # httpx imports it with its first client, in 0.3 s
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
from setproctitle import setproctitle

import client.relay  # noqa: F401  # what a ClientApp of ours runs
from fedgraft.flower import ask_soon_for_objects, leave_out_empty_lines

CLIENT_APP, NURSERY = "flwr-clientapp", "fedgraft-nursery"
"""What the processes are called."""


class Nursery:
    """The parent's side: asks for ClientApps.

    Made before the process has threads, since a fork takes none of them along.
    """

    def __init__(self) -> None:
        requests, self._asks = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._asks)
            with os.fdopen(requests) as lines:
                words = _tend(lines)
            _become(words)
        os.close(requests)

    def bear(self, words: Sequence[str]) -> bool:
        """Let a process run flwr-clientapp with these options; False where the nursery is gone."""
        with suppress(BrokenPipeError):
            os.write(self._asks, f"{json.dumps(list(words))}\n".encode())
            return True
        return False


def _tend(requests: IO[str]) -> list[str]:
    """Fork for every request, and return it there; end this process when its parent has ended."""
    setproctitle(NURSERY)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that have ended
    for line in requests:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            words: list[str] = json.loads(line)
            return words
    os._exit(0)


def _become(words: Sequence[str]) -> NoReturn:
    setproctitle(CLIENT_APP)  # the task's token is not for everybody's eyes
    sys.argv[:] = [CLIENT_APP, *words]
    ask_soon_for_objects()
    leave_out_empty_lines()
    flwr_clientapp()
    sys.exit()
