"""The end of a deployed run: every client that is there is given the final adapter to keep."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Message
from flwr.serverapp import Grid

from fedgraft.adapter import payload_bytes, to_arrays
from fedgraft.adapter_folder import CARD, SETTINGS, WEIGHTS
from fedgraft.files import read_tensors
from fedgraft.messages import KEEP, FinalAdapter
from fedgraft.parcel import pack
from strategies.replies import trouble_of
from strategies.roster import Roster, exchange

log = logging.getLogger(__name__)
SILENCE_SECONDS = 120.0
"""How long nobody may answer; who has not by then is not waited for."""


@dataclass(frozen=True)
class Handout:
    """Who has the final adapter.

    Attributes:
        kept: the clients that say they keep it, in natural order.
        missed: the others that were there, with the reason.
        bytes_down: payload of arrays, over all clients.
    """

    kept: list[str] = field(default_factory=list)
    missed: dict[str, str] = field(default_factory=dict)
    bytes_down: int = 0


def hand_out(
    grid: Grid,
    roster: Roster,
    adapter: Path,
    lineage: str,
    *,
    enough: int,
    silence: float = SILENCE_SECONDS,
) -> Handout:
    """Send an adapter folder to every client that is there.

    Args:
        grid: carries the messages.
        roster: knows the clients by name; asked anew for who is there now.
        adapter: the PEFT folder.
        lineage: the run's id.
        enough: with so many clients known, nobody's name is waited for long.
        silence: seconds without any reply after which the missing ones are given up.
    """
    roster.refresh(grid, enough)
    names = roster.names()
    arrays = pack(to_arrays(read_tensors(adapter / WEIGHTS)[0]))
    settings, card = ((adapter / name).read_text() for name in (SETTINGS, CARD))
    content = FinalAdapter(arrays, settings, card, lineage).encode()
    messages = [Message(content, roster.node_of(name), KEEP) for name in names]
    troubles = {
        roster.name_of(reply.metadata.src_node_id): trouble_of(reply)
        for reply in exchange(grid, messages, silence)
    }
    missed = {name: troubles.get(name, "no reply") for name in names}
    missed = {name: trouble for name, trouble in missed.items() if trouble}
    for name, trouble in missed.items():
        log.warning("Client %s does not have the final adapter: %s", name, trouble)
    kept = [name for name in names if name not in missed]
    return Handout(kept, missed, payload_bytes(arrays) * len(names))
