"""Measure the server's half of a round: LoRA-FAIR's closed form, FedAvg's memory, a round's cost.

    python benchmarks/aggregation.py
    python benchmarks/aggregation.py --width 1024 --rank 8 --clients 10 --threads 2

1. LoRA-FAIR's ridge correction X of one layer, as two centred sums in float32, against the dense
   computation of the same X (DW of shape d x d in float32, torch's own matrix products), both from
   factors in memory and timed in turn in this process. Errors are relative to the dense computation
   in float64.
2. FedAvg's peak memory by number of clients, each in a child process of its own: updates spooled to
   disk and folded one by one, against holding all of them, as a list of replies does.
3. What a round of the digits federation costs the server (12 layers, rank 8, 6 clients).

Exits with status 1 where a target is missed: error below 1e-5, 50 times faster, memory constant.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedgraft.adapter import Adapter, LoraLayer, Tensors
from fedgraft.seeds import stream
from strategies.aggregation import aggregate
from strategies.diagnostics import aggregation_bias
from strategies.lora_fair import LoRAFair, LoRAFairOptions, ridge_correction
from strategies.means import weighted_mean
from strategies.registry import build_rule
from strategies.rule import LayerContext, WeightedLayer
from strategies.spool import UpdateSpool

ERROR_TARGET = 1e-5
SPEED_TARGET = 50.0
MEMORY_SLACK_MB = 8.0  # between the fewest and the most clients: what an allocator keeps
DIGITS_SHAPES = [(64, 64)] * 8 + [(128, 64), (64, 128)] * 2


def main() -> int:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.memory_child:
        print(json.dumps(memory_child(*args.memory_child)))
        return 0
    console = Console(width=100)
    console.print(conditions(args))
    met = [ridge_against_dense(console, args), fedavg_memory(console, args.memory_clients)]
    round_cost(console)
    return 0 if all(met) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=4096, help="d: the layer is d x d")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--drift", type=float, nargs="+", default=[1.0, 0.1, 0.01])
    parser.add_argument("--repeats", type=int, default=5, help="timings of each; the median counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-clients", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--memory-child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def conditions(args: argparse.Namespace) -> str:
    return (
        f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {args.threads} thread(s)"
    )


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(stream(seed, "benchmark").standard_normal(shape, dtype="float32"))


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


def dense(updates: list[WeightedLayer], lambda_rel: float, dtype: torch.dtype) -> Tensor:
    """X as its definition reads: DW (d x d), R = DW - Bbar Abar, X = R Abar^T (G + lambda I)^-1."""
    As = [u.factors.A.to(dtype) for u in updates]
    Bs = [u.factors.B.to(dtype) for u in updates]
    shares = [u.share for u in updates]
    A = sum(p * Ak for p, Ak in zip(shares, As, strict=True))
    B = sum(p * Bk for p, Bk in zip(shares, Bs, strict=True))
    assert isinstance(A, Tensor) and isinstance(B, Tensor)
    DW = torch.zeros(len(B), A.shape[1], dtype=dtype)
    for p, Ak, Bk in zip(shares, As, Bs, strict=True):
        DW.addmm_(Bk, Ak, alpha=p)
    G = A @ A.T
    strength = lambda_rel * G.trace() / len(G)
    H = (DW - B @ A) @ A.T
    return torch.linalg.solve(G + strength * torch.eye(len(G), dtype=dtype), H, left=False)


def ridge_against_dense(console: Console, args: argparse.Namespace) -> bool:
    rule = LoRAFair(LoRAFairOptions())
    table = Table(
        title=f"LoRA-FAIR ridge, d={args.width} r={args.rank} K={args.clients}, one layer"
    )
    for column in ("drift", "two sums", "dense", "ratio", "error of X", "dense fp32's error"):
        table.add_column(column, justify="right")
    met = True
    for drift in args.drift:
        updates = updates_around(args, drift)
        truth = dense(updates, rule.options.lambda_, torch.float64)
        fast, slow = medians(
            args.repeats,
            lambda updates=updates: two_sums(updates, rule),
            lambda updates=updates: dense(updates, rule.options.lambda_, torch.float32),
        )
        error = relative_error(two_sums(updates, rule), truth)
        dense_error = relative_error(dense(updates, rule.options.lambda_, torch.float32), truth)
        met &= error < ERROR_TARGET and slow / fast >= SPEED_TARGET
        table.add_row(
            f"{drift:g}",
            f"{1e3 * fast:.1f} ms",
            f"{1e3 * slow:.0f} ms",
            f"{slow / fast:.0f} x",
            f"{error:.1e}",
            f"{dense_error:.1e}",
        )
    console.print(table)
    console.print(f"target: error < {ERROR_TARGET:g}, ratio >= {SPEED_TARGET:g}: {verdict(met)}\n")
    return met


def medians(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """Time the functions in turn, so that a busy spell of the machine hits all; seconds."""
    for function in functions:
        function()
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, taken in zip(functions, seconds, strict=True):
            began = time.perf_counter()
            function()
            taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in seconds]


def relative_error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


# 2. Memory by number of clients


def fedavg_memory(console: Console, counts: list[int]) -> bool:
    """Compare peaks in child processes: a process's peak never goes down again."""
    table = Table(title="FedAvg, 16 layers of 1024 x 1024, r=16 (2.1 MB an update): memory taken")
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
    command = [sys.executable, __file__, "--memory-child", str(count), how]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)["megabytes"])


