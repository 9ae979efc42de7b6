"""Our top-level folders have common names; say so when somebody else's module hides one.

The command `fedgraft` never puts the working directory on the module path, so a `server.py` there
does no harm. A library user's own script does put its folder first.
"""

from __future__ import annotations

import importlib
import importlib.util
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
    spec = importlib.util.find_spec(floor)  # found and not imported: a script would run again
    found = (spec.origin or next(iter(spec.submodule_search_locations or []), "")) if spec else ""
    if Path(found).resolve() != _HOME / floor / "__init__.py":
        raise FedGraftError(
            f"FedGraft's package {floor!r} is hidden by {found}",
            "Rename that file, or start Python from another folder.",
        )
    return importlib.import_module(module)
