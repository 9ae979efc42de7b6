"""The work of benchmarks/simulation.py under pfl-research, run by an interpreter that has it.

    python -m venv pfl && pfl/bin/pip install 'pfl[pytorch]==0.6.*' transformers peft
    python benchmarks/simulation.py --pfl-python pfl/bin/python

FederatedAveraging on pfl's simulated backend, one process, weighted by examples, with pfl's
evaluation of every user before and after training left out. It takes turns with the plain loop, so
that both meet the same machine. Prints one line of JSON and writes the adapter to pfl.safetensors.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from safetensors.torch import load_file, save_file
from simulation_workload import Work, build_model, mean_loss, plain_federation, trainable
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


def pfl_federation(model: nn.Module, work: Work, start: dict[str, Tensor]) -> dict[str, Tensor]:
    size = work.size
    parameters = trainable(model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start[name])
    model.train()
    hosted = NeverEvaluated(
        Language(model),
        local_optimizer_create=adamw,
        central_optimizer=torch.optim.SGD(parameters.values(), lr=1.0),
    )
    data = users(work)
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
        send_metrics_to_platform=False,
    )
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def seconds(federation: Callable[..., Any], *args: Any) -> float:
    began = time.perf_counter()
    federation(*args)
    return time.perf_counter() - began


def main() -> None:
    folder, repeats = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    work, start = Work.read(folder), load_file(folder / "start.safetensors")
    model = build_model(folder, work.size)
    save_file(pfl_federation(model, work, start), folder / "pfl.safetensors")
    pairs = [
        (seconds(plain_federation, model, work, start), seconds(pfl_federation, model, work, start))
        for _ in range(repeats)
    ]
    print(json.dumps({"version": version("pfl"), "torch": torch.__version__, "pairs": pairs}))


if __name__ == "__main__":
    main()