def memory_child(count: str, how: str) -> dict[str, float]:
    """Gather updates and average them; return what that added to this process's peak memory."""
    shapes = [(1024, 1024)] * 16
    current = adapter(shapes, 16)
    rule = build_rule("fedavg")
    with tempfile.TemporaryDirectory() as folder:
        spool = UpdateSpool(Path(folder))
        spool.add("warm-up", 1.0, update_of(current, 0))  # whatever is allocated once
        aggregate(rule, spool, current, {}, 1)
        spool.clear()
        gc.collect()
        before = resident_mb("VmRSS")
        held: list[tuple[str, float, Tensors]] = []
        for k in range(int(count)):
            update = (str(k), 1.0 + k, update_of(current, k))
            if how == "spool":
                spool.add(*update)
            else:
                held.append(update)
        if how == "spool":
            aggregate(rule, spool, current, {}, 1)
        else:
            total = sum(weight for _, weight, _ in held)
            weighted_mean((weight / total, tensors) for _, weight, tensors in held)
        return {"megabytes": max(resident_mb("VmHWM") - before, 0.0)}


def resident_mb(field: str) -> float:
    """Read this process's resident memory now (VmRSS) or at its peak (VmHWM), in MB; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}")


def adapter(shapes: list[tuple[int, int]], rank: int) -> Adapter:
    return Adapter(
        {
            f"layers.{i}": LoraLayer(normal(2 * i, rank, d_in), normal(2 * i + 1, d_out, rank), 2.0)
            for i, (d_out, d_in) in enumerate(shapes)
        }
    )


def update_of(current: Adapter, client: int) -> Tensors:
    return {
        name: tensor + 0.1 * normal(client, *tensor.shape)
        for name, tensor in current.tensors().items()
    }


# 3. A round of the digits federation


def round_cost(console: Console) -> None:
    table = Table(title="The server's half of a digits round: 12 layers, r=8, 6 clients")
    for column in ("rule", "spool 6 updates", "aggregate", "diagnose"):
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
                15,
                fill,
                lambda rule=rule: aggregate(rule, spool, current, {}, 1),
                lambda rule=rule, made=made: aggregation_bias(rule, spool, current, made, 1),
            )
            table.add_row(
                " ".join([name, *map(str, chosen.values())]),
                *(f"{1e3 * second:.1f} ms" for second in seconds),
            )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
