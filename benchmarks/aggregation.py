"""Measure the server's half of a round: LoRA-FAIR's closed form, FedAvg's memory, a round's cost.

    python benchmarks/aggregation.py
    python benchmarks/aggregation.py --width 1024 --rank 8 --clients 10 --threads 2

1. LoRA-FAIR's ridge correction X of one layer as two centred sums, against dense computations of
   the same X, all in float32 from factors in memory, timed in turn in this process. `dense` is the
   definition, a sum of p_k (B_k A_k) with a d x d matrix a term (much of its time goes into the
   pages of those matrices); `in place` adds every product to one matrix; `stacked` makes the sum
   one product of all factors side by side, the fastest way to DW that we know. Errors are relative
   to the dense X in float64.
2. FedAvg's peak memory by number of clients, each in a child process of its own: updates spooled to
   disk and folded one by one, against holding all of them, as a list of replies does.
3. What a round of the digits federation costs the server (12 layers, rank 8, 6 clients).

Exits with status 1 where a target is missed: error below 1e-5, 50 times faster than dense, memory
constant.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from aggregation_memory import adapter, normal, update_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedgraft.adapter import LoraLayer
from strategies.aggregation import aggregate
from strategies.diagnostics import aggregation_bias
from strategies.lora_fair import LoRAFair, LoRAFairOptions
from strategies.means import weighted_mean
from strategies.registry import build_rule
from strategies.ridge import ridge_correction
from strategies.rule import LayerContext, WeightedLayer
from strategies.spool import UpdateSpool

ERROR_TARGET = 1e-5
SPEED_TARGET = 50.0
MEMORY_SLACK_MB = 8.0  # between the fewest and the most clients: what an allocator keeps
DIGITS_SHAPES = [(64, 64)] * 8 + [(128, 64), (64, 128)] * 2


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    console = Console(width=100)
    console.print(conditions(args))
    if args.quick:
        args.width, args.rank, args.clients = 128, 4, 5
        return 0 if ridge_against_dense(console, args) else 1
    met = [ridge_against_dense(console, args), fedavg_memory(console, args.memory_clients)]
    round_cost(console)
    return 0 if all(met) else 1


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=4096, help="d: the layer is d x d")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--drift", type=float, nargs="+", default=[1.0, 0.1, 0.01])
    parser.add_argument("--repeats", type=int, default=3, help="timings of each; the median counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-clients", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--quick", action="store_true", help="check errors alone, on a small layer")
    return parser.parse_args(argv)


def conditions(args: argparse.Namespace) -> str:
    return (
        f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {args.threads} thread(s)"
    )


# 1. LoRA-FAIR against the dense computation


def updates_around(args: argparse.Namespace, drift: float) -> list[WeightedLayer]:
    """Clients with unequal weights, each `drift` standard deviations from a common layer."""
    d, r, K = args.width, args.rank, args.clients
    A, B = normal(0, r, d), normal(1, d, r)
    total = K * (K + 1) / 2
    return [
        WeightedLayer(
            LoraLayer(A + drift * normal(2 * k, r, d), B + drift * normal(2 * k + 1, d, r)),
            k / total,
        )
        for k in range(1, K + 1)
    ]


def two_sums(updates: list[WeightedLayer], rule: LoRAFair) -> Tensor:
    """The rule's own phases, float32 between them, up to X (and, like the rule, B + X)."""
    context = LayerContext("layer", 1, updates[0].factors)
    means, residual = rule.phases(1)
    made = weighted_mean((u.share, means.contribute(u.factors, context)) for u in updates)
    context = replace(context, shared={name: mean.float() for name, mean in made.items()})
    made = weighted_mean((u.share, residual.contribute(u.factors, context)) for u in updates)
    return ridge_correction(made["residual"], context.shared["A"], rule.options.lambda_)


def dense(updates: list[WeightedLayer], lambda_rel: float) -> Tensor:
    """X by its definition, from DW = sum p_k (B_k A_k), in the dtype of the factors."""
    DW = sum(u.share * (u.factors.B @ u.factors.A) for u in updates)
    assert isinstance(DW, Tensor)
    return solved(DW, updates, lambda_rel)


def dense_in_place(updates: list[WeightedLayer], lambda_rel: float) -> Tensor:
    """X from DW as one d x d matrix to which each product is added."""
    first = updates[0].factors
    DW = first.B.new_zeros(first.B.shape[0], first.A.shape[1])
    for u in updates:
        DW.addmm_(u.factors.B, u.factors.A, alpha=u.share)
    return solved(DW, updates, lambda_rel)


def dense_stacked(updates: list[WeightedLayer], lambda_rel: float) -> Tensor:
    """X from DW = [p_k B_k] [A_k], one product with K r inner columns."""
    left = torch.cat([u.share * u.factors.B for u in updates], dim=1)
    return solved(left @ torch.cat([u.factors.A for u in updates]), updates, lambda_rel)


