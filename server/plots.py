"""The plots of runs and comparisons, in the order in which a report shows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedgraft.files import write_bytes
from server.bar_plots import clients, differences
from server.curve_plots import aggregation_bias, metric_against_bytes, metric_against_rounds
from server.figure import Plot
from server.results import Results, read_results

_ALL = (metric_against_rounds, differences, metric_against_bytes, aggregation_bias, clients)


def draw_plots(results: Results) -> list[Plot]:
    """Draw every plot for which the runs hold the numbers."""
    return [plot for draw in _ALL if (plot := draw(results)) is not None]


def save_plots(directories: Sequence[Path], folder: Path) -> list[Path]:
    """Write the plots of run or comparison directories as PNG files and return their paths.

    Raises:
        ConfigError: a directory is missing or broken (see `results.read_results`).
        RunError: the disk is full or refuses the write.
    """
    paths = []
    for plot in draw_plots(read_results(directories)):
        path = folder / f"{plot.name}.png"
        write_bytes(path, plot.png)
        paths.append(path)
    return paths
