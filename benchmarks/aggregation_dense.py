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
SAME = 1e-3  # what float32 leaves of a residual


def against_dense(console: Console, args: argparse.Namespace) -> bool:
    """Measure and print all rivals; whether the targets are met."""
    title = f"One layer, d={args.width} r={args.rank} K={args.clients}, updates in {args.dtype}"
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
        wanted = SPEED_TARGET if rival.target and not args.quick else 0.0
        met &= ratio > wanted
        table.add_row(label, *cells)
    console.print(table)
    far = "" if args.quick else " and ".join(f"{r.rule} {r.form}" for r in RIVALS if r.target)
    speed = f", {far} at least {SPEED_TARGET:g} x" if far else ""
    verdict = "met" if met else "MISSED"
    console.print(f"target: all apart by less than {SAME:g}{speed}: {verdict}\n")
    return met


def compared(rival: Rival, args: argparse.Namespace) -> tuple[list[str], float]:
    """Run both; return cells and how many times faster the rule is, 0 where they differ."""
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
    cells = [f"{seconds:.3f}", f"{extra:.0f}", rival.form]
    cells += [f"{dense_seconds:.3f}", f"{dense_extra:.0f}", f"{ratio:.1f} x", f"{apart:.0e}"]
    return cells, ratio if apart < SAME else 0.0
