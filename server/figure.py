"""The paper that plots are drawn on: one style, a layout in inches, and bytes that never vary.

Drawn with matplotlib's object interface on its Agg canvas, independent of the user's matplotlibrc.
A PNG carries neither date nor version, so equal numbers give equal files.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

WIDTH = 5.2
"""Inches; 10 pt text is then 9.6 px high on a phone of 390 px and 14 px in a column of 530."""
DPI = 220
INK, QUIET, FAINT, OTHERS = "#1c2024", "#5b6169", "#e3e6ea", "#b7bdc4"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4d4d4d")
"""Okabe and Ito's colours, told apart with any colour blindness; yellow is too pale on white."""
MARKERS = "osD^vPX"
_SIZE, _SMALL = 10.0, 8.8
_TITLE_ROW, _LEGEND_ROW, _EDGE = 0.30, 0.21, 0.09

_STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": _SIZE,
    "axes.labelsize": _SIZE,
    "xtick.labelsize": _SMALL,
    "ytick.labelsize": _SMALL,
    "axes.edgecolor": "#aab0b7",
    "axes.labelcolor": QUIET,
    "xtick.color": "#aab0b7",
    "ytick.color": "#aab0b7",
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "text.color": INK,
    "text.parse_math": False,  # client names are untrusted: a $ is a dollar
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.9,
    "lines.solid_capstyle": "round",
    "svg.hashsalt": "fedgraft",
}


@dataclass(frozen=True)
class Plot:
    """A finished picture.

    Attributes:
        name: its file's stem.
        title: what it shows, as the picture's own heading has it.
        caption: one or two sentences on how to read it.
        alt: what somebody who cannot see it is told.
        png: the picture's bytes.
    """

    name: str
    title: str
    caption: str
    alt: str
    png: bytes


@contextmanager
def plain_style() -> Iterator[None]:
    """Draw with our style whatever the user's matplotlibrc says; everything is put back after."""
    style: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_STYLE}
    style.pop("backend")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        with matplotlib.rc_context(style):
            yield


def colour(place: int | None) -> str:
    """Return a strategy's colour by its place (see `Results.place`): grey for None."""
    return OTHERS if place is None else PALETTE[place]


def look(place: int | None) -> dict[str, Any]:
    """Return colour and marker of a strategy's curve; thin and plain for one of many."""
    if place is None:
        return {"color": OTHERS, "linewidth": 1.0}
    return {"color": colour(place), "marker": MARKERS[place], "markersize": 4}


def bar(place: int | None) -> dict[str, Any]:
    """Return the look of a strategy's bar."""
    return {"facecolor": colour(place), "edgecolor": "white", "linewidth": 0}


def key_of(place: int | None) -> Line2D:
    """Return a strategy's line for a legend."""
    return Line2D([], [], **look(place))


class Sheet:
    """A figure with a title, a legend below it and a box for the axes below that.

    Args:
        title: what the plot shows.
        legend: an artist and a label an entry, placed above the axes so that it covers no data.
        height: of the axes, in inches.
        left, right, bottom: margins around the axes, in inches.
    """

    def __init__(
        self,
        title: str,
        legend: Sequence[tuple[Artist, str]],
        *,
        height: float,
        left: float = 0.66,
        right: float = 0.14,
        bottom: float = 0.52,
    ) -> None:
        rows = _rows([label for _, label in legend])
        head = _EDGE + _TITLE_ROW + len(rows) * _LEGEND_ROW + 0.06
        self.left, self.right, self.bottom, self.height = left, right, bottom, height
        self.total = head + height + bottom
        self.figure = Figure(figsize=(WIDTH, self.total), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)
        top = 1 - _EDGE / self.total
        edge = 0.10 / WIDTH
        self.figure.text(edge, top, title, fontsize=11, fontweight="bold", va="top")
        for place, row in enumerate(rows):
            self.figure.legend(
                [legend[i][0] for i in row],
                [legend[i][1] for i in row],
                loc="upper left",
                bbox_to_anchor=(edge, top - (_TITLE_ROW - 0.04 + place * _LEGEND_ROW) / self.total),
                ncols=len(row),
                frameon=False,
                fontsize=_SMALL,
                borderaxespad=0,
                borderpad=0,
                handlelength=1.9,
                handletextpad=0.5,
                columnspacing=1.3,
            )

    def axes(
        self,
        start: float = 0.0,
        end: float | None = None,
        *,
        floor: float = 0.0,
        top: float | None = None,
        **keywords: object,
    ) -> Axes:
        """Add axes in the box: between two distances in inches from its left, and from below."""
        last = WIDTH - self.left - self.right if end is None else end
        high = self.height if top is None else top
        box = (
            (self.left + start) / WIDTH,
            (self.bottom + floor) / self.total,
            (last - start) / WIDTH,
            (high - floor) / self.total,
        )
        return self.figure.add_axes(box, **keywords)  # type: ignore[call-overload,no-any-return]

    def png(self) -> bytes:
        """Return the picture, its metadata free of date and version."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        return buffer.getvalue()


def plain_log(axis: Axis, low: float, high: float) -> None:
    """Label a logarithmic axis with plain numbers, more of them where it spans little."""
    subs = (1.0,) if high / low > 100 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Return positions moved as little as needed for neighbours to stand a gap apart."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    groups: list[list[int]] = []
    centres: list[float] = []
    for i in order:
        groups.append([i])
        centres.append(positions[i])
        while len(groups) > 1 and (
            centres[-1] - centres[-2] < gap * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            last = groups.pop()
            centres.pop()
            groups[-1] += last
            centres[-1] = sum(positions[j] for j in groups[-1]) / len(groups[-1])
    moved = list(positions)
    for group, centre in zip(groups, centres, strict=True):
        for place, i in enumerate(group):
            moved[i] = centre + gap * (place - (len(group) - 1) / 2)
    return moved


def _rows(labels: Sequence[str]) -> list[list[int]]:
    """Return which entries of a legend stand in each of its rows, by their estimated widths."""
    rows: list[list[int]] = []
    room = 0.0
    for i, label in enumerate(labels):
        width = 0.50 + 0.076 * len(label)
        if not rows or width > room:
            rows.append([])
            room = WIDTH - 0.2
        rows[-1].append(i)
        room -= width
    return rows
