"""What a private run promises: the figure, and the words without which it means nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from fedgraft.config import Config
from fedgraft.privacy.figures import rounded_up

_UNIT = {"example": "one example of a client", "client": "one client", "local": "one client"}
_RELATION = {
    "example": "add-or-remove-one",
    "client": "add-or-remove-one",
    "local": "replace-one",
}
_OBSERVER = {
    "example": "everybody, the server included",
    "client": "whoever sees the adapters, and not the server",
    "local": "everybody, the server included",
}
_ACCOUNTANT: dict[Literal["rdp", "pld"], str] = {
    "rdp": "Renyi (RDP)",
    "pld": "privacy loss distribution (PLD)",
}


def guarantee(
    config: Config, epsilon: float | None, *, deployed: bool, untold: int = 0
) -> dict[str, Any] | None:
    """Return what goes into records of a run, as plain JSON values; None for a run without privacy.

    Args:
        config: the run's.
        epsilon: of all releases in the ledgers, the largest over clients that tell it; None before
            the first.
        untold: how many clients do not tell theirs: then the run's own is not known.
        deployed: noise and samples come from the operating system. In a simulation they come from
            the run's seed, and the figure is that of a study.
    """
    privacy = config.privacy
    if privacy.mode == "none":
        return None
    told = epsilon if epsilon is not None and math.isfinite(epsilon) else None
    return {
        "mode": privacy.mode,
        "epsilon": None if untold else told,
        "told": told,
        "untold": untold,
        "delta": privacy.delta,
        "unit": _UNIT[privacy.mode],
        "relation": _RELATION[privacy.mode],
        "against": _OBSERVER[privacy.mode],
        "accountant": privacy.accountant,
        "study": not deployed,
    }


def in_words(promised: Mapping[str, Any] | None) -> str:
    """Say a guarantee in one line, as the card and the report do."""
    if promised is None:
        return "none"
    return f"epsilon {amount(promised)} {terms(promised)}"


def amount(promised: Mapping[str, Any]) -> str:
    """Return a guarantee's epsilon, or why there is no number."""
    if untold := promised.get("untold"):  # older runs do not say
        least = "nothing" if promised["told"] is None else rounded_up(promised["told"])
        return f"unknown, since {untold} do not tell theirs (the others: {least}),"
    return "without bound" if promised["epsilon"] is None else rounded_up(promised["epsilon"])


def terms(promised: Mapping[str, Any]) -> str:
    """Say all of a guarantee that is not its epsilon."""
    said = (
        f"at delta {promised['delta']:g} for {promised['unit']} "
        f"({promised['relation']}), against {promised['against']}; "
        f"{_ACCOUNTANT[promised['accountant']]} accountant, all that the ledgers hold"
    )
    if not promised["study"]:
        return said
    return f"{said}. A study and no release: noise and samples came from the run's seed"
