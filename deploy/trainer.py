"""The resident trainer's process: `python -m deploy.trainer CLIENT.TOML`."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

from client.policy import Policy
from client.resident.desk import Desk
from client.resident.service import start, stop
from client.resident.worker import Worker
from deploy.client_config import ClientConfig
from fedgraft.errors import FedGraftError
from fedgraft.files import remove_debris
from fedgraft.logs import quiet_environment

FRESH = 75
"""Exit status that asks for a new process, after memory has run out."""


def main() -> int:
    """Work until SIGTERM; return the exit status."""
    os.umask(0o077)
    os.environ.update(quiet_environment())
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        config = ClientConfig.load(Path(sys.argv[1]))
        Policy.load(config.policy)  # what is wrong with it is told at once
        remove_debris(config.kept)  # of a trainer that was killed while it wrote
        worker = Worker(Desk(config.own()), 60 * config.idle_minutes)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: worker.stop())
        server = start(worker, config.socket, everybody=config.two_users)
    except FedGraftError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    fresh = worker.work()
    stop(server)
    return FRESH if fresh else 0


if __name__ == "__main__":
    sys.exit(main())
