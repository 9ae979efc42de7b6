"""Our top-level folders have common names; say so when somebody else's module hides one.

The command `fedgraft` never puts the working directory on the module path, so a `server.py` there
does no harm. A library user's own script does put its folder first.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from fedgraft.errors import FedGraftError

_HOME = Path(__file__).resolve().parent.parent


def import_ours(module: str) -> ModuleType:
    """Import a module of one of our top-level folders.

    Raises:
        FedGraftError: a module of the same name hides the folder; the message names its file.
    """
    floor = module.split(".")[0]
    package = importlib.import_module(floor)
    found = package.__file__ or next(iter(package.__path__), "")
    if Path(found).resolve() != _HOME / floor / "__init__.py":
        raise FedGraftError(
            f"FedGraft's package {floor!r} is hidden by {found}",
            "Rename that file, or start Python from another folder.",
        )
    return importlib.import_module(module)
