"""Flower's SuperExec on a client, which takes its ClientApps from a nursery.

`python -m deploy.superexec OPTIONS` takes flower-superexec's own options. What is touched of Flower
is here, with a test.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

from flwr.supercore import log
from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.superexec.executor import subprocess_executor

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


def main() -> None:
    """Run the SuperExec in this process."""
    take_from(Nursery())
    sys.argv[0] = "flower-superexec"
    flower_superexec()


if __name__ == "__main__":
    main()
