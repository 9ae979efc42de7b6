"""Checkpoints: all that the next round depends on, in one file that is whole or not there.

A checkpoint is a safetensors file: the global adapter, the best one so far and the rule's own
tensors, with a little JSON in the header. It is written under a temporary name, synced and
renamed, so a run killed at any moment finds its last whole one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedgraft.adapter import Adapter, Tensors
from fedgraft.errors import RunError, UpdateError
from fedgraft.files import read_tensors, write_tensors
from strategies.rounds import StrategyState

log = logging.getLogger(__name__)
_NAME = re.compile(r"round-(\d+)\.safetensors")
_ADAPTER, _BEST, _RULE = "adapter/", "best/", "rule/"
_RESIDUAL, _BEST_RESIDUAL = "residual/", "best-residual/"


@dataclass(frozen=True)
class Checkpoint:
    """A run after some round.

    Attributes:
        state: the strategy's state.
        best: the adapter of the best round so far on validation, None before any.
        notes: the run's own bookkeeping, as JSON values.
    """

    state: StrategyState
    best: Adapter | None
    notes: Mapping[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run, the newest few of them.

    Args:
        folder: where they lie.
        keep: how many to keep; the one before the last serves should the last be damaged.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def _files(self) -> dict[int, Path]:
        found = {}
        for path in self.folder.glob("round-*.safetensors"):
            if match := _NAME.fullmatch(path.name):
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    def oldest_round(self) -> int:
        """Return the oldest round that could be resumed from; 0 when there is none."""
        return next(iter(self._files()), 0)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint and drop those beyond `keep`.

        Raises:
            RunError: the disk is full; the checkpoints before are intact.
        """
        state = checkpoint.state
        tensors: Tensors = _prefixed(_ADAPTER, state.adapter.tensors())
        tensors |= _prefixed(_RESIDUAL, state.adapter.residual_tensors())
        tensors |= _prefixed(_RULE, state.rule)
        current_is_best = checkpoint.best is state.adapter  # then it is written only once
        if checkpoint.best is not None and not current_is_best:
            tensors |= _prefixed(_BEST, checkpoint.best.tensors())
            tensors |= _prefixed(_BEST_RESIDUAL, checkpoint.best.residual_tensors())
        notes = {
            "round": state.round,
            "scalings": state.adapter.scalings,
            "current-is-best": current_is_best,
            "ranks": dict(state.ranks),
            "holders": sorted(state.holders),
            "constants-hash": state.constants_hash,
            "counted": dict(state.counted),
            "clips": list(state.clips),
            "run": checkpoint.notes,
        }
        write_tensors(self.folder / f"round-{state.round:06d}.safetensors", tensors, notes)
        files = self._files()
        for round in list(files)[: -self.keep]:
            files[round].unlink(missing_ok=True)

    def latest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint, or None for a run that has none yet.

        Raises:
            RunError: there are checkpoints and every one of them is damaged.
        """
        files = self._files()
        trouble: RunError | None = None
        for path in reversed(files.values()):
            try:
                return _read(path)
            except RunError as error:
                log.warning("Checkpoint passed over: %s", error)
                trouble = error
        if trouble is not None:
            raise RunError(
                f"no checkpoint in {self.folder} can be read: {trouble.message}",
                "Restore one from a backup, or start again with another --out.",
            )
        return None


def _prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _read(path: Path) -> Checkpoint:
    tensors, notes = read_tensors(path)
    try:
        return _decoded(tensors, notes)
    except (KeyError, TypeError, ValueError, UpdateError) as error:
        raise RunError(f"{path} is no checkpoint of this version: {error}") from error


def _decoded(tensors: Tensors, notes: Mapping[str, Any]) -> Checkpoint:
    scalings = notes["scalings"]
    adapter = Adapter.from_tensors(_under(_ADAPTER, tensors), scalings)
    adapter = adapter.with_residual(_under(_RESIDUAL, tensors))
    best: Adapter | None = adapter
    if not notes["current-is-best"]:
        own = _under(_BEST, tensors)
        best = Adapter.from_tensors(own, scalings) if own else None
        if best is not None:
            best = best.with_residual(_under(_BEST_RESIDUAL, tensors))
    state = StrategyState(
        int(notes["round"]),
        adapter,
        _under(_RULE, tensors),
        ranks=notes["ranks"],
        holders=frozenset(notes["holders"]),
        constants_hash=notes["constants-hash"],
        counted=notes["counted"],
        clips=tuple(notes["clips"]),
    )
    return Checkpoint(state, best, notes["run"])