def solved(DW: Tensor, updates: list[WeightedLayer], lambda_rel: float) -> Tensor:
    """X = (DW - Bbar Abar) Abar^T (G + lambda I)^-1."""
    A = sum(u.share * u.factors.A for u in updates)
    B = sum(u.share * u.factors.B for u in updates)
    assert isinstance(A, Tensor) and isinstance(B, Tensor)
    G = A @ A.T
    shift = lambda_rel * G.trace() / len(G) * torch.eye(len(G), dtype=G.dtype)
    X: Tensor = torch.linalg.solve(G + shift, (DW - B @ A) @ A.T, left=False)
    return X


def in_float64(updates: list[WeightedLayer]) -> list[WeightedLayer]:
    return [
        WeightedLayer(LoraLayer(u.factors.A.double(), u.factors.B.double()), u.share)
        for u in updates
    ]


def ridge_against_dense(console: Console, args: argparse.Namespace) -> bool:
    rule = LoRAFair(LoRAFairOptions())
    lambda_rel = rule.options.lambda_
    rivals: dict[str, Callable[[list[WeightedLayer]], Tensor]] = {
        "two sums": partial(two_sums, rule=rule),
        "dense": partial(dense, lambda_rel=lambda_rel),
        "dense, in place": partial(dense_in_place, lambda_rel=lambda_rel),
        "dense, stacked": partial(dense_stacked, lambda_rel=lambda_rel),
    }
    table = Table(
        title=f"LoRA-FAIR ridge, one layer: d={args.width} r={args.rank} K={args.clients}"
    )
    table.add_column("X in float32")
    for column in ("ms", "ratio", *(f"error, drift {drift:g}" for drift in args.drift)):
        table.add_column(column, justify="right")
    errors: dict[str, list[float]] = {name: [] for name in rivals}
    for drift in args.drift:
        updates = updates_around(args, drift)
        truth = dense(in_float64(updates), lambda_rel)
        for name, rival in rivals.items():
            errors[name].append(relative_error(rival(updates), truth))
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
    console.print(f"target: error < {ERROR_TARGET:g}{speed}: {verdict(met)}\n")
    return met


def medians(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """Time the functions in turn, so that a busy spell of the machine hits all; seconds a call.

    A timing is the mean over at least 0.1 s of calls, so that short and long ones count alike.
    """
    for function in functions:
        function()
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, taken in zip(functions, seconds, strict=True):
            began, calls = time.perf_counter(), 0
            while calls == 0 or time.perf_counter() - began < 0.1:
                function()
                calls += 1
            taken.append((time.perf_counter() - began) / calls)
    return [statistics.median(taken) for taken in seconds]


def relative_error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


# 2. Memory by number of clients


def fedavg_memory(console: Console, counts: list[int]) -> bool:
    """Compare peaks in child processes: a process's peak never goes down again."""
    table = Table(title="FedAvg's memory, 2.1 MB an update")
    for column in ("clients", "spooled and folded", "all held in memory"):
        table.add_column(column, justify="right")
    spooled: list[float] = []
    for count in counts:
        folded, held = (in_child(count, how) for how in ("spool", "list"))
        spooled.append(folded)
        table.add_row(f"{count}", f"{folded:.1f} MB", f"{held:.1f} MB")
    met = max(spooled) - min(spooled) < MEMORY_SLACK_MB
    console.print(table)
    console.print(f"target: constant within {MEMORY_SLACK_MB:g} MB: {verdict(met)}\n")
    return met


def in_child(count: int, how: str) -> float:
    script = Path(__file__).with_name("aggregation_memory.py")
    command = [sys.executable, str(script), str(count), how]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


# 3. A round of the digits federation


def round_cost(console: Console) -> None:
    table = Table(title="Digits: 12 layers, r=8, 6 clients")
    for column in ("rule", "spool 6", "aggregate", "diagnose"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    current = adapter(DIGITS_SHAPES, 8)
    updates = [update_of(current, k) for k in range(6)]
    options: list[tuple[str, dict[str, Any]]] = [
        ("fedavg", {}),
        ("ffa-lora", {}),
        ("lora-fair", {}),
        ("lora-fair", {"objective": "cosine"}),
    ]
    with tempfile.TemporaryDirectory() as folder:
        spool = UpdateSpool(Path(folder))

        def fill() -> None:
            spool.clear()
            for k, update in enumerate(updates):
                spool.add(str(k), 100.0 + k, update)

        for name, chosen in options:
            rule = build_rule(name, chosen)
            fill()
            made = aggregate(rule, spool, current, {}, 1).adapter
            seconds = medians(
                5,
                fill,
                partial(aggregate, rule, spool, current, {}, 1),
                partial(aggregation_bias, rule, spool, current, made, 1),
            )
            table.add_row(
                " ".join([name, *map(str, chosen.values())]),
                *(f"{1e3 * second:.1f} ms" for second in seconds),
            )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
