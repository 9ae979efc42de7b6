"""Intervals and bars: the paired differences of strategies, and every client's own metric."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from server.figure import INK, QUIET, Plot, Sheet, bar, colour, look, plain_style
from server.results import Results
from server.series import ClientResult, clients_at_chosen_round
from server.statistics import finals, paired_differences, paired_interval
from server.units import Unit, clip

MOST_BARS = 48
"""More bars than these are not drawn: the worst clients are, and the caption says so."""
NUMBER_WIDTH = 0.16
"""Of a number beside a bar, as a share of the longest bar."""
MOST_ROOMY = 8
"""More intervals than these stand closely, the best first, with their names beside them."""


def differences(results: Results) -> Plot | None:
    """Draw each strategy's paired difference from the first one with its 95% interval."""
    unit = results.unit
    by_label = finals(results.comparison["runs"])
    first, *others = by_label
    pairs = {label: paired_differences(by_label[first], by_label[label]) for label in others}
    intervals = {label: paired_interval(found) for label, found in pairs.items()}
    drawn = [label for label in others if intervals[label] is not None]
    if not drawn:
        return None
    title = f"Difference from {clip(results.names[first], 32)}"
    better = "right" if results.direction == "max" else "left"
    close = len(drawn) > MOST_ROOMY
    names = {label: clip(results.names[label], 28 if close else 40) for label in drawn}
    if close:
        sign = -1.0 if results.direction == "max" else 1.0
        drawn.sort(key=lambda label: sign * sum(pairs[label]) / len(pairs[label]))
    with plain_style():
        step, left = 0.56, 0.22
        if close:
            step, left = 0.22, 0.25 + 0.076 * max(len(name) for name in names.values())
        sheet = Sheet(title, [], height=step * len(drawn) + 0.16, left=left, right=0.22)
        axes = sheet.axes()
        axes.axvline(0, color=INK, lw=1.1, zorder=1.5)
        for row, label in enumerate(drawn):
            _draw_interval(axes, row, label, results, pairs[label], close)
            if not close:
                _name_interval(axes, row, label, results, names[label])
        axes.set(ylim=(len(drawn) - 0.42, -0.58))
        beside = [names[label] for label in drawn] if close else []
        axes.set_yticks(range(len(beside)), beside)
        axes.tick_params(axis="y", left=False, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(7))
        words = f"{unit.points.strip() or unit.name}, test split"
        axes.set_xlabel(f"{words} ({better} of zero is better)")
        png = sheet.png()
    return Plot(
        "differences",
        title,
        "Bar: 95% interval of the mean paired difference (Student's t over seeds); hollow dots: "
        "the seeds. A bar that crosses zero means that the two can't be told apart.",
        f"Paired differences from {first} with 95% intervals: "
        + "; ".join(f"{label} {_in_words(label, results)}" for label in drawn)
        + ".",
        png,
    )


def _draw_interval(
    axes: Axes, row: int, label: str, results: Results, pairs: list[float], close: bool
) -> None:
    unit = results.unit
    interval = paired_interval(pairs)
    assert interval is not None
    place = results.place(label)
    paint = QUIET if place is None else colour(place)
    low, middle, high = (x * unit.scale for x in (interval.low, interval.difference, interval.high))
    axes.plot([low, high], [row, row], color=paint, lw=2.6, zorder=2)
    axes.plot(
        [x * unit.scale for x in pairs],
        [row] * len(pairs),
        "o",
        ms=3 if close else 5,
        mfc="white",
        mec=paint,
        mew=0.9 if close else 1.1,
        zorder=3,
    )
    marker = look(place).get("marker", "o")
    axes.plot([middle], [row], marker, ms=5 if close else 7.5, color=paint, zorder=4)


def _name_interval(axes: Axes, row: int, label: str, results: Results, name: str) -> None:
    """Write a strategy's name and its numbers above its interval."""
    axes.text(
        0.0,
        row - 0.30,
        f"{name}   {_in_words(label, results)}",
        transform=axes.get_yaxis_transform(),
        va="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2},
        zorder=2.5,
    )


def _in_words(label: str, results: Results) -> str:
    unit = results.unit
    row = next(s for s in results.comparison["strategies"] if s["strategy"] == label)
    middle, low, high = unit.differences(row["difference"], row["low"], row["high"])
    return f"{middle} ({low} to {high})"


