"""FedAvg's memory by number of clients, spooled to disk and folded, or held as a list of replies.

    python benchmarks/aggregation_memory.py 200 spool
    python benchmarks/aggregation_memory.py 200 list

Run like this it prints by how many MB averaging raised this process's peak memory, what keeps the
updates included; `aggregation.py` starts such a process for every figure. The adapter: 16 layers of
1024 x 1024, r = 16, 2.1 MB.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from aggregation_workload import adapter, update_of, with_peak
from rich.console import Console
from rich.table import Table

from strategies.aggregation import aggregate
from strategies.fedavg import FedAvg
from strategies.means import weighted_mean
from strategies.spool import UpdateSpool

SLACK_MB = 8.0  # between the fewest and the most clients: what an allocator keeps


def fedavg_memory(console: Console, counts: list[int]) -> bool:
    """Measure and print both; whether spooling takes the same memory for all counts."""
    table = Table(title="FedAvg's memory, 2.1 MB an update")
    for column in ("clients", "spooled and folded", "all held in memory"):
        table.add_column(column, justify="right")
    spooled: list[float] = []
    for count in counts:
        folded, held = (in_child(count, how) for how in ("spool", "list"))
        spooled.append(folded)
        table.add_row(f"{count}", f"{folded:.1f} MB", f"{held:.1f} MB")
    met = max(spooled) - min(spooled) < SLACK_MB
    console.print(table)
    console.print(f"target: constant within {SLACK_MB:g} MB: {'met' if met else 'MISSED'}\n")
    return met


def in_child(count: int, how: str) -> float:
    command = [sys.executable, __file__, str(count), how]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def rise(count: int, how: str, folder: Path) -> float:
    current, rule = adapter({f"layers.{i}": (1024, 1024) for i in range(16)}, 16), FedAvg()
    spool = UpdateSpool(folder)
    spool.add("warm-up", 1.0, update_of(current, 0))  # whatever is allocated only once
    aggregate(rule, spool, current, {}, 1)
    spool.clear()

    def average() -> None:
        if how == "spool":
            for k in range(count):
                spool.add(str(k), 1.0 + k, update_of(current, k))
            aggregate(rule, spool, current, {}, 1)
            return
        held = [(1.0 + k, update_of(current, k)) for k in range(count)]
        total = sum(weight for weight, _ in held)
        weighted_mean((weight / total, tensors) for weight, tensors in held)

    return with_peak(average)[2]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        print(rise(int(sys.argv[1]), sys.argv[2], Path(scratch)))
