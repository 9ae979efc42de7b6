"""How the cost of one d x d layer grows: with K, r and d, and, where a residual does, by round."""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import Any

from aggregation_measure import DTYPES, measure
from aggregation_workload import fill, one_layer, prepared, with_peak
from rich.console import Console
from rich.table import Table

from strategies.aggregation import aggregate
from strategies.registry import build_rule

GROWING = ("fedavg", "lora-fair", "flexlora", "fedex-lora", "krum")
ROUNDS = 7
RESIDUAL = "fedex-lora"
CAPPED = 64


def growth(console: Console, args: argparse.Namespace) -> None:
    """Print seconds and MB of some rules, with one of K, r and d changed at a time."""
    K, r, d = args.clients, args.rank, args.width
    points = [(K // 5, r, d), (K, r, d), (4 * K, r, d), (K, r // 2, d), (K, 2 * r, d)]
    points.append((K, r, d // 4))
    table = Table(title="Growth on one layer: ms and MB")
    table.add_column("K\nr\nd")
    for point in points:
        table.add_column("\n".join(map(str, point)), justify="right")
    table.add_column("grows as", justify="right")
    for name in GROWING:
        seconds: dict[tuple[int, int, int], float] = {}
        cells = []
        for point in points:
            changed = argparse.Namespace(**vars(args))
            changed.clients, changed.rank, changed.width = point
            found = measure(name, {}, one_layer(changed.width), changed)
            seconds[point] = found["seconds"]
            cells.append(f"{1e3 * found['seconds']:.0f}, {found['extra']:.0f}")
        s = [seconds[point] for point in points]
        powers = {"K": (s[0], s[2], 20), "r": (s[3], s[4], 4), "d": (s[5], s[1], 4)}
        grows = (f"{n}^{math.log(b / a, by):.1f}" for n, (a, b, by) in powers.items())
        table.add_row(name, *cells, " ".join(grows))
    console.print(table)


def residual_by_round(console: Console, args: argparse.Namespace) -> None:
    """Print what a residual costs as it grows, in full and with a bound on its rank."""
    table = Table(title=f"{RESIDUAL} on one layer, from round to round: residual's rank, s, MB")
    table.add_column("round", justify="right")
    table.add_column("in full", justify="right")
    table.add_column(f"max-rank={CAPPED}", justify="right")
    columns = (rounds(options, args) for options in ({}, {"max-rank": CAPPED}))
    for number, cells in enumerate(zip(*columns, strict=True), start=1):
        table.add_row(str(number), *cells)
    console.print(table)


def rounds(options: dict[str, Any], args: argparse.Namespace) -> list[str]:
    rule, dtype = build_rule(RESIDUAL, options), DTYPES[args.dtype]
    given = (args.rank, args.clients, dtype, args.device)
    told = []
    with prepared(rule, one_layer(args.width), *given) as work:
        current = work.current
        for round in range(1, ROUNDS + 1):
            fill(work.spool, rule, current, args.clients, dtype, first=1000 * round)
            call = partial(aggregate, rule, work.spool, current, {}, round)
            made, seconds, extra = with_peak(call, args.device)
            current = made.adapter
            (residual,) = current.residual.values()
            told.append(f"{residual.rank}, {seconds:.2f}, {extra:.0f}")
    return told
