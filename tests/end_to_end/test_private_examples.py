"""Federations under example mode: noise as promised in whole rounds, budgets, crashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from whole_runs import Crash, crash_and_resume, run, weights

from client import seat
from fedgraft.config import Config
from fedgraft.privacy.ledger import Ledger
from fedgraft.privacy.randomness import SeededRandomness
from fedgraft.resident_model import resident_model, resident_task
from fedgraft.run_directory import RunDirectory
from server.checkpoint import Checkpoints
from server.session import is_finished, resume
from simulations.engine import run_engine

PRIVATE: dict[str, Any] = {
    "privacy.mode": "example",
    "privacy.noise-multiplier": 1.5,
    "privacy.clip": 0.5,
    "train.steps": 1,
    "train.schedule": "constant",
    "federation.rounds": 2,
}


def releases(directory: RunDirectory, client: int) -> list[Any]:
    return [entry.release for entry in Ledger(directory.ledgers / f"{client}.jsonl").entries]


@pytest.mark.parametrize(("name", "rounds"), [("fedavg", 1), ("ffa-lora", 1), ("scaffold", 2)])
def test_a_round_has_the_promised_noise_on_every_coordinate(
    name: str, rounds: int, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of none, so a round of SGD with a rate of 1 moves the adapter by noise alone.

    Two clients of equal weight, one step each: the mean has (multiplier clip / batch) / sqrt(2),
    and so has the second round's. SCAFFOLD's corrections are made of the first one's noise, look at
    nothing else, and are zero together.
    """
    monkeypatch.setattr(SeededRandomness, "poisson_sample", lambda *_: np.array([], dtype=np.int64))
    sgd = {"train.optimizer": "sgd", "train.lr": 1.0, "strategy.name": name}
    more = {"federation.rounds": rounds, "train.grad-clip": 0.0}
    directory = run(tiny.with_overrides(PRIVATE | sgd | more), tmp_path / "run")
    assert len(releases(directory, 0)) == len(releases(directory, 1)) == rounds
    checkpoint = Checkpoints(directory.checkpoints, 2).latest()
    assert checkpoint is not None and checkpoint.best is not None
    promised = 1.5 * 0.5 / 8 / 2**0.5 * rounds**0.5
    config = directory.config()
    start = resident_model(resident_task(config), config).initial_adapter(0).tensors()
    moved = {n: t - start[n] for n, t in checkpoint.state.adapter.tensors().items()}
    trains = [n for n in moved if name != "ffa-lora" or "lora_A" not in n]
    assert not any(moved[n].any() for n in moved.keys() - set(trains))
    for tensor in trains:
        scaled = moved[tensor].double() / promised
        n = scaled.numel()
        assert bool((scaled != 0.0).all()), tensor
        assert abs(float(scaled.square().mean().sqrt()) - 1.0) < 5.0 / (2 * n) ** 0.5, tensor
        assert abs(float(scaled.mean())) < 5.0 / n**0.5, tensor
    whole = torch.cat([moved[n].flatten() for n in trains]).double() / promised
    assert len(whole) > 7_500
    assert abs(float(whole.square().mean().sqrt()) - 1.0) < 5.0 / (2 * len(whole)) ** 0.5


def test_a_private_run_tells_what_was_noised_and_nothing_else(tiny: Config, tmp_path: Path) -> None:
    directory = run(tiny.with_overrides(PRIVATE), tmp_path / "run")
    *_, last = directory.rounds()
    assert last["train_loss"] is None and not last["failed"]
    for client in last["clients"].values():
        assert "validation" not in client and client["train_loss"] is None
        assert "examples" not in client  # every client weighs 1, which counts nothing
    summary = directory.summary()
    assert summary is not None and summary["client_descriptions"] == {"0": "", "1": ""}
    known = (Ledger(directory.ledgers / f"{client}.jsonl") for client in range(2))
    assert (
        summary["epsilon"]
        == last["epsilon"]
        == pytest.approx(
            max(ledger.epsilon(ledger.entries[0].fingerprint, 1e-5, "rdp") for ledger in known)
        )
    )
    assert summary["privacy"]["unit"] == "one example of a client"
    assert len(releases(directory, 0)) == len(releases(directory, 1)) == 2
    assert "evaluate.clients is passed over" in directory.log.read_text()


def test_a_crash_counts_too_much_and_never_too_little(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.with_overrides(PRIVATE)
    whole = run(config, tmp_path / "whole")
    crashed = crash_and_resume(config, tmp_path / "crashed", round=2)
    assert weights(crashed) == weights(whole)  # a study: the seed's noise comes again
    assert len(releases(crashed, 0)) == len(releases(whole, 0)) + 1 == 3

    def dies(*args: Any, **kwargs: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(seat, "train", dies)
        with pytest.raises(Crash):
            run(config, tmp_path / "early")
    assert len(releases(run(config, tmp_path / "early"), 0)) == 3


def test_a_run_ends_with_what_it_has_when_the_budget_is_spent(tiny: Config, tmp_path: Path) -> None:
    """Noise fits two rounds; asked for four, the clients take part in two."""
    tree = tiny.with_overrides(PRIVATE | {"evaluate.every": 4}).to_dict()
    del tree["privacy"]["noise-multiplier"]
    tree["privacy"]["target-epsilon"] = 3.0
    run(Config.from_dict(tree), tmp_path / "run")
    config, directory = resume(tmp_path / "run", {"federation.rounds": 4})
    run_engine(config, directory, "in-process")
    summary = directory.summary()
    assert summary is not None
    assert (summary["rounds"], summary["budget_spent"], summary["stopped_early"]) == (
        2,
        True,
        False,
    )
    assert is_finished(config, directory) and weights(directory)
    assert len(releases(directory, 0)) == 2
    assert "the run ends with what it has" in directory.log.read_text()
