"""Rules against the dense or naive computation that they stand for, on one d x d layer.

Both read the same updates from the same spool and must end with the same tensors, up to the float32
of the dense forms. Those are in `aggregation_forms.py`.
"""

from __future__ import annotations

import argparse
from functools import partial

from aggregation_forms import RIVALS, Rival, dense_of, relative
from aggregation_measure import DTYPES
from aggregation_workload import FAILURES, medians, one_layer, prepared, with_peak
from rich.console import Console
from rich.table import Table

from strategies.registry import build_rule

SPEED_TARGET = 50.0


def against_dense(console: Console, args: argparse.Namespace) -> bool:
    """Measure and print all rivals; whether the targets are met."""
    title = f"One layer, d={args.width} r={args.rank} K={args.clients}, spooled as {args.dtype}"
    table = Table(title=title)
    for column in ("rule", "s", "MB", "dense form", "s", "MB", "ratio", "apart"):
        left = column in ("rule", "dense form")
        table.add_column(column, justify="left" if left else "right")
    met = True
    for rival in RIVALS:
        label = " ".join([rival.rule, *map(str, rival.options.values())])
        try:
            cells, ratio = compared(rival, args)
        except FAILURES as error:
            table.add_row(label, *[""] * 2, f"{rival.form}: FAILED, {error}")
            met = False
            continue
        met &= ratio >= SPEED_TARGET or not rival.target
        table.add_row(label, *cells)
    console.print(table)
    if args.quick:  # a small matrix is soon multiplied
        return True
    wanted = " and ".join(f"{rival.rule} {rival.form}" for rival in RIVALS if rival.target)
    console.print(f"target: {wanted} at least {SPEED_TARGET:g} x: {'met' if met else 'MISSED'}\n")
    return met


def compared(rival: Rival, args: argparse.Namespace) -> tuple[list[str], float]:
    """Run both; return cells and how many times faster the rule is."""
    rule = build_rule(rival.rule, rival.options)
    given = (args.rank, args.clients, DTYPES[args.dtype], args.device)
    with prepared(rule, one_layer(args.width), *given) as work:
        dense = partial(rival.dense, work)
        made, seconds, extra = with_peak(work.aggregate, args.device)
        truth, dense_seconds, dense_extra = with_peak(dense, args.device)
        apart = relative(dense_of(rival.ours(made)), dense_of(truth))
        del made, truth
        if max(seconds, dense_seconds) < args.once_above:
            seconds, dense_seconds = medians(
                args.repeats, work.aggregate, dense, device=args.device
            )
        elif seconds < args.once_above:
            (seconds,) = medians(args.repeats, work.aggregate, device=args.device)
    ratio = dense_seconds / seconds
    ours, theirs = (
        [f"{seconds:.3f}", f"{extra:.0f}"],
        [f"{dense_seconds:.3f}", f"{dense_extra:.0f}"],
    )
    return [*ours, rival.form, *theirs, f"{ratio:.1f} x", f"{apart:.0e}"], ratio
