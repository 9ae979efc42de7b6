"""Every installed rule in a whole federation: it learns, resumes bit for bit, exports to PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedgraft.adapter import Adapter
from fedgraft.config import Config
from fedgraft.resident_model import resident_model, resident_task
from fedgraft.run_directory import RunDirectory
from server.checkpoint import Checkpoints
from server.run import FederatedRun
from simulations.engine import run_engine
from simulations.simulate import lineage, prepare
from strategies.registry import rule_names

ROUNDS = 4
OWN: dict[str, dict[str, Any]] = {
    "scaffold": {"train.optimizer": "sgd", "train.grad-clip": 0.0, "train.lr": 0.1},
    "hetlora": {"federation.ranks": [8, 4, 2]},
    "krum": {"strategy.byzantine": 0, "federation.fraction": 1.0},
    "multi-krum": {"strategy.byzantine": 0, "federation.fraction": 1.0},
}
"""What a rule needs beside the common settings, or shows itself best with."""


class Crash(BaseException):
    """What no code of ours catches."""


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


def run(config: Config, path: Path) -> RunDirectory:
    directory = prepare(config, path) if not path.exists() else RunDirectory.open(path)
    run_engine(directory.config(), directory, "in-process")
    return directory


def crash_at(monkeypatch: pytest.MonkeyPatch, round: int) -> None:
    """End the process, as far as the run can tell, when a round is aggregated and not yet saved."""
    on_round = FederatedRun.on_round

    def dying(self: FederatedRun, outcome: Any) -> bool:
        if outcome.state.round == round:
            raise Crash
        return on_round(self, outcome)

    monkeypatch.setattr(FederatedRun, "on_round", dying)


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
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, round=3)
        with pytest.raises(Crash):
            run(config, tmp_path / "run")
    resumed = run(config, tmp_path / "run")
    assert lineage(resumed.config()) == lineage(config)
    assert _weights(resumed) == _weights(directory)
    told = ("bytes_up", "bytes_down", "validation", "aggregation_bias", "sampled")
    for one, other in zip(resumed.rounds(), directory.rounds(), strict=True):
        assert {key: one[key] for key in told} == {key: other[key] for key in told}
    assert resumed.summary()["final"] == directory.summary()["final"]  # type: ignore[index]


@every_rule
def test_peft_loads_what_it_exports(name: str, whole: dict[str, RunDirectory]) -> None:
    from peft import PeftModel

    directory = whole[name]
    config = directory.config()
    task = resident_task(config)
    checkpoint = Checkpoints(directory.checkpoints, 2).latest()
    assert checkpoint is not None and checkpoint.best is not None
    model = resident_model(task, config)
    batch = task.validation().batch(torch.arange(64).numpy())
    ours = _logits(model.model.eval(), batch, model.take, checkpoint.best)
    model.take(model.initial_adapter(0))
    clean = PeftModel.from_pretrained(task.load_base(), str(directory.adapter)).eval()
    theirs = _logits(clean, batch)
    # a residual's products are added up in another order
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def _logits(model: Any, batch: Any, take: Any = None, adapter: Adapter | None = None) -> Any:
    if take is not None:
        take(adapter)
    with torch.inference_mode():
        return model(pixel_values=batch["pixel_values"]).logits


def _weights(directory: RunDirectory) -> bytes:
    return (directory.adapter / "adapter_model.safetensors").read_bytes()
