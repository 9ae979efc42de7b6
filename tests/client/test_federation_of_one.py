"""A federation of one client is plain local LoRA training, step for step, whatever the rule.

The real ServerApp and ClientApp run in process; the other side is `plain_loop`, which shares
nothing with them but the base, the examples and the definition of a random stream. The optimizer
starts afresh each round in both, and the cosine spans the whole run.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plain_loop import PlainLoop

from fedgraft.config import Config
from fedgraft.files import read_tensors
from fedgraft.resident_model import ResidentModel
from fedgraft.run_directory import RunDirectory
from fedgraft.tasks.digits import Digits
from simulations.engine import run_engine

ROUNDS, STEPS, BATCH, LR = 3, 4, 16, 0.01


def optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)


@pytest.mark.parametrize(
    ("strategy", "factors"), [("fedavg", "AB"), ("lora-fair", "AB"), ("ffa-lora", "B")]
)
def test_every_round_equals_the_plain_loop_to_the_bit(
    strategy: str, factors: str, tiny: Config, tmp_path: Path
):
    config = tiny.with_overrides(
        {
            "federation.clients": 1,
            "federation.rounds": ROUNDS,
            "train.steps": STEPS,
            "train.batch-size": BATCH,
            "train.lr": LR,
            "train.grad-clip": 0.0,
            "strategy.name": strategy,
            "checkpoint.keep": ROUNDS + 1,
            "evaluate.clients": False,
        }
    )
    directory = RunDirectory.create(tmp_path / "run", config, "one")
    run_engine(config, directory)
    task = Digits(config)
    loop = PlainLoop(task, config, optimizer, ROUNDS, STEPS, BATCH, LR, factors=factors)
    first = ResidentModel(task, config).initial_adapter(config.seed).tensors()
    expected = first
    for round in range(ROUNDS + 1):
        if round:
            expected = loop.train(task.train(), "0", round, expected)
        # Not even rounding may differ: one client's share is 1, and LoRA-FAIR's correction is made
        # of differences from a mean that is the client itself.
        found, _ = read_tensors(directory.checkpoints / f"round-{round:06d}.safetensors")
        made = {n.removeprefix("adapter/"): t for n, t in found.items() if n.startswith("adapter/")}
        assert made.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(made[name], tensor), (round, name)
    still = {name for name in expected if torch.equal(expected[name], first[name])}
    assert still == {name for name in expected if "lora_A" in name and "A" not in factors}
