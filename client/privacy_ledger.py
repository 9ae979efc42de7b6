"""Where a client keeps the ledger of what its data have been asked."""

from __future__ import annotations

from pathlib import Path

from fedgraft.deployed import is_deployed


def ledger_path(given: str, client: str) -> Path:
    """Return the file of a client's ledger.

    Args:
        given: the folder that a simulation names for its clients. Elsewhere it counts for nothing:
            it comes from the server, which must not choose what the client forgets.
        client: the client's name.
    """
    if given and not is_deployed():
        return Path(given) / f"{client}.jsonl"
    return Path.home() / ".fedgraft" / "ledgers" / "client.jsonl"
