"""Who is who: Flower's random node ids on one side, client names on the other.

Sampling, the order of summation, random streams, personal state and reports use names and nothing
else, so a run is the same whatever ids Flower draws.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedgraft.adapter import natural_order
from fedgraft.errors import RunError, UpdateError
from fedgraft.flower import is_lost, say_who_was_asked
from fedgraft.messages import HELLO, Hello
from fedgraft.refusal import CONFIG
from strategies.replies import trouble_of

log = logging.getLogger(__name__)
POLL_SECONDS, POLL_SHARE, POLL_MOST = 0.05, 0.02, 0.5
"""Seconds between two questions for replies: that share of what has been waited, within bounds.

Deployed, a question costs the server some 20 ms of a core, and a round may take hours.
"""
HELLO_SECONDS = 120.0
GRACE_SECONDS = 5.0
"""How long a round is held up for the names of newcomers; who is slower joins a later one."""
BACK_SECONDS = 20.0
"""How long a node whose message was lost may take to be there again."""
_TIMES_AGAIN = 2


def exchange(grid: Grid, messages: Iterable[Message], deadline: float) -> Iterator[Message]:
    """Send messages and yield the replies as they arrive.

    Where a node's processes died with its message, and the node is there again soon, it is asked
    again, at most twice. Its answer is a function of the run's config, so nothing but time is lost;
    under privacy it has other noise, and its ledger has paid for both.

    Args:
        grid: carries the messages.
        messages: one a node.
        deadline: seconds without any reply after which the missing ones are given up.
    """
    waiting = _push(grid, list(messages))
    lost: list[_Lost] = []
    again: Counter[int] = Counter()  # by node, how often it was asked once more
    heard = time.monotonic()
    while waiting or lost:
        arrived = False
        for reply in grid.pull_messages(list(waiting)) if waiting else ():
            arrived = True
            asked = waiting.pop(reply.metadata.reply_to_message_id, None)
            if asked is None:
                continue
            say_who_was_asked(reply, asked.metadata.dst_node_id)
            if is_lost(reply) and again[asked.metadata.dst_node_id] < _TIMES_AGAIN:
                lost.append(_Lost(asked, reply, time.monotonic()))
            else:
                yield reply
        present = set(grid.get_node_ids()) if lost else set()
        for one in list(lost):
            node = one.asked.metadata.dst_node_id
            if node in present:
                log.warning("A node is there again, and is asked once more")  # who is a secret
                again[node] += 1
                anew = _push(grid, [_copy(one.asked)])
                waiting |= anew
                arrived = True
                if not anew:
                    yield one.reply
            elif time.monotonic() - one.since > BACK_SECONDS:
                yield one.reply
            else:
                continue
            lost.remove(one)
        if arrived:
            heard = time.monotonic()
            continue
        if time.monotonic() - heard > deadline:
            yield from (one.reply for one in lost)
            return
        _pause(heard)


def _pause(since: float) -> None:
    waited = time.monotonic() - since
    time.sleep(min(max(POLL_SECONDS, POLL_SHARE * waited), POLL_MOST))


@dataclass(frozen=True)
class _Lost:
    """A message that died with those who were to answer it."""

    asked: Message
    reply: Message
    since: float  # monotonic seconds


def _push(grid: Grid, messages: list[Message]) -> dict[str, Message]:
    """Send messages; return those that are on their way by their ids."""
    if not messages:
        return {}
    # A list, since Flower's own grid goes through the messages twice; and it returns None as the
    # id of a message that it could not take.
    ids = list(grid.push_messages(messages))
    return {id: message for id, message in zip(ids, messages, strict=True) if id}


def _copy(message: Message) -> Message:
    """Return the same message, to be sent anew under an id of its own."""
    return Message(message.content, message.metadata.dst_node_id, message.metadata.message_type)


class Roster:
    """The clients of a federation by name, asked for once and again only for new nodes.

    Args:
        ours: every client is FedGraft's own and has a name, so one that cannot say it now (its
            trainer is just starting again) is asked another time and not called by its node's id.
    """

    def __init__(self, *, ours: bool = False) -> None:
        self._ours = ours
        self._names: dict[int, str] = {}
        self._asked: dict[str, tuple[int, float]] = {}  # by message: the node, monotonic seconds
        self.descriptions: dict[str, str] = {}
        self.memory: dict[str, int] = {}  # bytes, 0 where a client does not say
        self.claimed: set[str] = set()  # names that more than one node gives

    def names(self) -> list[str]:
        """Return the known clients in natural order."""
        return sorted(self._names.values(), key=natural_order)

    def name_of(self, node_id: int) -> str:
        """Return a node's client name; its id, for a node that was never asked."""
        return self._names.get(node_id, str(node_id))

    def node_of(self, name: str) -> int:
        """Return the node that a client runs on now."""
        return next(node for node, known in self._names.items() if known == name)

    def refresh(self, grid: Grid, enough: int | None = None) -> None:
        """Ask new nodes for their names and forget nodes that are gone.

        A node that does not know the question (anybody's own ClientApp) is called by its id. One
        that gives a name which another node bears is left out and asked again the next time: a
        client that was restarted may be there under its new id before the old one is missed.

        Args:
            grid: carries the messages.
            enough: with so many clients known, the others are waited for only a moment; None waits
                for all.
        """
        self.claimed.clear()
        present = set(grid.get_node_ids())
        self._names = {node: name for node, name in self._names.items() if node in present}
        self._asked = {
            message: (node, since)
            for message, (node, since) in self._asked.items()
            if node in present and time.monotonic() - since < HELLO_SECONDS
        }
        self._ask(grid, present)
        replies = self._answers(grid, enough)
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            node = reply.metadata.src_node_id
            hello = self._heard(reply)
            if hello is None:
                continue
            if hello.name in self._names.values():
                log.warning("Node %d left out: another one is called %r too", node, hello.name)
                self.claimed.add(hello.name)
                continue
            self._names[node] = hello.name
            self.descriptions[hello.name] = hello.description
            self.memory[hello.name] = hello.memory

    def _ask(self, grid: Grid, present: set[int]) -> None:
        pending = {node for node, _ in self._asked.values()}
        new = sorted(present - self._names.keys() - pending)
        if not new:
            return
        ask = RecordDict({CONFIG: ConfigRecord()})
        sent = grid.push_messages([Message(ask, node, HELLO) for node in new])
        now = time.monotonic()
        for message, node in zip(sent, new, strict=True):
            if message:  # Flower's own grid gives None for one that it could not take
                self._asked[message] = (node, now)

    def _answers(self, grid: Grid, enough: int | None) -> list[Message]:
        """Collect the answers to what was asked; who is silent for too long is asked anew later."""
        replies: list[Message] = []
        began = heard = time.monotonic()
        while self._asked:
            arrived = list(grid.pull_messages(list(self._asked)))
            for reply in arrived:
                asked = self._asked.pop(reply.metadata.reply_to_message_id, None)
                if asked is not None:
                    say_who_was_asked(reply, asked[0])
            replies += arrived
            if arrived:
                heard = time.monotonic()
                continue
            now = time.monotonic()
            known = len(self._names) + len(replies)
            if enough is not None and known >= enough and now - began > GRACE_SECONDS:
                break
            if now - heard > HELLO_SECONDS:
                self._asked.clear()
                break
            _pause(heard)
        return replies

    def _heard(self, reply: Message) -> Hello | None:
        """Read a node's answer; None where it has to be asked again."""
        node = reply.metadata.src_node_id
        if not reply.has_error():
            with suppress(UpdateError):
                return Hello.decode(reply.content)
        if self._ours:
            reason = trouble_of(reply) or "no name"
            log.warning("Node %d does not say its name yet: %s", node, reason)
            return None
        return Hello(str(node))  # who is no client of ours is called by its id

    def wait(self, grid: Grid, wanted: int, deadline: float) -> None:
        """Wait until so many clients are there.

        Raises:
            RunError: they are not within the deadline, in seconds; or two give the same name.
        """
        began = time.monotonic()
        self.refresh(grid, wanted)
        while len(self._names) < wanted or self.claimed:
            if self.claimed:
                raise RunError(
                    f"two nodes call themselves {min(self.claimed)!r}",
                    "Give every client its own name (partition-id, in a simulation).",
                )
            if time.monotonic() - began > deadline:
                known = ", ".join(self.names()) or "none"
                raise RunError(
                    f"{len(self._names)} of {wanted} clients connected within {deadline:.0f} s "
                    f"({known})",
                    "Start the missing clients, or lower federation.clients.",
                )
            _pause(began)
            self.refresh(grid, wanted)
