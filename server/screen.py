"""The screen: progress bars on a terminal, plain lines elsewhere, for one run or many.

It follows the runs' progress files from a thread of its own, so it shows a run in this process, in
a worker or in Flower's processes alike. All of it goes to the standard error, which leaves the
standard output to results.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.status import Status
from rich.table import Column

from server.progress import FINISHED, HANDED_OUT, REPLY, ROUND, SAMPLED, START, ProgressReader
from server.units import Unit

_POLL_SECONDS = 0.2
_LINES, _LINES_OF_MANY = 10, 4
"""Plain lines a run, when it is alone and when it is one of many."""
_TROUBLES_SHOWN = 3
_WIDE = 100
"""Columns from which a terminal has room for long bars."""


def busy(text: str) -> Status:
    """Show on a terminal that something goes on while the block lasts."""
    return Console(stderr=True).status(text)


class Screen:
    """Show runs while the block lasts.

    Args:
        runs: progress files by the label to show.
        rows: labels of work without rounds, the reference rows of a comparison.
        console: where to; the standard error by default.
        at_work: the runs are at work already, and are shown from their last start on.
    """

    def __init__(
        self,
        runs: Mapping[str, Path],
        rows: Collection[str] = (),
        console: Console | None = None,
        *,
        at_work: bool = False,
    ) -> None:
        self.console = console or Console(stderr=True)
        read = ProgressReader.of_session if at_work else ProgressReader
        self._runs = {label: _Run(label, read(progress)) for label, progress in runs.items()}
        self._rows: dict[str, TaskID | None] = dict.fromkeys(rows)
        self._jobs = len(runs) + len(rows)
        self._rows_done = 0
        self._pace = _Pace()
        self._bars = self._make_bars() if self.console.is_terminal else None
        self._total: TaskID | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Screen:
        if self._bars is not None:
            self._bars.start()
            if self._jobs > 1:
                self._total = self._bars.add_task(
                    f"all {self._jobs} jobs", total=self._jobs, detail="starting", left=""
                )
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

    def started(self, label: str) -> None:
        """Show that a job is being worked on; a run tells so itself."""
        with self._lock:
            if self._bars is not None and label in self._rows and self._rows[label] is None:
                self._rows[label] = self._bars.add_task(
                    label, total=None, detail="reference row", left=""
                )

    def done(self, label: str, metric: str, final: float) -> None:
        """Show what a job came to; a run that has just finished has told so itself."""
        self._poll()
        result = f"{escape(label)}: {_result(Unit(metric), final)}"
        with self._lock:
            if label in self._runs:
                if not self._runs[label].done:
                    self._runs[label].done = True
                    self._say(f"[green]done[/green] {result} (before)")
                return
            bar = self._rows[label]
            if self._bars is not None and bar is not None:
                self._bars.remove_task(bar)
            self._rows_done += 1
            self._say(f"[green]done[/green] {result}")

    def say(self, text: str) -> None:
        """Print a line that stays on the screen, in plain words."""
        with self._lock:
            self._say(escape(text))

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def _make_bars(self) -> Progress:
        wide = self.console.width >= _WIDE
        label = Column(no_wrap=True, overflow="ellipsis", max_width=self.console.width // 3)
        return Progress(
            TextColumn("{task.description}", style="bold", markup=False, table_column=label),
            BarColumn(bar_width=24 if wide else 10, table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[detail]}"),
            TextColumn("[dim]{task.fields[left]}"),
            console=self.console,
            transient=True,
        )

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._poll()

    def _poll(self) -> None:
        with self._lock:
            for run in self._runs.values():
                for event in run.reader.events():
                    run.take(event)
                    self._tell(run, event)
                if self._bars is not None:
                    self._draw(run, self._bars)
            if self._bars is not None and self._total is not None:
                self._draw_total(self._bars, self._total)

    def _tell(self, run: _Run, event: dict[str, Any]) -> None:
        """Print what stays on the screen."""
        kind, name = event["event"], escape(run.label)
        if kind == FINISHED:
            result = _result(run.unit, event["final"])
            round = f"the adapter of round {event['best_round']} of {run.round}"
            self._say(f"[green]done[/green] {name}: {result}, {round}")
        elif kind == REPLY and event["trouble"] and run.troubles <= _TROUBLES_SHOWN:
            where = f"{name}, round {event['round']}, client {escape(event['client'])}"
            trouble = escape(" ".join(event["trouble"].split()))
            self._say(f"[yellow]{where}:[/yellow] {trouble}")
        elif kind == HANDED_OUT:
            missed = "".join(f"; not {escape(n)}: {escape(w)}" for n, w in event["missed"].items())
            self._say(f"{name}: {event['kept']} clients keep the final adapter{missed}")
        elif kind == ROUND and self._bars is None:
            lines = _LINES if self._jobs == 1 else _LINES_OF_MANY
            if run.round % max(1, run.rounds // lines) == 0 or run.round == run.rounds:
                self._say(f"{name}: {run.line()}")

    def _draw(self, run: _Run, bars: Progress) -> None:
        if run.done or not (run.active or self._jobs == 1):
            if run.bar is not None:
                bars.remove_task(run.bar)
                run.bar = None
            return
        if run.bar is None:
            run.bar = bars.add_task(run.label, total=1.0, detail="", left="")
        room = self.console.width - min(len(run.label), self.console.width // 3) - 23
        bars.update(
            run.bar,
            completed=run.share,
            detail=run.detail(room - (14 if self.console.width >= _WIDE else 0)),
            left=run.pace.left(),
        )

    def _draw_total(self, bars: Progress, total: TaskID) -> None:
        done = self._rows_done + sum(run.done for run in self._runs.values())
        work = self._rows_done + sum(1.0 if run.done else run.share for run in self._runs.values())
        if work:
            self._pace.note(work / self._jobs)
            bars.update(
                total,
                completed=work,
                detail=f"{done}/{self._jobs} done",
                left=self._pace.left(),
            )


class _Pace:
    """Time left, from how long the share of the work that was watched took."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None
        self._last = (0.0, 0.0)

    def note(self, share: float) -> None:
        """Take in that so much is done, of 1."""
        if self._first is None:
            self._first = (time.monotonic(), share)
        if self._last[1] != share:
            self._last = (time.monotonic(), share)

    def left(self) -> str:
        """Return "1:05 left"; nothing as long as it cannot be told."""
        if self._first is None or self._last[1] <= self._first[1]:
            return ""
        (began, before), (now, share) = self._first, self._last
        rest = (now - began) / (share - before) * (1 - share) - (time.monotonic() - now)
        minutes, seconds = divmod(max(0, round(rest)), 60)
        hours, minutes = divmod(minutes, 60)
        clock = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
        return f"{clock} left"


