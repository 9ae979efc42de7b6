"""A round's record, as rounds.jsonl holds it, and the same as TensorBoard events on request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgraft.adapter import natural_order
from fedgraft.errors import ConfigError
from strategies.rounds import RoundOutcome

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


OWN_SECONDS = ("evaluate",)
"""Phases of a round whose length tells nothing of who took part: the server's own."""


def round_record(
    outcome: RoundOutcome,
    validation: Mapping[str, float] | None,
    learning_rate: float | None,
    *,
    keep_back: bool = False,
    privacy: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return one line of rounds.jsonl.

    Args:
        outcome: the round.
        validation: the server's metrics on the validation split, or None in a round without.
        learning_rate: of the round's first step; None for round 0.
        keep_back: leave out all that tells who took part, and what clients say of themselves: of a
            private run that is deployed nobody may see it.
        privacy: what the run has promised so far, see `server.guarantee`.
    """
    if keep_back:
        own = {name: outcome.seconds[name] for name in OWN_SECONDS if name in outcome.seconds}
        outcome = RoundOutcome(outcome.state, seconds=own, notes=outcome.notes)
    names = sorted(outcome.reports.keys() | outcome.validation.keys(), key=natural_order)
    bias = outcome.bias
    return {
        "round": outcome.state.round,
        "lr": learning_rate,
        "train_loss": _mean_loss(outcome),
        "validation": finite(validation) if validation is not None else None,
        "clients": {name: _client(outcome, name, counts=privacy is None) for name in names},
        "sampled": outcome.sampled,
        "failed": outcome.failed,
        "refused": outcome.refused,
        "bytes_up": None if keep_back else outcome.bytes_up,
        "bytes_down": None if keep_back else outcome.bytes_down,
        "bytes_evaluated": None if keep_back else outcome.bytes_evaluated,
        "seconds": outcome.seconds,
        "aggregation_bias": None
        if bias is None
        else {"before": bias.before, "after": bias.after, "repairable": bias.repairable},
        "epsilon": None if privacy is None else privacy["epsilon"],
        "privacy": None if privacy is None else dict(privacy),
        "notes": list(outcome.notes),
    } | _signal(outcome)


def _signal(outcome: RoundOutcome) -> dict[str, Any]:
    """Return how much of every layer's change is noise, in a study of privacy by client."""
    if not outcome.signal:
        return {}
    return {"signal_to_noise": {name: asdict(found) for name, found in outcome.signal.items()}}


def _client(outcome: RoundOutcome, name: str, *, counts: bool) -> dict[str, Any]:
    """Return one client's part of the record; under privacy its weight counts no examples."""
    found: dict[str, Any] = {}
    if report := outcome.reports.get(name):
        found |= {"examples": report.examples} if counts else {}
        found |= {
            "train_loss": report.metrics.get("loss"),
            "steps": report.metrics.get("steps"),
            "seconds": report.metrics.get("seconds"),
        }
    if own := outcome.validation.get(name):
        found["validation"] = dict(own.metrics)
    return found


def _mean_loss(outcome: RoundOutcome) -> float | None:
    """Average the clients' training losses, weighted by examples."""
    pairs = [
        (report.examples, report.metrics["loss"])
        for report in outcome.reports.values()
        if "loss" in report.metrics
    ]
    total = sum(examples for examples, _ in pairs)
    return sum(examples * loss for examples, loss in pairs) / total if total else None


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Replace what JSON cannot hold."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


class TensorBoard:
    """Write round records as TensorBoard event files.

    Args:
        folder: where the event files go.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "track.tensorboard is on, but TensorBoard is not installed",
                "Install it with: pip install 'fedgraft[tensorboard]'.",
            ) from None
        self._writer: SummaryWriter = SummaryWriter(str(folder))

    def close(self) -> None:
        """Write what is pending."""
        self._writer.close()

    def add(self, record: Mapping[str, Any]) -> None:
        """Add one round's numbers."""
        step = record["round"]
        scalars: dict[str, float | None] = {
            "train/loss": record["train_loss"],
            "train/lr": record["lr"],
            "bytes/up": record["bytes_up"],
            "bytes/down": record["bytes_down"],
        }
        for name, value in (record["validation"] or {}).items():
            scalars[f"validation/{name}"] = value
        for name, value in (record["aggregation_bias"] or {}).items():
            scalars[f"aggregation_bias/{name}"] = value
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)
