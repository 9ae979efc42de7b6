"""What is wrong with a config, in a sentence that names the key, the value found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from fedgraft.errors import ConfigError

_OTHER_WORDS = {
    "learning-rate": "lr",
    "lora-alpha": "alpha",
    "lora-dropout": "dropout",
    "lora-rank": "rank",
    "r": "rank",
    "target-modules": "targets",
    "local-epochs": "epochs",
    "local-steps": "steps",
    "num-clients": "clients",
    "num-rounds": "rounds",
}
"""What other programs call some of our keys."""


def config_error(
    error: ValidationError,
    known: list[str],
    source: str = "",
    prefix: str = "",
    *,
    option: bool = True,
) -> ConfigError:
    """Turn pydantic's first complaint into one sentence that names key, value and remedy.

    Args:
        error: the complaint.
        known: all keys.
        source: the file, if it comes from one.
        prefix: of the keys in the complaint.
        option: whether `--set` sets these keys, too.
    """
    first = error.errors()[0]
    key = prefix + ".".join(str(part) for part in first["loc"] if not _is_branch(part))
    where = f" in {source}" if source else ""
    found = first.get("input")
    if first["type"] == "extra_forbidden":
        while isinstance(found, Mapping) and found:  # an unknown group: its first key says more
            key, found = f"{key}.{next(iter(found))}", next(iter(found.values()))
        guess = _nearest(key, known)
        group = [k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]]
        listed = ", ".join(group if "." in key and group else known)
        remedy = f"Did you mean {guess}?" if guess else f"Known keys: {listed}."
        return ConfigError(f"unknown config key {key}{where}", remedy)
    reason = first["msg"].removeprefix("Value error, ")
    if not key:
        return ConfigError(f"the config{where} contradicts itself: {reason}", "")
    if first["type"] == "value_error":
        return ConfigError(f"{reason}{where}")
    if first["type"] == "model_type":
        keys = [k for k in known if k.startswith(f"{key}.")]
        return ConfigError(
            f"config key {key}{where} is {found!r}, but it is a group of keys",
            f"Set one of {', '.join(keys)}.",
        )
    how = f", in the file or with --set {key}=..." if option else "."
    return ConfigError(
        f"config key {key}{where} is {found!r}: {reason[0].lower()}{reason[1:]}",
        f"Set {key} to a valid value{how}",
    )


def _nearest(key: str, known: Sequence[str]) -> str | None:
    """Return the key that was meant: the group may be wrong, or the last word, but not both much.

    Only last words are compared, since a long common group would make unlike ones look alike.
    """
    group, _, leaf = key.replace("_", "-").rpartition(".")
    leaf = _OTHER_WORDS.get(leaf, leaf)
    own = [k for k in known if k.rpartition(".")[0] == group]
    for candidates, cutoff in ((own, 1.0), (known, 1.0), (own, 0.6), (known, 0.75)):
        by_leaf = {k.rpartition(".")[2]: k for k in reversed(candidates)}
        if close := difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=cutoff):
            return by_leaf[close[0]]
    return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.8)), None)


def _is_branch(part: object) -> bool:
    """Whether a part of pydantic's location names a union's branch and not a key."""
    return isinstance(part, int) or str(part).startswith(("list[", "literal[", "constrained"))
