"""Clients of different ranks in whole federations."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedgraft.config import Config
from fedgraft.files import read_tensors
from fedgraft.run_directory import RunDirectory
from simulations.engine import run_engine
from simulations.simulate import prepare
from strategies.registry import rule_class, rule_names


def run(config: Config, path: Path) -> RunDirectory:
    directory = prepare(config, path)
    run_engine(directory.config(), directory, "in-process")
    return directory


@pytest.mark.parametrize(
    "name", [n for n in rule_names() if rule_class(n).capabilities.mixed_ranks]
)
def test_every_rule_that_takes_mixed_ranks_does(name: str, tiny: Config, tmp_path: Path) -> None:
    own = {"strategy.byzantine": 0} if "krum" in name or name == "trimmed-mean" else {}
    config = tiny.with_overrides(
        {"strategy.name": name, "federation.clients": 3, "federation.rounds": 2, **own}
    )
    mixed = run(config.with_overrides({"federation.ranks": [8, 2, 1]}), tmp_path / "mixed")
    same = run(config, tmp_path / "same")
    summary, whole = mixed.summary(), same.summary()
    assert summary is not None and whole is not None
    assert summary["failed_clients"] == summary["refused_updates"] == 0
    # ranks 8, 2 and 1 for 8, 8 and 8, and three heads beside them; lora-a2 has a budget anyway
    assert summary["bytes_up"] < 0.85 * whole["bytes_up"]
    tensors, _ = read_tensors(mixed.adapter / "adapter_model.safetensors")
    ranks = {tensor.shape[0] for n, tensor in tensors.items() if "lora_A" in n}
    assert len(ranks) == 1 and min(ranks) >= 8  # the server's, and what has joined the base
