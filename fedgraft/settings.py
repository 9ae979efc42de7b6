"""Settings as plain trees: read from TOML files and `key=value`, nested and flat."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedgraft.errors import ConfigError

_PATTERNS = ("adapter.rank-pattern", "adapter.alpha-pattern")
"""Keys whose values are tables by names that may have dots in them."""


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: there is no such file, or it is not TOML (with the line).
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}", "Check the path.") from None
    except IsADirectoryError:
        raise ConfigError(
            f"{path} is a folder, not a config file", "Name a .toml file in it, or use --resume."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", "Mend that line.") from None


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Parse `key=value` settings; a value is read as TOML and, where it is none, as text.

    Raises:
        ConfigError: a setting without a key or an equals sign.
    """
    parsed: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"--set {setting!r} is not key=value", "Write it like --set train.lr=0.01."
            )
        parsed[key.strip()] = parse_value(text.strip())
    return parsed


def parse_value(text: str) -> Any:
    """Read one value as TOML; what is no TOML is text, so names need no quotes."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text  # of several lines, each like a key


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested groups.

    Raises:
        ConfigError: a part of the key is a value and not a group.
    """
    *groups, leaf = key.split(".")
    for group in groups:
        inner = tree.setdefault(group, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"config key {key} cannot be set: {group} is not a group of keys")
        tree = inner
    tree[leaf] = value


def unflatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested groups; what is nested already stays."""
    nested: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and isinstance(nested.get(key), dict):
            for inner, leaf in value.items():
                put(nested, f"{key}.{inner}", leaf)
        else:
            put(nested, key, dict(value) if isinstance(value, Mapping) else value)
    return nested


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested groups into dotted keys, the form that `--set` and `with_overrides` take."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and not f"{prefix}{key}".endswith(_PATTERNS):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
