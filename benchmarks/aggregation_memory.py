"""Print by how many MB averaging the updates of some clients raises this process's peak memory.

    python benchmarks/aggregation_memory.py 200 spool
    python benchmarks/aggregation_memory.py 200 list

`spool` writes each update to disk and folds them one by one, as the server does; `list` holds all
of them first. A process's peak never goes down again, so every figure needs a process of its own:
`aggregation.py` starts them. Linux only. The adapter: 16 layers of 1024 x 1024, r = 16, 2.1 MB.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fedgraft.adapter import Adapter, LoraLayer, Tensors
from fedgraft.seeds import stream
from strategies.aggregation import aggregate
from strategies.fedavg import FedAvg
from strategies.means import weighted_mean
from strategies.spool import UpdateSpool


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(stream(seed, "benchmark").standard_normal(shape, dtype="float32"))


def adapter(shapes: list[tuple[int, int]], rank: int) -> Adapter:
    """An adapter for layers of these (d_out, d_in)."""
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


def resident_mb(field: str) -> float:
    """This process's resident memory now (VmRSS) or at its peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}")


def rise(count: int, how: str, folder: Path) -> float:
    current, rule, spool = adapter([(1024, 1024)] * 16, 16), FedAvg(), UpdateSpool(folder)
    spool.add("warm-up", 1.0, update_of(current, 0))  # whatever is allocated only once
    aggregate(rule, spool, current, {}, 1)
    spool.clear()
    gc.collect()
    before = resident_mb("VmRSS")
    if how == "spool":
        for k in range(count):
            spool.add(str(k), 1.0 + k, update_of(current, k))
        aggregate(rule, spool, current, {}, 1)
    else:
        held = [(1.0 + k, update_of(current, k)) for k in range(count)]
        total = sum(weight for weight, _ in held)
        weighted_mean((weight / total, tensors) for weight, tensors in held)
    return max(resident_mb("VmHWM") - before, 0.0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        print(rise(int(sys.argv[1]), sys.argv[2], Path(scratch)))
