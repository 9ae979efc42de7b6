"""The Python API does what the commands do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import SMALL, records

import fedgraft
from fedgraft import Adapter, compare, load_run, simulate
from fedgraft.config import Config
from fedgraft.errors import ConfigError

TINY = SMALL | {"federation.rounds": 2}


@pytest.mark.usefixtures("undrawn")
def test_simulate_returns_the_run_that_it_wrote(tmp_path: Path) -> None:
    run = simulate(TINY, out=tmp_path / "run")
    again = load_run(str(tmp_path / "run"))
    assert run.summary == again.summary == json.loads((tmp_path / "run/summary.json").read_text())
    assert [record["round"] for record in again.rounds] == [0, 1, 2]
    assert run.config.federation.clients == 3
    adapter = again.adapter()
    assert isinstance(adapter, Adapter)
    assert {layer.rank for layer in adapter.layers.values()} == {8}
    assert {layer.scaling for layer in adapter.layers.values()} == {2.0}
    assert all(torch.isfinite(tensor).all() for tensor in adapter.tensors().values())


@pytest.mark.usefixtures("undrawn")
def test_settings_come_as_keys_as_a_config_or_as_a_file(tmp_path: Path) -> None:
    config = Config().with_overrides(TINY)
    (tmp_path / "config.toml").write_text(config.to_toml())
    for name, given in (("keys", TINY), ("config", config), ("file", tmp_path / "config.toml")):
        simulate(given, out=tmp_path / name)
    assert records(tmp_path / "keys") == records(tmp_path / "config") == records(tmp_path / "file")


def test_an_unfinished_or_missing_run_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        load_run(tmp_path)
    with pytest.raises(ConfigError, match=r"unknown config key federation\.client"):
        simulate({"federation.client": 2}, out=tmp_path / "run")


@pytest.mark.slow
def test_compare_returns_the_comparison_that_it_wrote(tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    found = compare(TINY, strategies=["fedavg", "ffa-lora"], seeds=[0, 1], out=out)
    assert found == json.loads((out / "comparison.json").read_text())
    assert [row["strategy"] for row in found["strategies"]] == ["fedavg", "ffa-lora"]


def test_names_are_loaded_when_they_are_used() -> None:
    assert set(fedgraft.__all__) >= {"simulate", "compare", "load_run", "Adapter"}
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        _ = fedgraft.simulat
