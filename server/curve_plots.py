"""Curves of a run or a comparison: the metric by round and by bytes sent, and aggregation bias.

Curves are of the validation split, which a run watches. Reference rows and results are of the test
split, so they stand in a narrow panel of their own, on the same vertical axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from server.figure import (
    INK,
    QUIET,
    WIDTH,
    Plot,
    Sheet,
    colour,
    key_of,
    look,
    plain_log,
    plain_style,
    spread,
)
from server.results import Results
from server.series import Curve, bias_by_round, is_exact, metric_by_bytes, metric_by_round
from server.statistics import finals, mean_and_sd, reference_finals, reference_label
from server.units import MEGABYTE, MINUS, Unit, clip

_NEXT_TO_NOTHING = 1e-4
"""A bias below this share of the largest one in the plot is not drawn."""
_LOG_FROM = 20.0
"""A loss whose largest value is so many times its smallest is drawn on a logarithmic axis."""


def metric_against_rounds(results: Results) -> Plot | None:
    """Draw the validation metric by round, and beside it the test results and reference rows."""
    unit = results.unit
    curves = {label: metric_by_round(results.of(label), unit.metric) for label in results.labels}
    if not any(len(curve.x) for curve in curves.values()):
        return None
    title = f"{unit.title} by round"
    right, panel = 1.02, min(max(0.58, 0.13 * len(curves)), 1.2)
    with plain_style():
        sheet = Sheet(title, _keys(results), height=2.75, right=right)
        width = WIDTH - sheet.left - right
        main = sheet.axes(0.0, width - panel - 0.07)
        test = sheet.axes(width - panel, width, sharey=main)
        _draw_curves(main, curves, results)
        main.set(xlabel="round (validation split)", ylabel=unit.axis)
        main.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _draw_test_panel(test, results)
        references = _draw_references(test, results)
        _scale(main, unit)
        _name_references(test, references, unit, gap=0.34 / sheet.height)
        png = sheet.png()
    several = max(curve.seeds for curve in curves.values()) > 1
    return Plot(
        "metric-by-round",
        title,
        "Line: mean over seeds; band: lowest to highest seed. The panel at the right has the test "
        "split, a dot a seed and a bar at the mean; dashed lines are the reference rows."
        if several
        else "The panel at the right has the test split; dashed lines are the reference rows.",
        _alt(f"Line chart of validation {unit.name} by round", curves, unit),
        png,
    )


def metric_against_bytes(results: Results) -> Plot | None:
    """Draw the validation metric against the megabytes sent so far, up and down together."""
    unit = results.unit
    curves = {label: metric_by_bytes(results.of(label), unit.metric) for label in results.labels}
    most = max((curve.x[-1] for curve in curves.values() if len(curve.x)), default=0.0)
    if most == 0:
        return None
    size, name = (1e9, "GB") if most >= 1e10 else (MEGABYTE, "MB")
    scaled = {
        label: Curve(c.x / size, c.mean, c.low, c.high, c.seeds) for label, c in curves.items()
    }
    words = "gigabytes" if name == "GB" else "megabytes"
    title = f"{unit.title} by {words} sent"
    with plain_style():
        sheet = Sheet(title, _keys(results), height=2.75)
        axes = sheet.axes()
        _draw_curves(axes, scaled, results)
        _scale(axes, unit)
        axes.set(xlabel=f"{name} sent, up and down, all clients", ylabel=unit.axis)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        png = sheet.png()
    better = "Higher" if results.direction == "max" else "Lower"
    return Plot(
        "metric-by-megabytes",
        title,
        f"{better} and further left is better: the same {unit.name} for less traffic.",
        _alt(f"Line chart of validation {unit.name} by {words} sent", scaled, unit, name),
        png,
    )


def aggregation_bias(results: Results) -> Plot | None:
    """Draw the relative aggregation bias by round, before and after the rule's own correction."""
    before = {label: bias_by_round(results.of(label), "before") for label in results.labels}
    after = {label: bias_by_round(results.of(label), "after") for label in results.labels}
    known = [label for label in results.labels if np.isfinite(after[label].mean).any()]
    exact = [label for label in known if is_exact(results.of(label))]
    drawn = [label for label in known if label not in exact]
    if not drawn:
        return None
    removed = {label: bias_by_round(results.of(label), "removed") for label in drawn}
    removed = {label: curve for label, curve in removed.items() if _removes(curve)}
    largest = max(
        float(np.nanmax(curves[label].mean)) for curves in (before, after) for label in known
    )
    title = "Aggregation bias by round"
    low = 1.35 if removed else 0.0
    with plain_style():
        keys = _bias_keys(results, known, exact)
        sheet = Sheet(title, keys, height=2.75 + low, left=0.74)
        axes = sheet.axes(floor=low)
        for label in drawn:
            place = results.place(label)
            every = max(1, len(after[label].x) // 8)
            if place is not None:
                values = _visible(before[label].mean, largest)
                axes.plot(before[label].x, values, ":", color=colour(place), lw=1.6)
            style = {"linewidth": 1.6, **look(place)}
            values = _visible(after[label].mean, largest)
            axes.plot(after[label].x, values, markevery=every, **style)
        axes.set(yscale="log", ylabel="relative bias")
        plain_log(axes.yaxis, axes.dataLim.y0, axes.dataLim.y1)
        lowest = axes
        if removed:
            lowest = sheet.axes(top=low - 0.2, sharex=axes)
            _draw_removed(lowest, removed, results)
            axes.tick_params(labelbottom=False)
        lowest.set_xlabel("round")
        lowest.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        png = sheet.png()
    return Plot(
        "aggregation-bias",
        title,
        "How far the aggregated product BA is from ΔW, the mean of the clients' own products: "
        f"‖ΔW {MINUS} BA‖ / ‖ΔW‖; where the dotted line hides behind the solid one the rule "
        f"corrects nothing.{_removed_in_words(removed, results)}{_repairable(results, drawn)}",
        "Line chart of relative aggregation bias by round on a logarithmic axis. "
        + " ".join(_bias_in_words(label, after[label]) for label in drawn)
        + _removed_in_words(removed, results)
        + (f" Exact: {', '.join(exact)}." if exact else ""),
        png,
    )


def _keys(
    results: Results, labels: list[str] | None = None, exact: Sequence[str] = ()
) -> list[tuple[Artist, str]]:
    """Return a legend: the strategies that have a colour, and how many others there are."""
    labels = results.labels if labels is None else labels
    coloured = [label for label in labels if results.place(label) is not None]
    keys: list[tuple[Artist, str]] = []
    for label in coloured:
        text = clip(results.names[label], 40)
        keys.append(
            (key_of(results.place(label)), f"{text} (exact: none)" if label in exact else text)
        )
    if others := len([x for x in labels if x not in exact]) - len(set(coloured) - set(exact)):
        keys.append((key_of(None), f"{others} others"))
    return keys


def _bias_keys(results: Results, known: list[str], exact: list[str]) -> list[tuple[Artist, str]]:
    return [
        *_keys(results, known, exact),
        (Line2D([], [], color=QUIET, linestyle=":", linewidth=1.6), "before: plain means"),
        (Line2D([], [], color=QUIET, linewidth=1.6), "after the rule"),
    ]


def _draw_curves(axes: Axes, curves: dict[str, Curve], results: Results) -> None:
    scale = results.unit.scale
    for label, curve in curves.items():
        place = results.place(label)
        axes.plot(
            curve.x,
            curve.mean * scale,
            markevery=max(1, len(curve.x) // 8),
            zorder=2.5 if place is None else 3,
            **look(place),
        )
        if curve.seeds > 1 and place is not None:
            axes.fill_between(
                curve.x,
                curve.low * scale,
                curve.high * scale,
                color=colour(place),
                alpha=0.14 if len(curves) <= 4 else 0.07,
                linewidth=0,
            )


def _scale(axes: Axes, unit: Unit) -> None:
    """Keep shares within 0 to 100, and give losses that span much a logarithmic axis."""
    low, high = axes.get_ylim()
    if unit.share:
        axes.set_ylim(max(low, 0.0), min(high, 100.0))
        return
    bounds = [axes.dataLim.y0, axes.dataLim.y1]
    if bounds[0] > 0 and bounds[1] / bounds[0] > _LOG_FROM:
        axes.set_yscale("log")
        plain_log(axes.yaxis, axes.dataLim.y0, axes.dataLim.y1)


def _draw_test_panel(axes: Axes, results: Results) -> None:
    """Draw each strategy's test results side by side: a dot a seed and a bar at the mean."""
    by_label = finals(results.comparison["runs"])
    scale = results.unit.scale
    for index, (label, by_seed) in enumerate(by_label.items()):
        place = results.place(label)
        values = np.array(list(by_seed.values())) * scale
        axes.plot(
            np.full(len(values), index),
            values,
            ls="",
            marker=look(place).get("marker", "o"),
            ms=4 if place is not None else 2,
            mfc="white" if len(values) > 1 else colour(place),
            mec=colour(place),
            mew=1.1 if place is not None else 0.7,
            zorder=3 if place is not None else 2,
        )
        if len(values) > 1:
            axes.plot(
                [index - 0.36, index + 0.36],
                [values.mean()] * 2,
                color=colour(place),
                lw=2.6,
                zorder=4,
            )
    axes.set(xlim=(-0.8, len(by_label) - 0.2), xlabel="test")
    axes.set_xticks([])
    axes.tick_params(left=False, labelleft=False)
    axes.spines["left"].set_visible(False)


def _draw_references(test: Axes, results: Results) -> dict[str, float]:
    """Draw the reference rows through the test panel and return where they stand, as drawn.

    They are known on the test split alone, so none is drawn through validation's curves. Where
    strategies have different ones of a name, no line stands for all, and none is drawn.
    """
    labels = {(row["name"], reference_label(row)) for row in results.comparison["references"]}
    several = {label for name, label in labels if sum(n == name for n, _ in labels) > 1}
    rows = {
        name: mean_and_sd(list(by_seed.values()))[0]
        for name, by_seed in reference_finals(results.comparison).items()
        if name not in several
    }
    scale = results.unit.scale
    known = {name: mean * scale for name, mean in rows.items() if mean is not None}
    for value in known.values():
        test.axhline(value, color=INK, lw=1.0, ls=(0, (4, 3)), zorder=1.5, alpha=0.75)
    return known


def _name_references(axes: Axes, references: dict[str, float], unit: Unit, gap: float) -> None:
    """Write the reference rows' names in the right margin, none over another.

    Args:
        gap: the height that a name takes, as a share of the axes.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(to_axes.transform((0.0, value))[1]) for value in references.values()]
    places = spread(heights, gap)
    for (name, value), height, place in zip(references.items(), heights, places, strict=True):
        axes.annotate(
            f"{clip(name, 12)}\n{unit.value(value / unit.scale)}",
            xy=(1.0, height),
            xytext=(1.02 + 0.08 / (axes.bbox.width / axes.figure.dpi), place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            fontsize=8.8,
            va="center",
            linespacing=1.05,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": QUIET, "lw": 0.7, "shrinkA": 0, "shrinkB": 0},
            annotation_clip=False,
        )


def _visible(values: np.ndarray, largest: float) -> np.ndarray:
    """Return values for a logarithmic axis: what is unknown is a gap, and so is next to nothing,
    which would squeeze all the rest."""
    return np.where(np.isfinite(values) & (values > _NEXT_TO_NOTHING * largest), values, np.nan)


def _removes(curve: Curve) -> bool:
    """Whether a rule corrects enough of the bias, in either direction, for a plot to show it."""
    return bool(np.isfinite(curve.mean).any() and np.nanmax(np.abs(curve.mean)) > 1e-3)


def _draw_removed(axes: Axes, removed: dict[str, Curve], results: Results) -> None:
    """Draw which share of the bias each rule removes in a round."""
    for label, curve in removed.items():
        every = max(1, len(curve.x) // 8)
        style = {"linewidth": 1.6, **look(results.place(label))}
        axes.plot(curve.x, 100 * curve.mean, markevery=every, **style)
    low, high = axes.get_ylim()
    axes.set(ylim=(max(min(low, 0.0), -100.0), min(1.1 * high, 105.0)), ylabel="removed (%)")
    axes.yaxis.set_major_locator(MaxNLocator(3))


def _removed_in_words(removed: dict[str, Curve], results: Results) -> str:
    """Say how much of the bias rules remove, the mean over rounds."""
    said = []
    for label, curve in removed.items():
        if len(removed) <= 6 or results.place(label) is not None:
            share = 100 * float(np.nanmean(curve.mean))
            said.append(f"{results.names[label]} {share:.1f}%".replace("-", MINUS, share < 0))
    return f" Removed, the mean over rounds: {', '.join(said)}." if said else ""


def _repairable(results: Results, labels: list[str]) -> str:
    shares = [bias_by_round(results.of(label), "repairable").mean for label in labels]
    known = np.concatenate(shares)
    known = known[np.isfinite(known)]
    if not len(known):
        return ""
    return f" About {100 * known.mean():.0f}% of it is within reach of a correction of B."


def _bias_in_words(label: str, curve: Curve) -> str:
    known = np.flatnonzero(np.isfinite(curve.mean))
    first, last = known[0], known[-1]
    return (
        f"{label}: {curve.mean[first]:.2g} in round {curve.x[first]:.0f}, "
        f"{curve.mean[last]:.2g} in round {curve.x[last]:.0f}."
    )


def _alt(what: str, curves: dict[str, Curve], unit: Unit, x: str = "round") -> str:
    ends = [
        f"{label} from {unit.value(float(curve.mean[0]))} to {unit.value(float(curve.mean[-1]))} "
        f"at {x} {curve.x[-1]:.4g}"
        for label, curve in curves.items()
        if len(curve.x) and math.isfinite(curve.mean[-1])
    ]
    return f"{what}: {'; '.join(ends)}."
