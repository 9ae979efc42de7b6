"""The table at the end of a run or a comparison, its cells written once for screen and report."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedgraft.privacy.figures import rounded_up
from server.statistics import (
    START,
    Comparison,
    finals,
    label_of,
    mean_and_sd,
    mean_improvement,
    reference_finals,
    reference_label,
    references_by_strategy,
    short_labels,
)
from server.units import NOTHING, Unit, megabytes, number, seconds

REFERENCE_WORDS = {
    START: "The adapter that the runs started from: the untouched base, unless adapter.from named "
    "another.",
    "base": "The untouched model.",
    "alone": "Each client trains only on its own data, rounds x steps optimizer steps of its batch "
    "size, its optimizer kept (mean and range over clients).",
    "centralised": "The pooled data, rounds x steps optimizer steps, each on as many examples as "
    "all sampled clients see in one step (clients x batch), its optimizer kept: same optimizer "
    "steps and same examples as the federation, an upper bound.",
}
"""What the reference rows are, in the same words everywhere."""


@dataclass(frozen=True)
class StrategyRow:
    """One strategy's cells, as text.

    Attributes:
        label: the strategy's label; `name` is what it may be called beside the others.
        result: the test metric, mean ± standard deviation over seeds.
        difference: the mean paired difference from the first strategy; a dash for that one.
        interval: its 95% interval.
        gain: over the base (above zero is better in either direction).
        short: of centralised (above zero is worse).
        worst: the worst client's validation metric, the mean over seeds.
        apart: the standard deviation of that metric over clients, the mean over seeds.
        up, down: megabytes (10^6 bytes) sent in a whole run by all clients together, mean over
            runs; `sent` is their sum.
        wall, train, aggregate: seconds a run, mean.
        steps: optimizer steps of all clients together a run, mean.
        memory: peak megabytes of a run's own process, mean.
        epsilon: the privacy spent, the worst run's; "unknown" where a client does not tell.
    """

    label: str
    name: str
    seeds: int
    result: str
    difference: str
    interval: str
    gain: str
    short: str
    worst: str
    apart: str
    sent: str
    up: str
    down: str
    wall: str
    train: str
    aggregate: str
    steps: str
    memory: str
    epsilon: str

    @property
    def difference_and_interval(self) -> str:
        """Both in the room of a terminal: "+0.3 [−1.0, +1.5]"."""
        if self.interval == NOTHING:
            return NOTHING
        return f"{self.difference} [{self.interval.replace(' to ', ', ')}]"


@dataclass(frozen=True)
class ReferenceRow:
    """One reference row's cells, as text; `spread` is the range over clients, where it has one.

    Its `name` says what it is; its label tells it from others of the name.
    """

    name: str
    label: str
    result: str
    spread: str
    words: str


def strategy_rows(comparison: Comparison) -> list[StrategyRow]:
    """Return the rows of a comparison's strategies, the one that others are compared with first."""
    unit = _unit(comparison)
    direction = str(comparison["runs"][0]["direction"])
    base = references_by_strategy(comparison, "base")
    centralised = references_by_strategy(comparison, "centralised")
    by_label = finals(comparison["runs"])
    names = short_labels(list(by_label))
    rows = []
    for strategy in comparison["strategies"]:
        label = str(strategy["strategy"])
        runs = [run for run in comparison["runs"] if label_of(run) == label]
        middle, low, high = unit.differences(
            strategy["difference"], strategy["low"], strategy["high"]
        )
        ahead = mean_improvement(by_label[label], centralised[label], direction)
        clients = [run.get("client_metric") or {} for run in runs]
        up, down = _mean(runs, "bytes_up"), _mean(runs, "bytes_down")
        rows.append(
            StrategyRow(
                label=label,
                name=names[label],
                seeds=len(runs),
                result=unit.spread(strategy["mean"], strategy["sd"]),
                difference=middle,
                interval=NOTHING if low == NOTHING else f"{low} to {high}",
                gain=unit.difference(mean_improvement(by_label[label], base[label], direction)),
                short=unit.difference(None if ahead is None else -ahead),
                worst=unit.value(_mean(clients, "worst")),
                apart=unit.difference(_mean(clients, "sd"), signed=False),
                sent=megabytes(None if up is None or down is None else up + down),
                up=megabytes(up),
                down=megabytes(down),
                wall=seconds(_mean(runs, "wall_seconds")),
                train=seconds(_mean(runs, "train_seconds")),
                aggregate=seconds(_mean(runs, "aggregate_seconds")),
                steps=_whole(_mean(runs, "client_steps")),
                memory=megabytes(_mean(runs, "peak_memory_bytes")),
                epsilon=_epsilon(runs),
            )
        )
    return rows


