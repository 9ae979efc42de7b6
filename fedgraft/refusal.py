"""How a client says that it will not do what it was asked to; imports neither torch nor numpy."""

from __future__ import annotations

from flwr.app import ConfigRecord, RecordDict

CONFIG = "config"
"""The record with a message's settings."""
REFUSAL = "refusal"


def refusal(reason: str) -> RecordDict:
    """Return the records of a reply that holds nothing but why there is nothing in it."""
    return RecordDict({CONFIG: ConfigRecord({REFUSAL: reason})})
