"""Every adapter type and first factors in whole federations: they learn, resume and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import crash_and_resume, logits_here_and_in_peft, run, weights

from fedgraft import load_run
from fedgraft.config import Config
from fedgraft.errors import ConfigError
from fedgraft.run_directory import RunDirectory
from server.checkpoint import Checkpoints
from simulations.references import reference
from strategies.fitness import check_rule
from strategies.registry import build_rule, rule_names

ROUNDS = 2
PATTERNS = {
    "adapter.rank-pattern": {"q_proj": 4, r"layers\.0\.mlp\.fc1": 6},
    "adapter.alpha-pattern": {"k_proj": 4.0},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"adapter.type": "dora"},
    "rslora, patterns": {"adapter.type": "rslora", "train.lr": 2e-3, **PATTERNS},
    "gaussian": {"adapter.init": "gaussian", "strategy.name": "ffa-lora"},  # which derives A
    "derived, patterns": {**PATTERNS, "strategy.name": "ffa-lora"},
    "orthogonal": {"adapter.init": "orthogonal"},
    "pissa": {"adapter.init": "pissa", "train.lr": 1e-3},
    "pissa, patterns": {"adapter.init": "pissa", "train.lr": 1e-3, **PATTERNS},
    "pissa, frozen A": {"adapter.init": "pissa", "train.lr": 2e-3, "strategy.name": "ffa-lora"},
    "olora, own B": {"adapter.init": "olora", "train.lr": 1e-3, "strategy.name": "fedsa-lora"},
    "olora, more joins": {"adapter.init": "olora", "train.lr": 1e-3, "strategy.name": "fedex-lora"},
}
OWN: dict[str, dict[str, Any]] = {
    "scaffold": {"train.optimizer": "sgd", "train.grad-clip": 0.0, "train.lr": 0.01},
    "krum": {"strategy.byzantine": 0, "federation.fraction": 1.0},
    "multi-krum": {"strategy.byzantine": 0, "federation.fraction": 1.0},
    "trimmed-mean": {"strategy.byzantine": 0},
}
"""What a rule needs beside the common settings."""


def config_of(tiny: Config, settings: dict[str, Any]) -> Config:
    common = {
        "federation.clients": 3,
        "federation.rounds": ROUNDS,
        "federation.partition": "domain",
        "federation.fraction": 0.7,  # two of three: one comes late
        "train.batch-size": 16,
        "evaluate.clients": False,
        "evaluate.samples": 150,
    }
    return tiny.with_overrides(common | settings)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_learns_resumes_bit_for_bit_and_exports(
    variant: str, tiny: Config, tmp_path: Path
) -> None:
    config = config_of(tiny, VARIANTS[variant])
    directory = run(config, tmp_path / "whole")
    summary, records = directory.summary(), directory.rounds()
    assert summary is not None
    assert summary["failed_clients"] == summary["refused_updates"] == 0
    values = [record["validation"]["accuracy"] for record in records]
    assert max(values[1:]) > values[0] or summary["strategy"] == "fedsa-lora"
    resumed = crash_and_resume(config, tmp_path / "again", round=2)
    assert weights(resumed) == weights(directory)
    ours, theirs = logits_here_and_in_peft(directory)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    _check_what_the_library_reads(directory)


def _check_what_the_library_reads(directory: RunDirectory) -> None:
    """The exported adapter's products are those of the best adapter with its residual."""
    checkpoint = Checkpoints(directory.checkpoints, 2).latest()
    assert checkpoint is not None and checkpoint.best is not None
    read, best = load_run(directory.path).adapter(), checkpoint.best
    assert read.layers.keys() == best.layers.keys()
    for name, layer in best.layers.items():
        product = layer.product()
        if name in best.residual:
            product = product + best.residual[name].product()
        torch.testing.assert_close(read.layers[name].product(), product, rtol=1e-4, atol=1e-5)


def test_what_takes_the_first_product_away_is_sent_once(tiny: Config, tmp_path: Path) -> None:
    """Two clients of two, so all have it after round 1; a fixed residual costs nothing then."""
    settings = {"federation.fraction": 1.0, "federation.clients": 2, "train.lr": 1e-3}
    config = config_of(tiny, settings | {"adapter.init": "pissa"})
    directory = run(config, tmp_path / "run")
    down = [record["bytes_down"] for record in directory.rounds()]
    plain = run(config.with_overrides({"adapter.init": "default"}), tmp_path / "plain")
    ordinary = plain.rounds()[1]["bytes_down"]
    assert down[1] > 1.9 * ordinary and down[2] == ordinary
    checkpoint = Checkpoints(directory.checkpoints, 2).latest()
    assert checkpoint is not None and checkpoint.best is not None
    whole = json.loads((directory.adapter / "adapter_config.json").read_text())
    assert (whole["r"], whole["lora_alpha"], whole["init_lora_weights"]) == (16, 32.0, True)
    assert {layer.rank for layer in checkpoint.best.layers.values()} == {8}


def test_reference_rows_start_from_the_base(tiny: Config) -> None:
    """A row that trains next to nothing ends where the base is."""
    for init in ("pissa", "default"):
        settings = {"adapter.init": init, "train.lr": 1e-9, "federation.rounds": 1}
        config = config_of(tiny, settings)
        rows = [reference(name, config)["final"] for name in ("base", "centralised")]
        assert rows[0] == pytest.approx(rows[1], abs=0.01) and rows[0] > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", rule_names())
@pytest.mark.parametrize("variant", ["dora", "pissa", "rslora, patterns"])
def test_every_rule_takes_it_or_names_rules_that_do(
    name: str, variant: str, tiny: Config, tmp_path: Path
) -> None:
    settings = VARIANTS[variant] | {"strategy.name": name} | OWN.get(name, {})
    config = config_of(tiny, settings)
    rule = build_rule(name, config.strategy.options)
    try:
        check_rule(rule, config)
    except ConfigError as refusal:
        assert "fedavg" in refusal.remedy and name not in refusal.remedy.split(", ")
        return
    directory = run(config, tmp_path / "run")
    summary = directory.summary()
    assert summary is not None
    assert summary["failed_clients"] == summary["refused_updates"] == 0
    ours, theirs = logits_here_and_in_peft(directory)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