def reference_rows(comparison: Comparison) -> list[ReferenceRow]:
    """Return the reference rows of a comparison, with what each of them is."""
    unit = _unit(comparison)
    rows = []
    for label, by_seed in reference_finals(comparison).items():
        entries = [row for row in comparison["references"] if reference_label(row) == label]
        name = str(entries[0]["name"]) if entries else START
        lows = [number(row["low"]) for row in entries if row.get("low") is not None]
        highs = [number(row["high"]) for row in entries if row.get("high") is not None]
        rows.append(
            ReferenceRow(
                name=name,
                label=label,
                result=unit.spread(*mean_and_sd(list(by_seed.values()))),
                spread=f"{unit.value(min(lows))} to {unit.value(max(highs))}"
                if lows and highs
                else "",
                words=REFERENCE_WORDS.get(name, ""),
            )
        )
    return rows


def base_name(comparison: Comparison) -> str:
    """Return what gains are over: "base", or "start" where no base row was computed."""
    return "base" if any(row["name"] == "base" for row in comparison["references"]) else START


WORST, TIME = "worst\nclient", "time,\ns"
SPARED = (WORST, TIME)
"""Columns that the report has, too, in the order in which a narrow screen does without them."""
_ROOMY = 1000


def fitting_table(comparison: Comparison, console: Console) -> Table:
    """Return `results_table` without the columns that a narrow console has no room for."""
    roomy = console.options.update(max_width=_ROOMY)  # measured here, it would always just fit
    table = results_table(comparison)
    for count in range(1, len(SPARED) + 1):
        if console.measure(table, options=roomy).maximum <= console.width:
            break
        table = results_table(comparison, SPARED[:count])
    return table


def results_table(comparison: Comparison, without: Collection[str] = ()) -> Table:
    """Return the table that the screen shows when a run or a comparison has finished.

    Args:
        comparison: what `statistics.build_comparison` returns; of one run for `simulate`. Columns
            that would be empty are left out.
        without: titles of more columns to leave out.
    """
    unit = _unit(comparison)
    rows = strategy_rows(comparison)
    columns: list[tuple[str, list[str]]] = [
        (f"test\n{unit.name}", [row.result for row in rows]),
        (
            f"difference{' in points' if unit.share else ''}\n[95% interval]",
            [row.difference_and_interval for row in rows],
        ),
        (f"over\n{base_name(comparison)}", [row.gain for row in rows]),
        ("short of\ncentral.", [row.short for row in rows]),
        (WORST, [row.worst for row in rows]),
        ("MB\nsent", [row.sent for row in rows]),
        ("epsilon", [row.epsilon for row in rows]),
        (TIME, [row.wall for row in rows]),
    ]
    shown = [
        (title, cells)
        for title, cells in columns
        if title not in without and any(c != NOTHING for c in cells)
    ]
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
    )
    table.add_column("strategy", vertical="bottom", overflow="fold", min_width=11)
    for title, _ in shown:
        table.add_column(title, justify="right", vertical="bottom", no_wrap=True)
    for row, *cells in zip(rows, *(cells for _, cells in shown), strict=True):
        table.add_row(Text(row.name), *(Text(cell) for cell in cells))
    table.add_section()
    for reference in reference_rows(comparison):
        table.add_row(Text(reference.label, style="dim"), Text(reference.result, style="dim"))
    return table


def _unit(comparison: Comparison) -> Unit:
    return Unit(str(comparison["runs"][0]["metric"]))


def _mean(runs: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return mean_and_sd([number(run.get(key)) for run in runs])[0]


def _epsilon(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the worst run's epsilon; what no number can say is none that may be passed over."""
    if any((run.get("privacy") or {}).get("untold") for run in runs):
        return "unknown"
    spent = [run["epsilon"] for run in runs if run.get("privacy") or run.get("epsilon") is not None]
    if not spent:
        return NOTHING
    return "∞" if None in spent else rounded_up(max(spent))


def _whole(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"
