"""What leaves a client under `privacy.mode = "local"`: clipped as one vector, noised throughout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_client_app import answer, request
from torch import Tensor

from client import seat
from client.local_noise import LocalNoise
from fedgraft.adapter import from_arrays
from fedgraft.config import Config
from fedgraft.deployed import simulation
from fedgraft.errors import BUDGET, PrivacyError, RunError
from fedgraft.privacy.ledger import Ledger
from fedgraft.privacy.randomness import SeededRandomness
from fedgraft.resident_model import ResidentModel, resident_task
from fedgraft.tasks.task import Task
from strategies.local import LocalUpdate

SHAPES = {"a": (2, 3), "b": (4,), "layer::R": (2, 2)}
START = {"a": torch.full((2, 3), 0.5), "b": torch.ones(4)}
RECEIVED = {"layer::R": torch.full((2, 2), 2.0)}


@pytest.fixture
def small(tiny: Config) -> Config:
    privacy = {"privacy.mode": "local", "privacy.noise-multiplier": 2.0, "privacy.clip": 0.5}
    return tiny.with_overrides(privacy)


@pytest.fixture
def task(small: Config) -> Task:
    return resident_task(small)


def noise(config: Config, task: Task, path: Path, round: int = 1, seed: int = 0) -> LocalNoise:
    """One round's noise, paid for in a ledger of its own, from another seed than the run's."""
    with simulation():
        made = LocalNoise.pay(config, task, 0, round, "lineage", path)
    source = SeededRandomness(np.random.default_rng(seed))
    return LocalNoise(made.clip, made.noise_multiplier, source, made.account)


def update(change: float) -> LocalUpdate:
    """Everything moved by `change`, from the start or from what the rule sent."""
    tensors = {name: tensor + change for name, tensor in START.items()}
    return LocalUpdate(tensors, {"layer::R": RECEIVED["layer::R"] + change}, {"own": torch.ones(1)})


def changes(covered: LocalUpdate) -> Tensor:
    begin = START | RECEIVED
    sent = covered.tensors | covered.companions
    return torch.cat([(sent[name] - begin[name]).double().flatten() for name in SHAPES])


@pytest.mark.parametrize("change", [0.0, 0.01, 1.0, 1e6])
def test_the_whole_change_is_clipped_and_every_coordinate_noised(
    small: Config, task: Task, tmp_path: Path, change: float
) -> None:
    """14 coordinates; z C = 1, and the clip is 0.5. Nothing is divided by zero."""
    covering, draws = noise(small, task, tmp_path / "l.jsonl"), 400
    sample = torch.stack(
        [changes(covering.cover(update(change), START, RECEIVED)) for _ in range(draws)]
    )
    clipped = min(change * 14**0.5, 0.5) / 14**0.5
    assert ((sample.mean(0) - clipped).abs() < 5.0 / draws**0.5).all()
    # by coordinate to 5 standard errors of 3.5%; together the error is below 1%
    assert ((sample.std(0) - 1.0).abs() < 0.18).all()
    assert abs(float((sample - sample.mean(0)).square().mean().sqrt()) - 1.0) < 0.04
    related = torch.corrcoef(sample.T) - torch.eye(14, dtype=sample.dtype)
    assert related.abs().max() < 6.0 / draws**0.5


def test_without_noise_only_the_norm_changes(small: Config, task: Task, tmp_path: Path) -> None:
    found = noise(small, task, tmp_path / "l.jsonl")
    quiet = LocalNoise(0.5, 0.0, found.source, found.account)
    for change in (0.01, 3.0):
        covered = quiet.cover(update(change), START, RECEIVED)
        wanted = min(1.0, 0.5 / (change * 14**0.5)) * change
        torch.testing.assert_close(
            changes(covered), torch.full((14,), wanted, dtype=torch.float64), rtol=0.0, atol=3e-7
        )
        assert covered.kept == update(change).kept
        assert all(t.dtype == torch.float32 for t in covered.tensors.values())


def test_what_the_rule_did_not_send_starts_from_zero(
    small: Config, task: Task, tmp_path: Path
) -> None:
    found = noise(small, task, tmp_path / "l.jsonl")
    quiet = LocalNoise(0.5, 0.0, found.source, found.account)
    sketch = LocalUpdate({}, {"layer::Y": torch.tensor([3.0, 4.0])})
    covered = quiet.cover(sketch, START, {})
    torch.testing.assert_close(covered.companions["layer::Y"], torch.tensor([0.3, 0.4]))


def test_an_update_that_is_no_number_leaves_as_noise_alone(
    small: Config, task: Task, tmp_path: Path
) -> None:
    """Another reply would tell of the data; with the same noise it is that of no change."""
    path = tmp_path / "l.jsonl"
    broken = noise(small, task, path, seed=3).cover(update(float("nan")), START, RECEIVED)
    none = noise(small, task, path, round=2, seed=3).cover(update(0.0), START, RECEIVED)
    assert torch.equal(changes(broken), changes(none))


def test_a_client_whose_training_fails_answers_like_any_other(
    small: Config, model: ResidentModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise RunError("there is not enough memory to train on one example")

    start = model.initial_adapter(0).tensors()
    with simulation():
        usual = answer("train", request(start), small, ledgers=tmp_path / "usual")
        monkeypatch.setattr(seat, "train", fails)
        failed = answer("train", request(start), small, ledgers=tmp_path / "failed")
    assert not usual.refusal and not failed.refusal
    assert (failed.weight, failed.metrics) == (usual.weight, usual.metrics)
    assert failed.arrays is not None and usual.arrays is not None
    told = {name: tensor.shape for name, tensor in from_arrays(usual.arrays).items()}
    sent = from_arrays(failed.arrays)
    assert {name: tensor.shape for name, tensor in sent.items()} == told
    alone = torch.cat([(sent[name] - start[name]).flatten() for name in sent])
    assert abs(float(alone.std()) - 1.0) < 5.0 / (2 * len(alone)) ** 0.5  # z C = 1


def test_replacing_a_client_moves_two_clips(small: Config, task: Task, tmp_path: Path) -> None:
    """So that half of the multiplier is accounted for, of everybody, before anything leaves."""
    path = tmp_path / "l.jsonl"
    covering = noise(small, task, path)
    (entry,) = Ledger(path).entries
    assert entry.release.noise_multipliers == (1.0,) and entry.release.sampling_rate == 1.0
    assert (entry.relation, entry.unit, entry.mode) == ("replace-one", "client", "local")
    assert entry.run == "lineage"
    assert covering.noise_multiplier == 2.0


def test_noise_is_found_for_the_budget_and_kept(tiny: Config, task: Task, tmp_path: Path) -> None:
    """All planned rounds fit, another one does not, and nothing is written of it."""
    path = tmp_path / "l.jsonl"
    budget = {"privacy.mode": "local", "privacy.target-epsilon": 8.0, "federation.rounds": 3}
    config = tiny.with_overrides(budget)
    multipliers = {noise(config, task, path, round).noise_multiplier for round in (1, 2, 3)}
    assert len(multipliers) == 1
    spent = Ledger(path).epsilon(Ledger(path).entries[0].fingerprint, 1e-5, "rdp")
    assert 7.5 < spent <= 8.0
    with pytest.raises(PrivacyError, match=BUDGET):
        noise(config, task, path, 4)
    assert len(Ledger(path).entries) == 3
