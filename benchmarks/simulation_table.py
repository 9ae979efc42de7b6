"""What benchmarks/simulation.py prints of its rivals, and what it asks of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.table import Table
from torch import Tensor

PLAIN_TARGET = 1.1
REBUILDING_TARGET = 3.0
PLAIN_TOLERANCE = 1e-6  # between the adapters of (a) and (b); (b) and (c) must agree bit for bit
RIVAL_TOLERANCE = 1e-5  # (d) and (e) sum in float32
Adapter = dict[str, Tensor]


@dataclass
class Row:
    """One rival: seconds of each turn (wall, and of this process's processor), and its adapter."""

    label: str
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    adapter: Adapter = field(default_factory=dict)


def table(rows: Mapping[str, Row]) -> Table:
    made = Table(title="Seconds, and ratios to (a)")
    made.add_column("")
    for column in ("median", "least", "most", "ratio", "processor ratio", "whole", "adapter"):
        made.add_column(column, justify="right")
    for key, row in rows.items():
        if not row.seconds:
            made.add_row(row.label)
            continue
        beside = rows["e0" if key.startswith("e") else "a"]
        made.add_row(
            row.label,
            f"{statistics.median(row.seconds):.2f}",
            f"{min(row.seconds):.2f}",
            f"{max(row.seconds):.2f}",
            f"{ratio(row.seconds, beside.seconds):.2f}",
            f"{ratio(row.processor, beside.processor):.2f}" if row.processor else "",
            f"{statistics.median(row.whole):.2f}",
            difference(row.adapter, rows["a"].adapter) if row.adapter and key != "a" else "",
        )
    return made


def ratio(seconds: list[float], others: list[float]) -> float:
    """The median over turns where both took the same turns, else the ratio of the medians."""
    if len(seconds) == len(others):
        return statistics.median(s / o for s, o in zip(seconds, others, strict=True))
    return statistics.median(seconds) / statistics.median(others)


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
    found = ratio(rows["b"].seconds, rows["a"].seconds)
    verdicts = [
        (found <= PLAIN_TARGET, f"(b) takes {found:.2f} x (a), target {PLAIN_TARGET:g} at most")
    ]
    if "d" in rows:
        found = ratio(rows["d"].seconds, rows["b"].seconds)
        text = f"(b) is {found:.1f} x faster than (d), target {REBUILDING_TARGET:g} at least"
        verdicts.append((found >= REBUILDING_TARGET, text))
    return verdicts
