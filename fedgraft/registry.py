"""Plug-ins by entry point: a lower floor finds what lives above it, or outside, by name alone."""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points
from typing import Any

from fedgraft.errors import ConfigError


def load_plugin(group: str, name: str, *, key: str) -> Any:
    """Load the entry point `name` of a group.

    Args:
        group: the group of entry points, `fedgraft.tasks` say.
        name: which one.
        key: the config key that named it, for the error.

    Raises:
        ConfigError: nothing of that name is installed; the nearest name is suggested.
    """
    found = {entry.name: entry for entry in entry_points(group=group)}
    if name not in found:
        nearest = difflib.get_close_matches(name, found, n=1)
        guess = f"Did you mean {nearest[0]}? " if nearest else ""
        raise ConfigError(
            f"{key} is {name!r}, and no such name is installed",
            f"{guess}Installed: {', '.join(sorted(found)) or 'none'}.",
        )
    return found[name].load()
