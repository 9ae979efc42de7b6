"""The screen: progress bars on a terminal, plain lines elsewhere, for one run or many.

It follows the runs' progress files from a thread of its own, so it shows a run in this process, in
a worker or in Flower's processes alike.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fedgraft.run_directory import RunDirectory
from server.progress import FINISHED, REPLY, ROUND, SAMPLED, START, ProgressReader
from server.units import Unit

_POLL_SECONDS = 0.2
_LINES_A_RUN = 10


class Screen:
    """Show runs while the block lasts.

    Args:
        runs: run directories by the label to show.
        console: where to; the standard error by default, which leaves standard output to results.
    """

    def __init__(self, runs: Mapping[str, RunDirectory], console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._runs = {label: _Run(label, directory) for label, directory in runs.items()}
        self._bars = self._make_bars() if self.console.is_terminal else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._total: TaskID | None = None

    def __enter__(self) -> Screen:
        if self._bars is not None:
            self._bars.start()
            if len(self._runs) > 1:
                self._total = self._bars.add_task("all runs", total=len(self._runs), detail="")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._poll()
        if self._bars is not None:
            self._bars.stop()

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def _make_bars(self) -> Progress:
        return Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[detail]}"),
            TextColumn("[dim]left"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self.console,
            transient=True,
        )

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._poll()

    def _poll(self) -> None:
        for run in self._runs.values():
            for event in run.reader.events():
                run.take(event)
                if self._bars is None:
                    self._print(run, event)
                else:
                    self._draw(run, event, self._bars)

    def _draw(self, run: _Run, event: dict[str, Any], bars: Progress) -> None:
        if event["event"] == START:
            run.bar = bars.add_task(
                run.label, total=run.rounds, completed=run.round, detail=run.detail()
            )
        elif run.bar is not None:
            bars.update(run.bar, completed=run.round, total=run.rounds, detail=run.detail())
        if event["event"] == FINISHED:
            if run.bar is not None:
                bars.remove_task(run.bar)
            if self._total is not None:
                bars.advance(self._total)
            self.say(run.result(event))

    def _print(self, run: _Run, event: dict[str, Any]) -> None:
        if event["event"] == FINISHED:
            self.say(run.result(event))
        elif event["event"] == ROUND:
            step = max(1, run.rounds // _LINES_A_RUN)
            if run.round % step == 0 or run.round == run.rounds:
                self.say(f"{run.label}: round {run.round}/{run.rounds}  {run.detail()}")


class _Run:
    """What the events of one run add up to."""

    def __init__(self, label: str, directory: RunDirectory) -> None:
        self.label = label
        self.reader = ProgressReader(directory.progress)
        self.bar: TaskID | None = None
        self.round, self.rounds = 0, 1
        self.unit: Unit | None = None
        self._sampled, self._answered, self._trouble = 0, 0, 0
        self._value: float | None = None
        self._loss: float | None = None

    def take(self, event: dict[str, Any]) -> None:
        """Take one event in."""
        kind = event["event"]
        if kind == START:
            self.round, self.rounds = event["round"], event["rounds"]
            self.unit = Unit(event["metric"])
        elif kind == SAMPLED:
            self._sampled, self._answered = len(event["clients"]), 0
        elif kind == REPLY:
            self._answered += 1
            self._trouble += bool(event["trouble"])
        elif kind == ROUND:
            self.round = event["round"]
            self._value = event["value"] if event["value"] is not None else self._value
            self._loss = event["loss"]

    def detail(self) -> str:
        """Return clients, metric and loss of the moment."""
        parts = []
        if self._sampled:
            parts.append(f"clients {self._answered}/{self._sampled}")
        if self._value is not None and self.unit is not None:
            parts.append(f"validation {self.unit.name} {self.unit.value(self._value)}")
        if self._loss is not None:
            parts.append(f"loss {self._loss:.3f}")
        if self._trouble:
            parts.append(f"[yellow]{self._trouble} failed or refused[/yellow]")
        return "  ".join(parts)

    def result(self, event: dict[str, Any]) -> str:
        """Return the line that stays when the run has finished."""
        unit = self.unit or Unit("metric")
        return (
            f"[green]done[/green] {self.label}: test {unit.name} {unit.value(event['final'])} "
            f"(adapter of round {event['best_round']} of {self.round})"
        )
