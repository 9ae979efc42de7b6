"""LoRA-FAIR's ridge correction X of one layer, as two centred sums and densely.

All in float32 from factors in memory, timed in turn. `dense` is the definition, a sum of
p_k (B_k A_k) with a d x d matrix a term (much of its time goes into the pages of those matrices);
`in place` adds every product to one matrix; `stacked` makes the sum one product of all factors side
by side, the fastest way to DW that we know. Errors are relative to the dense X in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from aggregation_dense import SPEED_TARGET
from aggregation_forms import by_definition, correction, in_place, relative, stacked
from aggregation_workload import medians, normal
from rich.console import Console
from rich.table import Table
from torch import Tensor

from strategies.lora_fair import LoRAFair, LoRAFairOptions
from strategies.means import weighted_mean
from strategies.ridge import ridge_correction
from strategies.rule import LayerContext, LayerUpdate, WeightedLayer

ERROR_TARGET = 1e-5
DRIFTS = (1.0, 0.1, 0.01)
Updates = Sequence[WeightedLayer]


def ridge_against_dense(console: Console, args: argparse.Namespace) -> bool:
    """Measure and print errors and times; whether the targets are met."""
    rule = LoRAFair(LoRAFairOptions())
    lambda_rel = rule.options.lambda_
    rivals: dict[str, Callable[[Updates], Tensor]] = {
        "two sums": partial(two_sums, rule=rule),
        "dense": partial(correction, DW_of=by_definition, lambda_rel=lambda_rel),
        "dense, in place": partial(correction, DW_of=in_place, lambda_rel=lambda_rel),
        "dense, stacked": partial(correction, DW_of=stacked, lambda_rel=lambda_rel),
    }
    table = Table(title=f"LoRA-FAIR's X from memory: d={args.width} r={args.rank} K={args.clients}")
    table.add_column("X in float32")
    for column in ("ms", "ratio", *(f"error, drift {drift:g}" for drift in DRIFTS)):
        table.add_column(column, justify="right")
    errors: dict[str, list[float]] = {name: [] for name in rivals}
    for drift in DRIFTS:
        updates = updates_around(args, drift)
        truth = correction(in_float64(updates), in_place, lambda_rel)
        for name, rival in rivals.items():
            errors[name].append(relative(rival(updates).double(), truth))
    calls = (partial(rival, updates) for rival in rivals.values())
    seconds = dict(zip(rivals, medians(args.repeats, *calls), strict=True))
    ratios = {name: taken / seconds["two sums"] for name, taken in seconds.items()}
    for name in rivals:
        told = (f"{error:.1e}" for error in errors[name])
        table.add_row(name, f"{1e3 * seconds[name]:.1f}", f"{ratios[name]:.0f} x", *told)
    met = max(errors["two sums"]) < ERROR_TARGET
    met &= args.quick or ratios["dense"] >= SPEED_TARGET
    speed = "" if args.quick else f", dense >= {SPEED_TARGET:g} x"
    console.print(table)
    verdict = "met" if met else "MISSED"
    console.print(f"target: error < {ERROR_TARGET:g}{speed}: {verdict}\n")
    return met


def updates_around(args: argparse.Namespace, drift: float) -> Updates:
    """Clients with unequal weights, each `drift` standard deviations from a common layer."""
    d, r, K = args.width, args.rank, args.clients
    A, B = normal(0, r, d), normal(1, d, r)
    total = K * (K + 1) / 2
    return [
        WeightedLayer(
            LayerUpdate(A + drift * normal(2 * k, r, d), B + drift * normal(2 * k + 1, d, r)),
            k / total,
        )
        for k in range(1, K + 1)
    ]


def two_sums(updates: Updates, rule: LoRAFair) -> Tensor:
    """The rule's own phases, float32 between them, up to X (and, like the rule, B + X)."""
    context = LayerContext("layer", 1, updates[0].factors)
    first, residual = rule.phases(1)
    made = weighted_mean((u.share, first.contribute(u.factors, context)) for u in updates)
    context = replace(context, shared={name: mean.float() for name, mean in made.items()})
    made = weighted_mean((u.share, residual.contribute(u.factors, context)) for u in updates)
    return ridge_correction(made["residual"], context.shared["A"], rule.options.lambda_)


def in_float64(updates: Updates) -> Updates:
    return [
        WeightedLayer(LayerUpdate(u.factors.A.double(), u.factors.B.double()), u.share)
        for u in updates
    ]