def clients(results: Results) -> Plot | None:
    """Draw each client's validation metric at the chosen round, the worst client first."""
    unit = results.unit
    found = {
        label: clients_at_chosen_round(results.of(label), unit.metric)
        for label in results.highlighted
    }
    found = {label: by_client for label, by_client in found.items() if by_client}
    if not found:
        return None
    worst_first = _worst_first(found, results.direction)
    shown = worst_first[: max(1, MOST_BARS // len(found))]
    labels = list(found)
    title = f"{unit.title} of each client"
    names = [_name(found, client) for client in shown]
    thick = 0.19
    step = thick * len(labels) + 0.15
    with plain_style():
        keys: list[tuple[Artist, str]] = [
            (Patch(**bar(results.place(label))), clip(results.names[label], 40)) for label in labels
        ]
        keys.append(
            (Line2D([], [], color=INK, ls="", marker="|", ms=9, mew=1.6), "untouched start")
        )
        sheet = Sheet(
            title,
            keys,
            height=step * len(shown) + 0.1,
            right=0.62,
            left=0.25 + 0.076 * max(len(line) for name in names for line in name.splitlines()),
        )
        axes = sheet.axes()
        longest = max(one.high for by_client in found.values() for one in by_client.values())
        for place, label in enumerate(labels):
            by_client = found[label]
            worst = _worst_first({label: by_client}, results.direction)[0]
            for row, client in enumerate(shown):
                if client in by_client:
                    y = row * step + thick * (place - (len(labels) - 1) / 2)
                    _draw_bar(
                        axes,
                        y,
                        by_client[client],
                        bar(results.place(label)),
                        unit,
                        thick,
                        client == worst,
                        longest,
                    )
        axes.set_yticks([row * step for row in range(len(shown))], names)
        axes.tick_params(axis="y", left=False, labelcolor=INK)
        axes.set(ylim=((len(shown) - 0.5) * step, -0.5 * step), xlabel=f"{unit.axis}, validation")
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        png = sheet.png()
    several = any(len(results.of(label)) > 1 for label in labels)
    left_out = len(worst_first) - len(shown)
    return Plot(
        "clients",
        title,
        "The chosen adapter on validation examples like each client's own, worst client at the "
        "top; bold: the strategy's worst."
        + (" Thin lines: lowest to highest seed." if several else "")
        + (f" The {left_out} better clients are left out." if left_out else "")
        + _others(results),
        f"Bar chart of validation {unit.name} by client. Worst clients: "
        + "; ".join(_worst_in_words(label, found[label], results) for label in labels)
        + ".",
        png,
    )


def _others(results: Results) -> str:
    others = len(results.labels) - len(results.highlighted)
    return f" Of {others} more strategies see the table." if others else ""


def _draw_bar(
    axes: Axes,
    y: float,
    result: ClientResult,
    style: dict[str, Any],
    unit: Unit,
    thick: float,
    worst: bool,
    longest: float,
) -> None:
    mean, low, high = (x * unit.scale for x in (result.mean, result.low, result.high))
    axes.barh(y, mean, height=thick * 0.86, zorder=2, **style)
    if high > low:
        axes.plot([low, high], [y, y], color=INK, lw=1.0, zorder=3)
    if math.isfinite(result.start):
        start = result.start * unit.scale
        axes.vlines(start, y - 0.43 * thick, y + 0.43 * thick, color=INK, lw=1.6, zorder=4)
    axes.annotate(
        unit.value(result.mean),
        (number_place(result, longest) * unit.scale, y),
        (3, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        fontweight="bold" if worst else "normal",
        color=INK if worst else QUIET,
        annotation_clip=False,
    )


def number_place(result: ClientResult, longest: float) -> float:
    """Return where the number beside a bar begins: past a tick that would strike it out, too.

    Args:
        result: the bar's.
        longest: bar of the picture.
    """
    end = max(result.high, result.mean)
    return result.start if end <= result.start < end + NUMBER_WIDTH * longest else end


def _worst_first(found: dict[str, dict[str, ClientResult]], direction: str) -> list[str]:
    """Return the clients by their mean over strategies, the worst one first."""
    clients = list(dict.fromkeys(client for by_client in found.values() for client in by_client))
    sign = 1.0 if direction == "max" else -1.0

    def badness(client: str) -> float:
        means = [by_client[client].mean for by_client in found.values() if client in by_client]
        return sign * sum(means) / len(means)

    return sorted(clients, key=badness)


def _name(found: dict[str, dict[str, ClientResult]], client: str) -> str:
    """Return what a client's bars are called, on one line or two."""
    result = next(by_client[client] for by_client in found.values() if client in by_client)
    if not result.description:
        return clip(f"client {client}" if client.isdecimal() else client, 26)
    words = textwrap.fill(clip(result.description, 80), 24, max_lines=2, placeholder="…")
    return f"{words} ({clip(client, 12)})"


def _worst_in_words(label: str, by_client: dict[str, ClientResult], results: Results) -> str:
    worst = _worst_first({label: by_client}, results.direction)[0]
    name = _name({label: by_client}, worst).replace("\n", " ")
    return f"{label}: {name} {results.unit.value(by_client[worst].mean)}"
