"""Sort a round's replies while they arrive: used, refused or failed, each with its reason.

A reply is checked and spooled on arrival and then let go, so memory does not grow with clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from flwr.app import Message, MetricRecord, MetricRecordValues

from fedgraft.adapter import Tensors, from_arrays, natural_order
from fedgraft.errors import (
    BUDGET,
    DIVERGED,
    LIFETIME,
    POLICY,
    BudgetSpentError,
    ConfigError,
    RunError,
    UpdateError,
)
from fedgraft.messages import Reply, array_bytes
from strategies.rounds import ClientReport
from strategies.spool import UpdateSpool
from strategies.validation import Intake, check_weight, norm, outliers

_Value = TypeVar("_Value")


@dataclass
class Training:
    """The replies of one round of training.

    Attributes:
        intake: what a valid update looks like, and how it is put into the server's terms.
        spool: where valid updates go.
        reports: of the clients whose update was spooled.
        failed: clients that gave no update, with the reason.
        refused: clients whose update was not valid, with the reason.
        bytes_up: payload of all arrays that arrived.
        ranks: of the clients whose rank is not the server's.
        companion_norms: of what the rule sends beside the adapter, by client.
    """

    intake: Intake
    spool: UpdateSpool
    reports: dict[str, ClientReport] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    bytes_up: int = 0
    ranks: dict[str, int] = field(default_factory=dict)
    companion_norms: dict[str, float] = field(default_factory=dict)

    def take(self, client: str, message: Message) -> str:
        """Sort one reply; return what is wrong with it, or "" when its update was spooled."""
        trouble = _failure(message)
        if trouble:
            self.failed[client] = trouble
            return trouble
        try:
            reply = Reply.decode(message.content)
            if reply.refusal:
                self.failed[client] = reply.refusal
                return reply.refusal
            if reply.arrays is None:
                raise UpdateError("the reply has no arrays")
            self.bytes_up += array_bytes(message.content)
            companions: Tensors = {}
            if reply.companions is not None:
                companions = from_arrays(reply.companions, {})
            tensors = from_arrays(reply.arrays, self.intake.sparse_entries)
            rank = self.intake.check(client, tensors, companions, reply.weight)
            tensors = self.intake.in_server_terms(tensors, rank)
            self.spool.add(client, reply.weight, tensors | companions, rank=rank)
            if rank is not None:
                self.ranks[client] = rank
            if companions:
                self.companion_norms[client] = norm(companions)
        except UpdateError as error:
            self.refused[client] = error.message
            return error.message
        self.reports[client] = ClientReport(reply.weight, reply.metrics)
        return ""

    def refuse_outliers(self) -> dict[str, str]:
        """Refuse updates that only the others show to be absurd; return them, with the reasons."""
        found = outliers(self.companion_norms)
        for client in found:
            self.spool.remove(client)
            del self.reports[client]
            self.ranks.pop(client, None)
        self.refused |= found
        return found

    def missing(self, sampled: list[str]) -> list[str]:
        """Count sampled clients that never answered as failed, and return them."""
        answered = self.reports.keys() | self.failed.keys() | self.refused.keys()
        silent = [client for client in sampled if client not in answered]
        self.failed |= dict.fromkeys(silent, "no reply within the deadline")
        return silent

    def require(self, round: int, least: int) -> None:
        """Check that enough updates are usable.

        Raises:
            RunError: they are not; every reason is told, with the clients that have it.
            ConfigError: they are not, and every reason is a client's policy: it will not do better.
            BudgetSpentError: they are not, and every reason is a privacy budget.
        """
        if len(self.reports) >= least:
            return
        told: dict[str, list[str]] = {}
        reasons_of = in_order(self.failed | self.refused)
        for client, reason in reasons_of.items():
            told.setdefault(reason, []).append(client)
        text = (
            f"round {round}: {len(self.reports)} usable updates, fewer than the {least} that "
            "federation.min-clients asks for"
        )
        if told and all(_of_budget(client, reason) for client, reason in reasons_of.items()):
            clients = ", ".join(reasons_of)
            own = [why for client, why in reasons_of.items() if why.startswith(POLICY)]
            raise BudgetSpentError(
                "; ".join([f"{text}: {BUDGET} of client {clients}", *own]),
                "Go on without these clients." if own else "Raise privacy.target-epsilon.",
            )
        diverged = bool(told) and all(DIVERGED in reason for reason in told)
        reasons = "; ".join(f"client {', '.join(names)}: {why}" for why, names in told.items())
        if told and all(
            why.startswith(f"{POLICY} {client}, ") for client, why in reasons_of.items()
        ):
            raise ConfigError(
                f"{text} ({reasons})",
                "Change the run's config, or let those clients change these clauses.",
            )
        raise RunError(
            f"{text} ({reasons or 'no client was there to ask'})",
            "Lower train.lr or set train.grad-clip in a new run: a resume keeps both."
            if diverged
            else "Mend those clients, or lower federation.min-clients.",
        )


def _of_budget(client: str, reason: str) -> bool:
    """Whether a client gives no update since a run's budget, or its lifetime's, is spent."""
    return reason.startswith((BUDGET, f"{POLICY} {client}, {LIFETIME}: "))


def trouble_of(message: Message) -> str:
    """Return why a client did not do what it was asked, "" when it says that it did."""
    trouble = _failure(message)
    if trouble:
        return trouble
    try:
        return Reply.decode(message.content).refusal
    except UpdateError as error:
        return error.message


def evaluation(message: Message) -> tuple[ClientReport | None, str]:
    """Read a reply to an evaluation: the client's report, or why there is none."""
    trouble = _failure(message)
    if trouble:
        return None, trouble
    try:
        reply = Reply.decode(message.content)
        if reply.refusal:
            return None, reply.refusal
        check_weight(reply.weight)
    except UpdateError as error:
        return None, error.message
    return ClientReport(reply.weight, reply.metrics), ""


def mean_metrics(reports: Mapping[str, ClientReport]) -> MetricRecord | None:
    """Average the metrics that all clients report, weighted by examples; None without clients."""
    if not reports:
        return None
    total = sum(report.examples for report in reports.values())
    names = set.intersection(*(set(report.metrics) for report in reports.values()))
    means: dict[str, MetricRecordValues] = {
        name: sum(r.examples * r.metrics[name] for r in reports.values()) / total
        for name in sorted(names)
    }
    return MetricRecord(means)


def in_order(named: Mapping[str, _Value]) -> dict[str, _Value]:
    """Return what clients sent in the natural order of their names, not that of arrival."""
    return {name: named[name] for name in sorted(named, key=natural_order)}


def _failure(message: Message) -> str:
    """Return why a node sent an error instead of a reply; the last line of a traceback."""
    if not message.has_error():
        return ""
    lines = (message.error.reason or "").strip().splitlines()
    return lines[-1] if lines else f"Flower's error {message.error.code}"
