"""Every installed rule at the shapes of a 7B Llama: seconds and memory of a round's aggregation.

Each rule runs in a process of its own (`aggregation_measure.py`), on updates spooled to disk. The
blocks of a Llama are alike and the host takes layer by layer, so one block is measured and
multiplied, unless `--blocks 32` measures all: seconds by 32, and what a round leaves in memory (the
next adapter, with residual and state) by 32 too, beside which the work of a layer is counted once.
Rules that make every entry of the dense product are measured on one layer, and scaled by entries.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aggregation_measure import measure
from aggregation_workload import BLOCKS, FAILURES, Shapes, llama, one_layer
from rich.console import Console
from rich.table import Table

from strategies.coordinatewise import Coordinatewise
from strategies.registry import rule_class, rule_names

SECONDS_TARGET = 120.0
MEMORY_TARGET = 1024.0**3 / 1e6  # 1 GiB in MB
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "lora-fair": [{"objective": "cosine"}],
    "flora": [{"max-rank": 64}],
    "fedex-lora": [{"max-rank": 64}, {"energy": 0.9999}],
    "multi-krum": [{"mixing": True}],
    "geometric-median": [{"mixing": True}],
    "coordinate-median": [{"mixing": True}],
}


@dataclass(frozen=True)
class Cost:
    """What a rule costs on what was measured, and on the whole adapter; MB are 10^6 bytes.

    Attributes:
        measured: of what.
        seconds, extra: of a round on that, memory beyond the updates.
        whole_seconds, whole_extra: of a round on the whole adapter.
        whole_made: what the round leaves of it.
    """

    label: str
    measured: str
    seconds: float
    extra: float
    whole_seconds: float
    whole_extra: float
    whole_made: float

    @property
    def missed(self) -> list[str]:
        """Which targets are missed."""
        late, large = self.whole_seconds > SECONDS_TARGET, self.whole_extra > MEMORY_TARGET
        return [name for name, missed in (("seconds", late), ("memory", large)) if missed]


def every_rule(console: Console, args: argparse.Namespace) -> bool:
    """Measure and print all rules; whether all targets are met."""
    where = "held on the GPU" if args.device != "cpu" else "spooled to disk"
    table = Table(
        title=f"A round at the shapes of a 7B Llama: r={args.rank} K={args.clients}, updates "
        f"{where} as {args.dtype}"
    )
    for column in ("rule", "measured", "s", "MB", "whole: s", "MB", "left MB", "targets"):
        table.add_column(column, justify="left" if column in ("rule", "targets") else "right")
    costs: list[Cost] = []
    for name, options in chosen(args.rules):
        try:
            with console.status(f"measuring {label_of(name, options)}"):
                cost = cost_of(name, options, args)
        except FAILURES as error:  # some need a CPU
            table.add_row(label_of(name, options), *[""] * 6, f"FAILED: {error}")
            continue
        costs.append(cost)
        told = "MISSED " + ", ".join(cost.missed) if cost.missed else "met"
        large = (cost.whole_seconds, cost.whole_extra, cost.whole_made)
        numbers = (f"{cost.seconds:.2f}", f"{cost.extra:.1f}", *(f"{value:.0f}" for value in large))
        table.add_row(cost.label, cost.measured, *numbers, told)
    console.print(table)
    failed = table.row_count - len(costs)
    met = not failed and not any(cost.missed for cost in costs)
    console.print(
        f"targets: a round of the whole adapter within {SECONDS_TARGET:g} s, memory beyond the "
        f"updates at most {MEMORY_TARGET:.0f} MB: {verdict(met)}"
    )
    small = fedavg_is_small(console, costs, args)
    return not failed if args.quick else small and met  # at tiny sizes seconds say nothing


def fedavg_is_small(console: Console, costs: list[Cost], args: argparse.Namespace) -> bool:
    """FedAvg's memory, without the adapter that it has to make, against one update."""
    found = [cost for cost in costs if cost.label == "fedavg"]
    if not found:
        return True
    work = found[0].whole_extra - found[0].whole_made
    entries = args.rank * sized(sum, llama(width=args.width))
    update = entries * (2 if args.dtype == "float16" else 4) / 1e6
    met = work < update
    console.print(
        f"target: FedAvg's memory beyond the updates and the next adapter, {work:.1f} MB, is below "
        f"one update, {update:.0f} MB: {verdict(met)}"
    )
    return met


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def chosen(names: list[str] | None) -> list[tuple[str, dict[str, Any]]]:
    """The rules of these names, or all, by default options and by those that change the cost."""
    return [
        (name, options)
        for name in names or rule_names()
        for options in [{}, *VARIANTS.get(name, [])]
    ]


def label_of(name: str, options: dict[str, Any]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in options.items())])


def cost_of(name: str, options: dict[str, Any], args: argparse.Namespace) -> Cost:
    """Measure one rule.

    Raises:
        RuntimeError: its process failed.
    """
    whole = llama(width=args.width)
    size: Callable[[Iterable[int]], int] = sum
    shapes, measured = llama(args.blocks, args.width), f"{args.blocks} of {BLOCKS}"
    if issubclass(rule_class(name), Coordinatewise):
        size = math.prod
        shapes, measured = one_layer(args.width), f"{args.width} x {args.width}"
    found = (measure if args.quick else in_child)(name, options, shapes, args)
    left = found["made"] * sized(sum, whole) / sized(sum, shapes)
    return Cost(
        label=label_of(name, options),
        measured=measured,
        seconds=found["seconds"],
        extra=found["extra"],
        whole_seconds=found["seconds"] * sized(size, whole) / sized(size, shapes),
        whole_extra=found["extra"] - found["made"] + left,
        whole_made=left,
    )


def sized(size: Callable[[Iterable[int]], int], shapes: Shapes) -> int:
    """Entries of factors a rank (`sum`), or of products (`math.prod`)."""
    return sum(size(shape) for shape in shapes.values())


def in_child(
    name: str, options: dict[str, Any], shapes: Shapes, args: argparse.Namespace
) -> dict[str, float]:
    settings = ("rank", "clients", "width", "dtype", "blocks", "threads", "repeats", "once-above")
    command = [sys.executable, str(Path(__file__).with_name("aggregation_measure.py")), name]
    command += ["--options", json.dumps(options)] + ["--layer"] * (len(shapes) == 1)
    for setting in (*settings, "device"):
        command += [f"--{setting}", str(getattr(args, setting.replace("-", "_")))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        told = done.stderr.strip().splitlines()[-1:]
        raise RuntimeError(*told or [f"its process ended with status {done.returncode}"])
    measured: dict[str, float] = json.loads(done.stdout)
    return measured