class _Run:
    """What the events of one run add up to."""

    def __init__(self, label: str, reader: ProgressReader) -> None:
        self.label = label
        self.reader = reader
        self.bar: TaskID | None = None
        self.pace = _Pace()
        self.active, self.done = False, False
        self.round, self.rounds = 0, 1
        self.troubles = 0
        self.unit = Unit("metric")
        self._sampled, self._answered = 0, 0
        self._within = 0.0
        self._value: float | None = None
        self._loss: float | None = None

    @property
    def share(self) -> float:
        """How much of the run is done, of 1; a client's reply counts as its part of a round."""
        return (self.round + self._within) / self.rounds

    def take(self, event: dict[str, Any]) -> None:
        """Take one event in."""
        kind = event["event"]
        if kind == START:
            self.round, self.rounds = event["round"], max(1, event["rounds"])
            self.unit = Unit(event["metric"])
            self.active = True
        elif kind == SAMPLED:
            self._sampled, self._answered = len(event["clients"]), 0
        elif kind == REPLY:
            self._answered += 1
            self._within = self._answered / max(1, self._sampled)
            self.troubles += bool(event["trouble"])
        elif kind == ROUND:
            self.round, self._within = event["round"], 0.0
            self._value = event["value"] if event["value"] is not None else self._value
            self._loss = event["loss"]
        elif kind == FINISHED:
            self.done = True
        self.pace.note(self.share)

    def line(self) -> str:
        """Return round, validation and loss, for a line of its own."""
        parts = [f"round {self.round}/{self.rounds}"]
        if self._value is not None:
            parts.append(f"validation {self.unit.name} {self.unit.value(self._value)}")
        if self._loss is not None:
            parts.append(f"training loss {self._loss:.3f}")
        if self.troubles:
            parts.append(f"[yellow]{self.troubles} updates failed or refused[/yellow]")
        return ", ".join(parts)

    def detail(self, room: int) -> str:
        """Return the same and the clients that have answered, as far as the columns reach."""
        if not self.active:
            return "starting"
        parts = {"round": f"{self.round}/{self.rounds}"}
        if self._value is not None:
            parts["validation"] = f"validation {self.unit.value(self._value)}"
        if self._sampled:
            parts["clients"] = f"clients {self._answered}/{self._sampled}"
        if self._loss is not None:
            parts["loss"] = f"loss {self._loss:.3f}"
        if self.troubles:
            parts["troubles"] = f"[yellow]{self.troubles} failed[/yellow]"
        shown: list[str] = []
        for part in ("round", "validation", "troubles", "clients", "loss"):
            text = parts.get(part, "")
            if text and len("  ".join([*shown, text])) <= room:
                shown.append(text)
        return "  ".join(shown)


def _result(unit: Unit, value: float) -> str:
    return f"test {unit.name} {unit.value(value)}"
