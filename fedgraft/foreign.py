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
FLOORS = {
    "strategies": (),
    "client": ("strategies",),
    "server": ("strategies",),
    "simulations": ("strategies", "client", "server"),
    "deploy": ("strategies", "client", "server"),
}
"""Our top-level folders, each with those that it imports from."""


def import_ours(module: str) -> ModuleType:
    """Import a module of one of our top-level folders.

    Raises:
        FedGraftError: a module of the same name hides that folder, or one that it imports from;
            the message names its file, which is not run.
    """
    floor = module.split(".")[0]
    for name in (floor, *FLOORS.get(floor, ())):
        _refuse_hidden(name)
    return importlib.import_module(module)


def _refuse_hidden(floor: str) -> None:
    spec = importlib.util.find_spec(floor)  # found and not imported: a script would run again
    found = (spec.origin or next(iter(spec.submodule_search_locations or []), "")) if spec else ""
    if Path(found).resolve() != _HOME / floor / "__init__.py":
        raise FedGraftError(
            f"FedGraft's package {floor!r} is hidden by {found}",
            "Rename that file, or start Python from another folder.",
        )
