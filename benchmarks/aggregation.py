"""Measure the server's half of a round: every rule's time and memory, against dense forms.

    python benchmarks/aggregation.py
    python benchmarks/aggregation.py --parts rules --rules lora-fair flexlora --blocks 32
    python benchmarks/aggregation.py --device cuda

Its parts, each with a file of its own name:

- rules: every installed rule at the shapes of a 7B Llama (32 blocks of seven matrices, r = 16,
  50 clients), seconds and memory of a round, each rule in a process of its own;
- dense: rules against the dense or naive form that they stand for, on one layer;
- growth: how the cost of a layer grows with the number of clients, the rank and the width, and how
  a residual's does from round to round;
- ridge: LoRA-FAIR's closed form against dense ones in memory, with errors;
- memory: FedAvg's memory by number of clients;
- digits: a round of the small digits federation.

On a GPU the first three run, on updates held there. Exits with status 1 where a target is missed: a
round of the whole adapter within two minutes and 1 GiB beyond the updates, FedAvg within one
update, LoRA-FAIR and FlexLoRA 50 times faster than dense, the ridge's error below 1e-5, FedAvg's
memory constant.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys

import torch
from aggregation_dense import against_dense
from aggregation_digits import digits_round
from aggregation_growth import growth, residual_by_round
from aggregation_measure import add_arguments
from aggregation_memory import fedavg_memory
from aggregation_ridge import ridge_against_dense
from aggregation_rules import every_rule
from rich.console import Console

PARTS = ("rules", "dense", "growth", "ridge", "memory", "digits")
ON_GPU = ("rules", "dense", "growth")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    console = Console(width=110)
    console.print(conditions(args))
    met = True
    if "rules" in args.parts:
        met &= every_rule(console, args)
    if "dense" in args.parts:
        met &= against_dense(console, args)
    if "growth" in args.parts:
        growth(console, args)
        residual_by_round(console, args)
    if "ridge" in args.parts:
        met &= ridge_against_dense(console, args)
    if "memory" in args.parts:
        met &= fedavg_memory(console, args.memory_clients)
    if "digits" in args.parts:
        digits_round(console)
    return 0 if met else 1


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS)
    parser.add_argument("--rules", nargs="+", help="those of the first part; all unless given")
    parser.add_argument("--memory-clients", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, in this process")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.parts is None:
        args.parts = PARTS if args.device == "cpu" else ON_GPU
    if args.quick:
        args.width, args.rank, args.clients, args.repeats = 64, 4, 5, 1
    return args


def conditions(args: argparse.Namespace) -> str:
    gpu = "" if args.device == "cpu" else f"{torch.cuda.get_device_name()}, "
    return (
        f"{platform.platform()}, {os.cpu_count()} cores, {gpu}Python {platform.python_version()}, "
        f"torch {torch.__version__}, {args.threads} thread(s)"
    )


if __name__ == "__main__":
    sys.exit(main())
