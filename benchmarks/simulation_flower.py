"""The apps that benchmarks/simulation.py runs under Flower's Ray simulation, and how it runs them.

- `resident_server` hosts FedGraft's strategy, for FedGraft's own ClientApp.
- `rebuilding_client` rebuilds tokenizer, base, PEFT model and trainer for every message, as
  FlowerTune's ClientApp does, and `rebuilding_server` averages with Flower's FedAvg. The trainer is
  transformers' own, of which FlowerTune's (TRL's SFTTrainer) is a subclass; or, to see what it
  costs, the plain loop instead.

Flower imports this file by name; simulation.py puts its folder on the path.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
    UserConfig,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file, save_file
from simulation_workload import Size, Stopwatch, Work, build_model, train_client, trainable
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from fedgraft import flower
from fedgraft.adapter import from_arrays, to_arrays
from fedgraft.config import RUN_CONFIG_KEY, Config
from simulations.ray_engine import submitted
from strategies.rounds import RoundHooks, RoundOutcome
from strategies.strategy import AdapterStrategy

FOLDER, TRAINER = "benchmark.folder", "benchmark.trainer"
"""Keys of the run config: where the work is, and whether transformers' Trainer does it."""
RESIDENT = ("simulation_flower:resident_server", "client.app:app")
REBUILDING = ("simulation_flower:rebuilding_server", "simulation_flower:rebuilding_client")
_SECONDS = 1200.0


@dataclass
class Clock(RoundHooks):
    """A stopwatch that runs from the first training message to the last aggregate.

    Attributes:
        duty: done after every round, while the watch runs.
        between: done after every round, while it stands still.
    """

    duty: Callable[[RoundOutcome], object] | None = None
    between: Callable[[], object] | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)

    def on_sampled(self, round: int, clients: list[str]) -> None:
        if round == 1:
            self.watch.start()

    def on_round(self, outcome: RoundOutcome) -> bool:
        if self.duty is not None:
            self.duty(outcome)
        self.watch.stop()
        if self.between is not None:
            self.between()
        self.watch.start()
        return False


def federate(
    grid: Grid,
    config: Config,
    start: Mapping[str, Tensor],
    hooks: RoundHooks | None = None,
    evaluate_every: int = 0,
) -> dict[str, Tensor]:
    """Run FedGraft's FedAvg over a grid; training and aggregation alone, unless told otherwise."""
    strategy = AdapterStrategy(
        "fedavg",
        scaling=config.adapter.scaling,
        clients=config.federation.clients,
        seed=config.seed,
        evaluate_every=evaluate_every,
        hooks=hooks,
    )
    result = strategy.start(grid, to_arrays(start), num_rounds=config.federation.rounds)
    return from_arrays(result.arrays)


# FedGraft's client under Ray

resident_server = ServerApp()


@resident_server.main()
def serve_resident(grid: Grid, context: Context) -> None:
    folder = Path(str(context.run_config[FOLDER]))
    config = Config.from_run_config(context.run_config)
    clock = Clock()
    made = federate(grid, config, load_file(folder / "start.safetensors"), clock)
    finish(folder, made, clock.watch.seconds)


# A client that rebuilds everything, under Ray

rebuilding_server = ServerApp()
rebuilding_client = ClientApp()
_work: Work | None = None


class TimedFedAvg(FedAvg):
    """Flower's FedAvg with a clock around it."""

    began = 0.0
    seconds = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.began = self.began or time.perf_counter()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        made = super().aggregate_train(server_round, replies)
        self.seconds = time.perf_counter() - self.began
        return made


@rebuilding_server.main()
def serve_rebuilding(grid: Grid, context: Context) -> None:
    folder = Path(str(context.run_config[FOLDER]))
    size = Work.read(folder).size
    strategy = TimedFedAvg(
        fraction_evaluate=0.0, min_train_nodes=size.clients, min_available_nodes=size.clients
    )
    start = ArrayRecord(load_file(folder / "start.safetensors"))
    result = strategy.start(grid, start, num_rounds=size.rounds)
    finish(folder, dict(result.arrays.to_torch_state_dict()), strategy.seconds)


@rebuilding_client.train()
def train_rebuilding(message: Message, context: Context) -> Message:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoTokenizer

    global _work  # the data stay loaded, as FlowerTune's do
    folder = Path(str(context.run_config[FOLDER]))
    torch.set_num_threads(1)
    _work = _work or Work.read(folder)
    client = int(context.node_config["partition-id"])
    round = int(str(message.content.config_records["config"]["server-round"]))
    AutoTokenizer.from_pretrained(folder / "base")
    model = build_model(folder, _work.size)
    arrays = message.content.array_records["arrays"]
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    ids, batches = _work.tokens[client], _work.plan[round - 1][client]
    if context.run_config[TRAINER]:
        run_trainer(model, ids, batches, _work.size, folder / "trainer")
    else:
        train_client(model.train(), trainable(model), ids, batches, _work.size.lr)
    reply = RecordDict()
    reply["arrays"] = ArrayRecord(get_peft_model_state_dict(model))
    reply["metrics"] = MetricRecord({"num-examples": len(ids)})
    return Message(reply, reply_to=message)


def run_trainer(
    model: nn.Module, ids: Tensor, batches: list[list[int]], size: Size, folder: Path
) -> None:
    """Train with transformers' Trainer, with the settings of the plain loop."""
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(dataset)

    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=size.steps,
        per_device_train_batch_size=size.batch,
        learning_rate=size.lr,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="adamw_torch_fused",
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rows = [{"input_ids": ids[row], "labels": ids[row]} for batch in batches for row in batch]
    InOrder(model=model, args=settings, train_dataset=rows).train()


# Running them


def finish(folder: Path, made: Mapping[str, Tensor], seconds: float) -> None:
    """Leave the result where `run_under_ray` looks for it; the time comes last and all at once."""
    save_file(dict(made), folder / "made.safetensors")
    (folder / "seconds.json.part").write_text(json.dumps(seconds))
    (folder / "seconds.json.part").rename(folder / "seconds.json")


def run_under_ray(
    folder: Path, apps: tuple[str, str], config: Config, *, trainer: bool = False
) -> tuple[dict[str, Tensor], float, float]:
    """Run two apps; return the adapter, the seconds of their clock, and those of everything.

    The whole wall is from before the SuperLink starts to the result.
    """
    for name in ("made.safetensors", "seconds.json"):
        (folder / name).unlink(missing_ok=True)
    began = time.perf_counter()
    app = folder / "app"
    run_config: UserConfig = {FOLDER: str(folder), TRAINER: trainer}
    run_config[RUN_CONFIG_KEY] = config.to_json()
    flower.write_app(app, run_config, *apps)
    settings = flower.simulation_settings(config.federation.clients, cpus=1, gpus=0.0)
    environment = flower.flower_environment(folder / "home")
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *_python_path()])
    log = folder / "flower.log"
    with submitted(app, settings, environment, log) as stream:
        while not (folder / "seconds.json").exists():
            if stream.poll() is not None or time.perf_counter() - began > _SECONDS:
                raise SystemExit(f"the run under Ray ended without a result:\n{_tail(log)}")
            time.sleep(0.05)
        whole = time.perf_counter() - began
    seconds = float(json.loads((folder / "seconds.json").read_text()))
    return load_file(folder / "made.safetensors"), seconds, whole


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])
