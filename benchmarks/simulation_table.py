"""What benchmarks/simulation.py prints of its rivals, and what it asks of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from rich.table import Table
from simulation_workload import Stopwatch
from torch import Tensor

PLAIN_TARGET = 1.1
REBUILDING_TARGET = 3.0
PLAIN_TOLERANCE = 1e-6  # between the adapters of (a) and (b); (b) and (c) must agree bit for bit
RIVAL_TOLERANCE = 1e-5  # (d) and (e) sum in float32
Adapter = dict[str, Tensor]


@dataclass
class Row:
    """One rival: seconds of its runs, and those of (a) beside it, run for run.

    Attributes:
        seconds, plain_seconds: wall clock.
        processor, plain_processor: of the process; empty where several work.
        whole: wall clock with what comes before the first training message.
    """

    label: str
    seconds: list[float] = field(default_factory=list)
    plain_seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    plain_processor: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    adapter: Adapter = field(default_factory=dict)
    plain_adapter: Adapter = field(default_factory=dict)

    def add(self, watch: Stopwatch, beside: Stopwatch) -> None:
        """Add a run."""
        self.seconds.append(watch.seconds)
        self.processor.append(watch.processor)
        self.plain_seconds.append(beside.seconds)
        self.plain_processor.append(beside.processor)


def table(rows: Mapping[str, Row]) -> Table:
    """Medians over runs; the ratios' range too."""
    made = Table(title="Seconds, and ratios to (a)")
    made.add_column("")
    for column in ("seconds", "(a) beside", "ratio", "range", "processor", "whole", "adapter"):
        made.add_column(column, justify="right")
    plain = rows["a"]
    for key, row in rows.items():
        cells = [""] * 7
        if row.seconds:
            ratios = ratios_of(row, plain)
            cells = [
                f"{median(row.seconds):.2f}",
                f"{median(row.plain_seconds):.2f}" if row.plain_seconds else "",
                f"{median(ratios):.2f}",
                f"{min(ratios):.2f}-{max(ratios):.2f}" if row.plain_seconds else "",
                f"{median(quotients(row.processor, row.plain_processor)):.2f}"
                if row.processor
                else "",
                f"{median(row.whole):.2f}" if row.whole else "",
                difference(row.adapter, plain.adapter),
            ]
        made.add_row(row.label, *(cells if key != "a" else [cells[0]]))
    return made


def ratios_of(row: Row, plain: Row) -> list[float]:
    """To (a) beside it, run for run; to the median of (a) where none ran beside."""
    if row.plain_seconds:
        return quotients(row.seconds, row.plain_seconds)
    return [seconds / median(plain.seconds) for seconds in row.seconds]


def quotients(values: list[float], others: list[float]) -> list[float]:
    return [value / other for value, other in zip(values, others, strict=True)]


def distance(adapter: Adapter, other: Adapter) -> float:
    """Largest absolute difference of an entry; infinite where names differ."""
    if adapter.keys() != other.keys():
        return float("inf")
    return max(float((adapter[name] - other[name]).abs().max()) for name in adapter)


def difference(adapter: Adapter, other: Adapter) -> str:
    found = distance(adapter, other)
    return "equal" if found == 0.0 else f"within {found:.0e}"


def check_adapters(rows: Mapping[str, Row]) -> list[tuple[bool, str]]:
    found = {
        key: distance(row.adapter, rows["a"].adapter) for key, row in rows.items() if row.adapter
    }
    mine = max(found[key] for key in ("b", "c") if key in found)
    verdicts = [
        (mine <= PLAIN_TOLERANCE, f"FedGraft's adapter is (a)'s, within {PLAIN_TOLERANCE:g}")
    ]
    if "c" in rows:
        same = distance(rows["b"].adapter, rows["c"].adapter) == 0.0
        verdicts.append((same, "(b) and (c) end with the same adapter, bit for bit"))
    if {"d", "e"} & found.keys():
        met = max(found.values()) <= RIVAL_TOLERANCE
        verdicts.append((met, f"(d) and (e) end with it too, within {RIVAL_TOLERANCE:g}"))
    return verdicts


def check_times(rows: Mapping[str, Row]) -> list[tuple[bool, str]]:
    found = median(ratios_of(rows["b"], rows["a"]))
    verdicts = [
        (found <= PLAIN_TARGET, f"(b) takes {found:.2f} x (a), target {PLAIN_TARGET:g} at most")
    ]
    if "d" in rows:
        found = median(rows["d"].seconds) / median(rows["b"].seconds)
        text = f"(b) is {found:.1f} x faster than (d), target {REBUILDING_TARGET:g} at least"
        verdicts.append((found >= REBUILDING_TARGET, text))
    return verdicts
