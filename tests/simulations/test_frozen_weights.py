"""The base stays what it was: whole federations of every kind never write to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedgraft.base import hash_base
from fedgraft.config import Config
from fedgraft.resident_model import ResidentModel, resident_model, resident_task
from fedgraft.run_directory import RunDirectory
from fedgraft.tasks.task import Task
from simulations.engine import run_engine


def hash_of_the_base_within(model: ResidentModel, task: Task) -> str:
    """Return the base's hash, of the tensors that stand in the resident model now."""
    found = {}
    for name, tensor in model.model.state_dict().items():
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        found[name.replace(".original_module.", ".")] = tensor
    base = task.load_base()
    base.load_state_dict({name: found[name] for name in base.state_dict()})
    return hash_base(base)


@pytest.mark.parametrize("optimizer_state", ["reset", "keep"])
def test_whole_federations_leave_the_frozen_weights_as_they_were(
    optimizer_state: str, tiny: Config, tmp_path: Path
) -> None:
    """Three strategies, one after the other in one process, on the one resident model."""
    config = tiny.with_overrides(
        {
            "train.optimizer-state": optimizer_state,
            "adapter.dropout": 0.1,
            "train.weight-decay": 0.1,
        }
    )
    task = resident_task(config)
    model = resident_model(task, config)
    frozen = model.frozen_digest()
    assert hash_of_the_base_within(model, task) == model.base_hash
    for name in ("fedavg", "ffa-lora", "lora-fair"):
        chosen = config.with_overrides({"strategy.name": name})
        before = model.adapter().digest()
        run_engine(chosen, RunDirectory.create(tmp_path / name, chosen, name))
        assert resident_model(task, chosen) is model and model.adapter().digest() != before
        assert model.frozen_digest() == frozen, name
        assert hash_of_the_base_within(model, task) == model.base_hash, name
    with torch.no_grad():  # and one bit less would have been seen
        next(p for p in model.model.parameters() if not p.requires_grad).view(-1)[0] += 1e-6
    assert model.frozen_digest() != frozen
    assert hash_of_the_base_within(model, task) != model.base_hash
    with torch.no_grad():
        next(p for p in model.model.parameters() if not p.requires_grad).view(-1)[0] -= 1e-6
