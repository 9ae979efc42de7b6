"""The end of a private run: clients are asked what their data have spent.

What a client told with its last update is not all: it pays before it trains, so a round that it
failed in, whose update came too late or was refused, or that a crash has undone, is in its ledger
and in no reply.
"""

from __future__ import annotations

import logging

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedgraft.errors import POLICY
from fedgraft.messages import SPENT, Reply
from fedgraft.privacy.account import EPSILON, EPSILON_LEFT
from fedgraft.refusal import CONFIG
from strategies.replies import trouble_of
from strategies.roster import Roster, exchange

log = logging.getLogger(__name__)
SILENCE_SECONDS = 120.0
"""How long nobody may answer; who has not by then is not waited for."""


def ask_spent(
    grid: Grid, roster: Roster, *, enough: int, silence: float = SILENCE_SECONDS
) -> dict[str, dict[str, float]]:
    """Return what each client tells of its ledger: epsilon at the run's delta, and what is left.

    Args:
        grid: carries the messages.
        roster: knows the clients by name; asked anew for who is there now.
        enough: with so many clients known, nobody's name is waited for long.
        silence: seconds without any reply after which the missing ones are given up.

    Returns:
        By the name of every client that may have taken part and is there. One that does not tell
        its epsilon, or whose epsilon no number bounds, has none in it.
    """
    roster.refresh(grid, enough)
    told: dict[str, dict[str, float]] = {name: {} for name in roster.names()}
    ask = RecordDict({CONFIG: ConfigRecord()})
    messages = [Message(ask, roster.node_of(name), SPENT) for name in told]
    for message in exchange(grid, messages, silence):
        name = roster.name_of(message.metadata.src_node_id)
        trouble = trouble_of(message)
        if trouble.startswith(POLICY):
            del told[name]  # whose policy does not allow the run, so nothing was trained for it
        elif not trouble:
            metrics = Reply.decode(message.content).metrics
            told[name] = {key: metrics[key] for key in (EPSILON, EPSILON_LEFT) if key in metrics}
    silent = [name for name, said in told.items() if EPSILON not in said]
    if silent:
        log.warning("What their data have spent is not told by client %s", ", ".join(silent))
    return told
