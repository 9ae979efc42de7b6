"""Every installed rule in a whole federation: it learns, resumes bit for bit, exports to PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import crash_and_resume, logits_here_and_in_peft, run, weights

from fedgraft.config import Config
from fedgraft.run_directory import RunDirectory
from simulations.simulate import lineage
from strategies.registry import rule_names

ROUNDS = 4
OWN: dict[str, dict[str, Any]] = {
    "scaffold": {"train.optimizer": "sgd", "train.grad-clip": 0.0, "train.lr": 0.1},
    "hetlora": {"federation.ranks": [8, 4, 2]},
    "krum": {"strategy.byzantine": 0, "federation.fraction": 1.0},
    "multi-krum": {"strategy.byzantine": 0, "federation.fraction": 1.0},
    "trimmed-mean": {"strategy.byzantine": 0},
}
"""What a rule needs beside the common settings, or shows itself best with."""


def config_of(name: str, tiny: Config) -> Config:
    common = {
        "strategy.name": name,
        "federation.clients": 3,
        "federation.rounds": ROUNDS,
        "federation.partition": "domain",
        "federation.fraction": 0.7,  # two of three: one comes late, and one is left out
        "train.steps": 2,
        "train.batch-size": 16,
        "checkpoint.keep": 2,
    }
    return tiny.with_overrides(common | OWN.get(name, {}))


@pytest.fixture(scope="module")
def whole(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    """A finished run of each rule, made when it is asked for."""
    return _Runs(tiny, tmp_path_factory.mktemp("whole"))


class _Runs(dict[str, RunDirectory]):
    def __init__(self, tiny: Config, folder: Path) -> None:
        super().__init__()
        self.tiny, self.folder = tiny, folder

    def __missing__(self, name: str) -> RunDirectory:
        self[name] = run(config_of(name, self.tiny), self.folder / name)
        return self[name]


every_rule = pytest.mark.parametrize("name", rule_names())


@every_rule
def test_it_trains_and_nobody_fails(name: str, whole: dict[str, RunDirectory]) -> None:
    directory = whole[name]
    summary, records = directory.summary(), directory.rounds()
    assert summary is not None
    assert summary["rounds"] == ROUNDS
    assert summary["failed_clients"] == summary["refused_updates"] == 0
    assert all(len(record["sampled"]) >= 2 for record in records[1:])
    values = [record["validation"]["accuracy"] for record in records]
    assert max(values[1:]) > values[0]
    assert records[-1]["bytes_up"] > 0 and records[-1]["bytes_down"] > 0


@every_rule
def test_a_crash_between_aggregation_and_checkpoint_changes_no_bit(
    name: str, whole: dict[str, RunDirectory], tmp_path: Path
) -> None:
    directory = whole[name]
    config = directory.config()
    resumed = crash_and_resume(config, tmp_path / "run", round=3)
    assert lineage(resumed.config()) == lineage(config)
    assert weights(resumed) == weights(directory)
    told = ("bytes_up", "bytes_down", "validation", "aggregation_bias", "sampled")
    for one, other in zip(resumed.rounds(), directory.rounds(), strict=True):
        assert {key: one[key] for key in told} == {key: other[key] for key in told}
    assert resumed.summary()["final"] == directory.summary()["final"]  # type: ignore[index]


@every_rule
def test_peft_loads_what_it_exports(name: str, whole: dict[str, RunDirectory]) -> None:
    ours, theirs = logits_here_and_in_peft(whole[name])
    # a residual's products are added up in another order
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
