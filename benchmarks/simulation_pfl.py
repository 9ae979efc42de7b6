"""The work of benchmarks/simulation.py under pfl-research, run by an interpreter that has it.

    python -m venv pfl && pfl/bin/pip install 'pfl[pytorch]==0.6.*' transformers peft
    python benchmarks/simulation.py --pfl-python pfl/bin/python

FederatedAveraging on pfl's simulated backend, one process, weighted by examples, with pfl's
evaluation of every user before and after training left out. The plain loop takes a round after each
of its rounds, so that both meet the same machine. Prints one line of JSON, the seconds of both by
turn, and writes the adapter to pfl.safetensors.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from safetensors.torch import load_file, save_file
from simulation_workload import Beside, Stopwatch, Work, build_model, mean_loss, trainable
from torch import Tensor, nn


class Language(nn.Module):
    """The model with the two methods that pfl asks for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, ids: Tensor) -> Tensor:
        return mean_loss(self.model, ids)

    def metrics(self, ids: Tensor) -> dict[str, Any]:
        return {}


class NeverEvaluated(PyTorchModel):
    """pfl's model; in round 0 pfl would evaluate it on every user, whatever the frequency."""

    def evaluate(self, *args: Any, **kwargs: Any) -> Metrics:
        return Metrics()


def adamw(parameters: Iterator[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(wanted, lr=lr, weight_decay=0.0, fused=True)


def users(work: Work) -> FederatedDataset:
    """Every client once a round, its rows in the order of the plan."""
    rounds = [iter(work.plan) for _ in work.tokens]

    def dataset(client: int) -> Dataset:
        planned = list(itertools.chain(*next(rounds[client])[client]))
        ids = work.tokens[client]
        rest = sorted(set(range(len(ids))) - set(planned))  # they count for the weight
        return Dataset((ids[planned + rest],), user_id=str(client))

    return FederatedDataset(dataset, itertools.cycle(range(len(work.tokens))).__next__)


class Turns(TrainingProcessCallback):
    """Stops the watch after each of pfl's rounds, for the plain loop to take one."""

    def __init__(self, beside: Beside) -> None:
        self.watch = Stopwatch()
        self._beside = beside

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        self.watch.stop()
        self._beside.round()
        self.watch.start()
        return False, Metrics()


def federate(hosted: PyTorchModel, work: Work, turns: Turns) -> None:
    size, data = work.size, users(work)
    turns.watch.start()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=size.rounds,
            evaluation_frequency=size.rounds,
            train_cohort_size=size.clients,
            val_cohort_size=None,
        ),
        SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
        hosted,
        NNTrainHyperParams(
            local_num_epochs=None,
            local_num_steps=size.steps,
            local_learning_rate=size.lr,
            local_batch_size=size.batch,
        ),
        callbacks=[turns],
        send_metrics_to_platform=False,
    )


def main() -> None:
    folder, repeats = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    work, start = Work.read(folder), load_file(folder / "start.safetensors")
    model, plain = build_model(folder, work.size), build_model(folder, work.size)
    parameters = trainable(model)
    hosted = NeverEvaluated(
        Language(model.train()),
        local_optimizer_create=adamw,
        central_optimizer=torch.optim.SGD(parameters.values(), lr=1.0),
    )
    watches = []
    for _ in range(repeats + 1):  # the first one warms up
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(start[name])
        beside = Beside(plain, work, start)
        turns = Turns(beside)
        gc.collect()
        federate(hosted, work, turns)
        watches.append([asdict(turns.watch), asdict(beside.watch)])
    made = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    save_file(made, folder / "pfl.safetensors")
    print(json.dumps({"version": version("pfl"), "watches": watches[1:]}))


if __name__ == "__main__":
    main()
