"""Flower's SuperLink, which waits longer for its database and keeps its SuperExec running.

`python -m deploy.patient_superlink OPTIONS` takes flower-superlink's own options. Flower gives a
write to its SQLite file 5 s to get its turn. Twenty nodes that answer at once on a busy machine
need longer, and an answer that could not be written is lost. What is touched of Flower is here,
with a test.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from flwr.supercore import sql_mixin

from deploy.kept_superexec import KeptSuperExec

# The package has a function of the same name.
command: Any = importlib.import_module("flwr.superlink.cli.flower_superlink")
BUSY_SECONDS = 25
"""How long a write may wait for those before it; who asks for it waits for 30 s."""


def wait_for_the_database() -> None:
    """Let every connection to the database be patient."""
    module: Any = sql_mixin
    settings = dict(module.SQLITE_PRAGMAS) | {"busy_timeout": str(BUSY_SECONDS * 1000)}
    module.SQLITE_PRAGMAS = tuple(settings.items())


def main() -> None:
    """Run the SuperLink in this process."""
    wait_for_the_database()
    KeptSuperExec(command)
    sys.argv[0] = "flower-superlink"
    command.flower_superlink()


if __name__ == "__main__":
    main()
