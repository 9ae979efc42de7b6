"""Measure the in-process simulation: FedGraft against a plain loop, Flower under Ray and pfl.

    python benchmarks/simulation.py
    python benchmarks/simulation.py --pfl-python /path/to/an/interpreter/with/pfl
    python benchmarks/simulation.py --quick    # (a) and (b) at tiny size, in seconds

One piece of work for all: a tiny Llama with random weights (hidden 128, 4 layers, LoRA r=8 on q and
v), 20 clients, 5 rounds, 4 AdamW steps of 4 x 32 synthetic tokens a client and round, one thread,
training and aggregation only:

(a) a plain PyTorch loop over the same steps;
(b) FedGraft in process: its strategy and its ClientApp;
(c) the same ClientApp under Flower's Ray simulation;
(d) a ClientApp that rebuilds tokenizer, base, PEFT model and Trainer for every message, as
    FlowerTune's does, with Flower's FedAvg, under the same;
(e) pfl-research, where an interpreter that has it is named.

(a) runs beside (b), beside (b) with evaluation or checkpoints, and beside (e): one of its rounds
after each of theirs, so that both meet the same machine. A ratio is the median over such runs. (c)
and (d) run once, with as many clients at once as there are cores, and are set against the median of
(a); the others work on one client at a time. Every rival must end with the same adapter.

The clock of (b), (c) and (d) runs from the first training message to the last aggregate; what comes
before (starting Flower, asking clients for their names) is in the column "whole". Exits with status
1 where adapters differ or a target is missed: (b) at most 1.1 x (a), and 3 x faster than (d).
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from flwr.app import UserConfig
from rich.console import Console
from safetensors.torch import load_file, save_file
from simulation_flower import REBUILDING, RESIDENT, Clock, federate, run_under_ray
from simulation_table import Row, check_adapters, check_times, table
from simulation_workload import (
    TARGETS,
    TINY,
    Beside,
    Plan,
    Size,
    Stopwatch,
    Work,
    build_model,
    write,
    write_plan,
)

from client.app import app as client_app
from client.trainer import batch_indices
from fedgraft.config import RUN_CONFIG_KEY, Config
from fedgraft.logs import hushed
from fedgraft.resident_model import ResidentModel, resident_model, resident_task
from fedgraft.seeds import stream
from fedgraft.tasks.task import Task
from server.checkpoint import Checkpoint, Checkpoints
from simulations.in_process import InProcessGrid
from strategies.rounds import RoundOutcome


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    console = Console(width=110)
    with tempfile.TemporaryDirectory(prefix="fedgraft-benchmark-") as scratch, hushed():
        bench = Bench(Path(scratch), TINY if args.quick else Size())
        console.print(conditions(bench.work.size), soft_wrap=True)
        rows = bench.take_turns(1 if args.quick else args.repeats)
        if not args.quick:
            if not args.without_flower:
                rows["c"] = bench.under_ray("(c) FedGraft under Ray", RESIDENT)
                rows["d"] = bench.under_ray("(d) all rebuilt, under Ray", REBUILDING, trainer=True)
                rows["d0"] = bench.under_ray("  without its Trainer", REBUILDING)
            rows |= bench.under_pfl(args.pfl_python, args.repeats)
    console.print(table(rows))
    console.print(f"load average {load()} at the end")
    verdicts = check_adapters(rows) + ([] if args.quick else check_times(rows))
    for met, text in verdicts:
        console.print(f"{text}: {'met' if met else 'MISSED'}")
    return 0 if all(met for met, _ in verdicts) else 1


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="runs of each row; the median counts"
    )
    parser.add_argument("--quick", action="store_true", help="check adapters only, at tiny size")
    parser.add_argument("--without-flower", action="store_true", help="leave out (c) and (d)")
    parser.add_argument("--pfl-python", type=Path, help="an interpreter that has pfl")
    return parser.parse_args(argv)


def conditions(size: Size) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "peft", "flwr", "ray"))
    return (
        f"{date.today()}, {platform.platform()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, {packages}\n"
        f"{size.clients} clients, {size.rounds} rounds, {size.steps} steps of {size.batch} x "
        f"{size.length} tokens, hidden {size.hidden}, {size.layers} layers, r={size.rank}; one "
        f"thread a process; load average {load()} at the start"
    )


def load() -> str:
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


class Bench:
    """The work in a folder, and everything loaded that stays loaded."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder = folder
        write(folder, size)
        self.config = config(folder, size)
        self.task: Task = resident_task(self.config)
        self.model: ResidentModel = resident_model(self.task, self.config)
        self.start = self.model.initial_adapter(self.config.seed).tensors()
        save_file(self.start, folder / "start.safetensors")
        write_plan(folder, size, plan(self.config, size))
        self.work = Work.read(folder)
        self.plain_model = build_model(folder, size)

    def take_turns(self, repeats: int) -> dict[str, Row]:
        """Run (b), alone and with one more duty a round, (a) beside each."""
        validation = self.task.validation()
        checkpoints = Checkpoints(self.folder / "checkpoints", keep=2)

        def validate(outcome: RoundOutcome) -> None:
            self.model.evaluate(self.task, outcome.state.adapter, validation)

        def save(outcome: RoundOutcome) -> None:
            checkpoints.save(Checkpoint(outcome.state, outcome.state.adapter, {}))

        rows = {"a": Row("(a) plain PyTorch loop"), "b": Row("(b) FedGraft in process")}
        duties = {
            "clients": Row("  + every client validates"),
            "server": Row("  + the server validates"),
            "save": Row("  + a checkpoint a round"),
        }
        self.in_process(Row("warm-up"))
        for _ in range(repeats):
            self.in_process(rows["b"])
            self.in_process(duties["clients"], evaluate_every=1)
            self.in_process(duties["server"], duty=validate)
            self.in_process(duties["save"], duty=save)
        rows["a"].adapter, rows["a"].seconds = rows["b"].plain_adapter, rows["b"].plain_seconds
        return rows | duties

    def in_process(
        self,
        row: Row,
        evaluate_every: int = 0,
        duty: Callable[[RoundOutcome], object] | None = None,
    ) -> None:
        beside = Beside(self.plain_model, self.work, self.start)
        clock = Clock(duty, between=beside.round)
        settings: UserConfig = {RUN_CONFIG_KEY: self.config.to_json()}
        grid = InProcessGrid(client_app, self.work.size.clients, settings)
        gc.collect()
        began = time.perf_counter()
        row.adapter = federate(grid, self.config, self.start, clock, evaluate_every)
        row.plain_adapter = beside.adapter
        row.add(clock.watch, beside.watch)
        row.whole.append(time.perf_counter() - began - beside.watch.seconds)

    def under_ray(self, label: str, apps: tuple[str, str], *, trainer: bool = False) -> Row:
        adapter, seconds, whole = run_under_ray(self.folder, apps, self.config, trainer=trainer)
        return Row(label, [seconds], whole=[whole], adapter=adapter)

    def under_pfl(self, python: Path | None, repeats: int) -> dict[str, Row]:
        """Run (e), (a) beside it; a row without times where that cannot be."""
        if python is None:
            return {"e": Row("(e) pfl-research: unavailable, no --pfl-python")}
        script = Path(__file__).parent / "simulation_pfl.py"
        command = [str(python), str(script), str(self.folder), str(repeats)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
            return {"e": Row(f"(e) pfl-research: unavailable, {last}")}
        found = json.loads(done.stdout.strip().splitlines()[-1])
        row = Row(f"(e) pfl-research {found['version']}")
        row.adapter = load_file(self.folder / "pfl.safetensors")
        for watch, beside in found["watches"]:
            row.add(Stopwatch(**watch), Stopwatch(**beside))
        return {"e": row}


def config(folder: Path, size: Size) -> Config:
    """FedGraft's config of the work."""
    return Config.from_dict(
        {
            "task.name": "causal-lm",
            "task.data": str(folder / "data"),
            "task.template": "{text}",
            "task.max-length": size.length,
            "model.base": str(folder / "base"),
            "model.device": "cpu",
            "adapter.rank": size.rank,
            "adapter.alpha": float(size.alpha),
            "adapter.targets": list(TARGETS),
            "federation.clients": size.clients,
            "federation.rounds": size.rounds,
            "federation.partition": "natural",
            "federation.partition-column": "client",
            "train.steps": size.steps,
            "train.batch-size": size.batch,
            "train.lr": size.lr,
            "train.schedule": "constant",
            "train.grad-clip": 0.0,
            "train.loss": "all",
            "threads": 1,
        }
    )


def plan(config: Config, size: Size) -> Plan:
    """The batches that FedGraft's trainer draws, for its rivals to take too."""
    made: Plan = []
    for round in range(1, size.rounds + 1):
        made.append([])
        for client in range(size.clients):
            rng = stream(config.seed, "batches", round=round, client=str(client))
            batches = batch_indices(size.rows(client), size.batch, rng)
            made[-1].append([next(batches).tolist() for _ in range(size.steps)])
    return made


if __name__ == "__main__":
    sys.exit(main())
