"""Flower's SuperExec, started again where it has died.

SuperLink and SuperNode start one each, which starts their apps, and never look at it again. Without
it no app starts any more, and everything else goes on as if nothing had happened.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

WORK = signal.SIGUSR1
"""By which our SuperNode tells our SuperExec that there is something to do."""
AGAIN_SECONDS = 1.0
"""Between its death and the next one's start."""


class KeptSuperExec:
    """The SuperExec of a SuperLink or a SuperNode, for as long as this process lives.

    Args:
        module: Flower's, which starts it by `subprocess.Popen`.
        command: what to start in place of Flower's own command.
    """

    def __init__(
        self, module: Any, command: Callable[[list[str]], list[str]] = lambda words: words
    ) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        module.subprocess = SimpleNamespace(
            Popen=self._start, TimeoutExpired=subprocess.TimeoutExpired
        )

    def _start(self, words: list[str], **options: Any) -> subprocess.Popen[bytes]:
        command = self._command(words)
        self._process = subprocess.Popen(command, **options)

        def keep() -> None:
            process = self._process
            while process is not None:
                status = process.wait()
                time.sleep(AGAIN_SECONDS)
                said = f"The SuperExec has ended (status {status}); starting it again"
                print(said, file=sys.stderr, flush=True)
                process = self._process = subprocess.Popen(command, **options)

        threading.Thread(target=keep, daemon=True).start()
        return self._process

    def send_signal(self, number: int) -> None:
        """Send it a signal; nothing happens while there is none."""
        if self._process is not None:
            self._process.send_signal(number)
