"""Print what one rule's aggregation costs at the shapes of a 7B Llama, as a line of JSON.

    python benchmarks/aggregation_measure.py lora-fair
    python benchmarks/aggregation_measure.py fedex-lora --options '{"max-rank": 64}' --blocks 32

`aggregation_rules.py` starts one such process a rule, so that none inherits another's memory.
`seconds` is the median of a few calls of `strategies.aggregation.aggregate` on a spool of updates,
`extra` by how many MB (10^6 bytes) memory rose in the first of them at the most, `made` the MB of
the adapter, residual and state that it leaves, `update` the MB of one client's update.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from aggregation_workload import (
    WIDTH,
    Shapes,
    llama,
    made_bytes,
    medians,
    one_layer,
    prepared,
    update_of,
    with_peak,
)

from strategies.registry import build_rule

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def measure(
    name: str,
    options: dict[str, Any],
    shapes: Shapes,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Aggregate a round of updates to an adapter of these shapes."""
    rule = build_rule(name, options)
    dtype = DTYPES[args.dtype]
    with prepared(rule, shapes, args.rank, args.clients, dtype, args.device) as work:
        update = update_of(work.current, 0, rule, dtype=dtype)
        size = sum(tensor.nbytes for tensor in update.values())
        del update
        made, first, extra = with_peak(work.aggregate, args.device)
        left = made_bytes(made)
        del made
        seconds = first
        if args.repeats > 1 and first < args.once_above:
            (seconds,) = medians(args.repeats, work.aggregate, device=args.device)
    return {"seconds": seconds, "extra": extra, "made": left / 1e6, "update": size / 1e6}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every benchmark of rules takes."""
    parser.add_argument("--width", type=int, default=WIDTH, help="d, the model's hidden size")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of spooled updates")
    parser.add_argument("--blocks", type=int, default=1, help="of 32; 32 measures all of a 7B")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="timings of each; the median counts")
    parser.add_argument("--once-above", type=float, default=3.0, help="seconds; no repeats above")
    parser.add_argument("--device", default="cpu", help="cuda holds updates and sums on a GPU")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rule")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON")
    parser.add_argument("--layer", action="store_true", help="one d x d layer instead of blocks")
    add_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = one_layer(args.width) if args.layer else llama(args.blocks, args.width)
    print(json.dumps(measure(args.rule, args.options, shapes, args)))


if __name__ == "__main__":
    main()
