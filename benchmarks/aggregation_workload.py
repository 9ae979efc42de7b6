"""What the aggregation benchmarks work on: adapters of known shapes, a round of updates, clocks.

Values are normal noise around a common adapter; every rule is given the factors that its plan asks
for and the companions that its clients would send. Updates are drawn anew for every shape, not for
every layer: only their sizes count.
"""

from __future__ import annotations

import ctypes
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fedgraft.adapter import Adapter, LoraLayer, Tensors
from fedgraft.seeds import stream
from strategies.aggregation import Aggregated, aggregate
from strategies.rule import Rule
from strategies.spool import UpdateSpool

Shapes = Mapping[str, tuple[int, int]]
"""d_out and d_in by layer name."""
Result = TypeVar("Result")

FAILURES = (RuntimeError, TypeError, ValueError)
"""What a rule raises that mixes an accelerator's tensors with the CPU's."""
ROUND = 2
"""The round that is measured: the first in which all rules have their state."""
_ENOUGH = 10.0  # seconds after which a function is not called again
_SHORTEST = 0.1  # seconds of calls that make a timing, so that short and long ones count alike


BLOCKS = 32
WIDTH = 4096


def llama(blocks: int = BLOCKS, width: int = WIDTH) -> Shapes:
    """The seven matrices of some of the blocks of a Llama of 7 billion parameters.

    A smaller width makes a smaller one of the same proportions.
    """
    middle = width * 11008 // 4096
    square, wide, tall = (width, width), (middle, width), (width, middle)
    block = {f"self_attn.{x}_proj": square for x in "qkvo"}
    block |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": tall}
    return {f"layers.{i}.{name}": shape for i in range(blocks) for name, shape in block.items()}


def one_layer(width: int) -> Shapes:
    return {"layer": (width, width)}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(stream(seed, "benchmark").standard_normal(shape, dtype="float32"))


def adapter(shapes: Shapes, rank: int) -> Adapter:
    """An adapter of random factors for these layers."""
    return Adapter(
        {
            name: LoraLayer(normal(2 * i, rank, d_in), normal(2 * i + 1, d_out, rank), 2.0)
            for i, (name, (d_out, d_in)) in enumerate(shapes.items())
        }
    )


def update_of(
    current: Adapter,
    client: int,
    rule: Rule | None = None,
    round: int = ROUND,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    """What a client sends under a rule; both factors without one."""
    noise = cache(lambda *shape: 0.1 * normal(client, *shape))
    factors = ("A", "B") if rule is None else rule.plan(round).train
    made = {n: t + noise(*t.shape).to(t) for n, t in current.tensors(factors).items()}
    companions = {} if rule is None else rule.companion_shapes(current, round)
    device = next(iter(current.layers.values())).A.device
    made |= {name: noise(*shape).to(device) for name, shape in companions.items()}
    return {name: tensor.to(dtype) for name, tensor in made.items()}


@dataclass(frozen=True)
class Prepared:
    """A round of updates, ready to be aggregated."""

    rule: Rule
    spool: UpdateSpool
    current: Adapter
    state: Tensors

    def aggregate(self) -> Aggregated:
        return aggregate(self.rule, self.spool, self.current, self.state, ROUND)


@contextmanager
def prepared(
    rule: Rule,
    shapes: Shapes,
    rank: int,
    clients: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Iterator[Prepared]:
    """A second round of many clients, after a first one of two.

    Updates lie in a spool on disk; on an accelerator they are held in its memory, and the same code
    aggregates them there.
    """
    start = adapter(shapes, rank)
    start = start.with_tensors({n: t.to(device) for n, t in start.tensors().items()})
    with tempfile.TemporaryDirectory() as folder:
        spool = UpdateSpool(Path(folder), 0 if device == "cpu" else sys.maxsize)
        for k in range(2):
            spool.add(str(k), 1.0, update_of(start, k, rule, 1, dtype))
        first = aggregate(rule, spool, start, {}, 1)
        fill(spool, rule, first.adapter, clients, dtype)
        yield Prepared(rule, spool, first.adapter, first.state)


def fill(
    spool: UpdateSpool,
    rule: Rule,
    current: Adapter,
    clients: int,
    dtype: torch.dtype,
    first: int = 0,
) -> None:
    """Put a round's updates in place of those in a spool; `first` gives other numbers."""
    spool.clear()
    for k in range(clients):
        spool.add(str(k), 100.0 + k, update_of(current, first + k, rule, ROUND, dtype))


def made_bytes(made: Aggregated) -> int:
    """Bytes of what a round leaves: the adapter, its residual and the rule's state."""
    residual = [t for layer in made.adapter.residual.values() for t in (layer.A, layer.B)]
    tensors = [*made.adapter.tensors().values(), *residual, *made.state.values()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


# Clocks and peaks


def medians(repeats: int, *functions: Callable[[], object], device: str = "cpu") -> list[float]:
    """Time the functions in turn, so that a busy spell of the machine hits all; seconds a call.

    Call them once before. One that takes long is timed once.
    """
    taken: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, seconds in zip(functions, taken, strict=True):
            if math.fsum(seconds) > _ENOUGH:
                continue
            began, calls = time.perf_counter(), 0
            while calls == 0 or time.perf_counter() - began < _SHORTEST:
                function()
                synchronise(device)
                calls += 1
            seconds.append((time.perf_counter() - began) / calls)
    return [statistics.median(seconds) for seconds in taken]


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def with_peak(function: Callable[[], Result], device: str = "cpu") -> tuple[Result, float, float]:
    """Return what a function returns, its seconds, and by how many MB memory rose at the most.

    On the CPU that is resident memory, and Linux's; on an accelerator what torch allocated there.
    """
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would hold what comes
        with suppress(OSError):  # not every kernel lets the peak be set back; it is then too high
            Path("/proc/self/clear_refs").write_text("5")
        before = resident_mb("VmRSS")
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
    synchronise(device)
    began = time.perf_counter()
    result = function()
    synchronise(device)
    seconds = time.perf_counter() - began
    peak = resident_mb("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated() / 1e6
    return result, seconds, max(peak - before, 0.0)


def resident_mb(field: str) -> float:
    """This process's resident memory now (VmRSS) or at its peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}")
