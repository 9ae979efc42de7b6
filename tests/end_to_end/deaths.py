"""Processes that run `fedgraft` and kill themselves, with signal 9, at a named moment.

They are real processes and real kills; patches in them only choose the moment, so that a test
hits it every time.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at(call: int, function: Callable[..., Any], before: bool) -> Callable[..., Any]:
    """Wrap a function: the n-th call of it kills the process, before or after its work."""
    calls = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if before and calls == call:
            _die()
        made = function(*arguments, **options)
        if not before and calls == call:
            _die()
        return made

    return wrapped


def in_training(round: int) -> None:
    """Between two clients' training of a round: the second has trained and not yet answered."""
    from client import seat

    train, calls = seat.train, 0

    def wrapped(
        model: Any, task: Any, examples: Any, start: Any, work: Any, *more: Any, **options: Any
    ) -> Any:
        nonlocal calls
        calls += work.round == round
        made = train(model, task, examples, start, work, *more, **options)
        if calls == 2:
            _die()
        return made

    seat.train = wrapped


def in_aggregation(round: int) -> None:
    """In the middle of a round's layers."""
    from strategies import aggregation

    layer, calls = aggregation.RoundHost._layer, 0

    def wrapped(self: Any, context: Any, factors: Any) -> Any:
        nonlocal calls
        calls += context.round == round
        if calls == 5:
            _die()
        return layer(self, context, factors)

    aggregation.RoundHost._layer = wrapped  # type: ignore[method-assign]


def _writing(is_it: Callable[[Path], bool], *, whole: bool = False) -> None:
    """Half way through the temporary file of a path, or just before the whole one is renamed."""
    from fedgraft import files

    write = files.write_bytes

    def wrapped(path: Path, content: bytes) -> None:
        if is_it(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            temporary.write_bytes(content if whole else content[: len(content) // 2])
            _die()
        write(path, content)

    files.write_bytes = wrapped


def writing_a_checkpoint(round: int) -> None:
    """Half of a checkpoint's temporary file is written."""
    _writing(lambda path: path.parent.name == "checkpoints" and str(round) in path.name)


def renaming_a_checkpoint(round: int) -> None:
    """A checkpoint's temporary file is whole, and not yet renamed."""
    _writing(lambda path: path.parent.name == "checkpoints" and str(round) in path.name, whole=True)


def writing_personal_state(round: int) -> None:
    """Half of a client's own state of a round is written."""
    _writing(lambda path: "personal" in path.parts and str(round) in path.name)


def writing_the_adapter(round: int) -> None:
    """All rounds are done, and half of the adapter's file is written."""
    _writing(lambda path: path.name == "adapter_model.safetensors")


def writing_the_summary(round: int) -> None:
    """All is there but the summary, the sign that the run has finished."""
    _writing(lambda path: path.name == "summary.json")


def writing_a_record(round: int) -> None:
    """Half of a round's line in rounds.jsonl is written, and its checkpoint is not."""
    from fedgraft.run_directory import RunDirectory

    def wrapped(directory: RunDirectory, record: dict[str, Any]) -> None:
        if record["round"] == round:
            with directory.rounds_file.open("a") as file:
                file.write(str(record)[:200])
            _die()
        append(directory, record)

    append = RunDirectory.append_round
    RunDirectory.append_round = wrapped  # type: ignore[method-assign]


def drawing(round: int) -> None:
    """The run has finished, its plots have not."""
    from server import session

    session.save_plots = _at(1, session.save_plots, before=True)


def fedgraft(arguments: list[str], moment: str = "", round: int = 0, says: str = "") -> None:
    """Run the command line in this process until the moment of its death.

    Args:
        arguments: of the command line.
        moment: the name of a function above; "" to live on.
        round: the round that the moment is in.
        says: a file for its standard error; nowhere by default.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(says or os.devnull, os.O_WRONLY | os.O_CREAT), 2)
    from fedgraft.cli import main

    if moment:
        globals()[moment](round)
    main(arguments)
