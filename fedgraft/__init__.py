"""FedGraft: federated LoRA fine-tuning.

from fedgraft import Adapter, compare, load_run, simulate

The names load what they need when they are used, so that importing the package is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedgraft.adapter import Adapter
    from fedgraft.library import compare, load_run, simulate

__version__ = "0.1.0"
__all__ = ["Adapter", "__version__", "compare", "load_run", "simulate"]


def __getattr__(name: str) -> Any:
    if name == "Adapter":
        from fedgraft.adapter import Adapter

        return Adapter
    if name in ("compare", "load_run", "simulate"):
        from fedgraft import library

        return getattr(library, name)
    raise AttributeError(f"module 'fedgraft' has no attribute {name!r}")
