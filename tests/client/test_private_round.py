"""A client's round under example mode: what it says, what it writes down, when it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from test_client_app import answer, ask, request

from client import seat
from client.privacy_ledger import ledger_path
from client.private_round import PrivateRound
from fedgraft.adapter import Tensors, digest, from_arrays
from fedgraft.config import Config
from fedgraft.deployed import is_deployed, simulation
from fedgraft.errors import BUDGET, PrivacyError
from fedgraft.messages import HELLO, Hello
from fedgraft.privacy.account import Account
from fedgraft.privacy.accounting import epsilon
from fedgraft.privacy.events import Release
from fedgraft.privacy.ledger import Ledger
from fedgraft.privacy.randomness import SeededRandomness, SystemRandomness
from fedgraft.resident_model import ResidentModel
from fedgraft.tasks.fingerprint import fingerprint
from fedgraft.tasks.task import Task, TensorExamples

RATE = 8 / 390  # of the tiny federation


@pytest.fixture
def private(tiny: Config) -> Config:
    return tiny.with_overrides({"privacy.mode": "example", "privacy.noise-multiplier": 1.5})


@pytest.fixture
def simulated() -> Iterator[None]:
    with simulation():
        yield


@pytest.fixture
def start(model: ResidentModel) -> Tensors:
    return model.initial_adapter(0).tensors()


def train(config: Config, start: Tensors, ledgers: Path, round: int = 1, **fields: Any) -> Any:
    content = request(start, lineage="run", **fields)
    content["config"]["server-round"] = round
    return answer("train", content, config, ledgers=ledgers)


# What leaves the client


@pytest.mark.usefixtures("simulated")
def test_it_tells_neither_its_loss_nor_how_many_examples_it_has(
    private: Config, start: Tensors, tmp_path: Path
) -> None:
    reply = train(private, start, tmp_path)
    assert reply.weight == 1.0 and reply.metrics.keys() == {"steps", "epsilon"}
    assert reply.arrays is not None
    changed = from_arrays(reply.arrays)
    assert changed.keys() == start.keys()
    assert all(bool((changed[name] != start[name]).any()) for name in start)
    spent = epsilon([Release((1.5,), RATE, 2)], 1e-5)
    assert reply.metrics["epsilon"] == pytest.approx(spent, rel=1e-9)
    second = train(private, start, tmp_path, round=2)
    spent = epsilon([Release((1.5,), RATE, 2)] * 2, 1e-5)
    assert second.metrics["epsilon"] == pytest.approx(spent, rel=1e-9)


def test_it_neither_evaluates_nor_describes_its_data(private: Config, start: Tensors) -> None:
    domain = private.with_overrides({"federation.partition": "domain"})
    assert Hello.decode(ask(HELLO, RecordDict(), domain).content).description == ""
    reply = answer("evaluate", request(start), private)
    assert "a metric of this client's data would tell of them" in reply.refusal


def test_a_rule_gets_no_gradient_as_it_is(private: Config) -> None:
    work = object.__new__(seat.RoundOfWork)
    work._private = object.__new__(PrivateRound)
    work._seat = type("Seat", (), {"rule": type("Rule", (), {"name": "curious"})})()  # type: ignore[assignment]
    with pytest.raises(PrivacyError, match="curious asks for the data's gradient"):
        work._sketch({})


@pytest.mark.usefixtures("simulated")
def test_a_client_refuses_what_the_server_should_have(
    private: Config, start: Tensors, tmp_path: Path
) -> None:
    reply = train(private.with_overrides({"strategy.name": "lora-a2"}), start, tmp_path)
    assert "clients of lora-a2 look at their data beside one training" in reply.refusal
    assert not any(tmp_path.iterdir())


# The ledger


@pytest.mark.usefixtures("simulated")
def test_a_round_is_written_down_before_its_training(
    private: Config, start: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Task
) -> None:
    def dies(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(seat, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        train(private, start, tmp_path)
    (entry,) = Ledger(tmp_path / "1.jsonl").entries
    assert (entry.run, entry.round, entry.mode, entry.unit) == ("run", 1, "example", "example")
    assert (entry.relation, entry.delta) == ("add-or-remove-one", 1e-5)
    assert entry.fingerprint == fingerprint(digits.train(1))
    release = entry.release
    assert release.noise_multipliers == (1.5,) and release.count == 2
    assert release.sampling_rate == pytest.approx(RATE)


def test_the_server_does_not_choose_where_a_deployed_client_remembers(
    private: Config, start: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert is_deployed()
    for ledgers in ("one", "another"):
        reply = train(private, start, tmp_path / ledgers)
        assert not (tmp_path / ledgers).exists()
    path = ledger_path("", "1")
    assert path == tmp_path / "home" / ".fedgraft" / "ledgers" / "client.jsonl"
    assert len(Ledger(path).entries) == 2
    spent = epsilon([Release((1.5,), RATE, 2)] * 2, 1e-5)
    assert reply.metrics["epsilon"] == pytest.approx(spent, rel=1e-9)


def test_only_a_simulation_follows_the_seed(
    private: Config, digits: Task, start: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn() -> tuple[PrivateRound, str]:
        made = PrivateRound.open(private, digits, 1, 1, "run", tmp_path / "ledger.jsonl")
        return made, digest(from_arrays(train(private, start, tmp_path).arrays))

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with simulation():
        (one, first), (_, again) = drawn(), drawn()
    assert first == again
    assert isinstance(one.noise, SeededRandomness) and isinstance(one.batches, SeededRandomness)
    assert not torch.equal(one.noise.normal((4,), 1.0), one.batches.normal((4,), 1.0))
    (two, first), (_, again) = drawn(), drawn()
    assert first != again
    assert isinstance(two.noise, SystemRandomness) and isinstance(two.batches, SystemRandomness)


# The budget


def client_ledger(path: Path, target: float, data: str = "data", run: str = "run") -> Account:
    settings = {"privacy.mode": "example", "privacy.target-epsilon": target}
    return Account(Ledger(path), data, run, Config().with_overrides(settings).privacy)


def test_noise_fits_the_budget_and_stays_the_same_in_a_run(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    spent = []
    for round in range(1, 5):
        ledger = client_ledger(path, 3.0)
        multiplier = ledger.noise_multiplier(lambda m, r=round: [Release((m,), 0.1, 5)] * (5 - r))
        ledger.record(round, Release((multiplier,), 0.1, 5), "a test")
        spent.append((multiplier, ledger.epsilon()))
    assert len({multiplier for multiplier, _ in spent}) == 1
    assert 2.9 < spent[-1][1] <= 3.0 and spent[0][1] < spent[1][1]
    with pytest.raises(PrivacyError, match=rf"^{BUDGET}: this round would bring epsilon to 3\.\d"):
        ledger.record(5, Release((multiplier,), 0.1, 5), "one too many")
    assert len(ledger.ledger.entries) == 4 and ledger.epsilon() == spent[-1][1]
    # Other data have a budget of their own; another run of the same data has what is left.
    assert client_ledger(path, 3.0, data="other").noise_multiplier(
        lambda m: [Release((m,), 0.1, 5)] * 4
    ) == pytest.approx(multiplier, rel=1e-3)
    more = client_ledger(path, 3.2, run="next")
    assert more.noise_multiplier(lambda m: [Release((m,), 0.1, 5)] * 4) > multiplier
    with pytest.raises(PrivacyError, match=BUDGET):
        client_ledger(path, 2.0, run="next").noise_multiplier(lambda m: [Release((m,), 0.1, 5)])


def test_two_runs_at_a_time_spend_no_more_than_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process records between this one's look at the ledger and its own entry."""
    path, release = tmp_path / "ledger.jsonl", Release((1.15,), 0.1, 5)
    mine, other = client_ledger(path, 2.7), client_ledger(path, 2.7, run="other")
    mine.record(1, release, "a test")
    record = Ledger.record

    def after_the_other(self: Ledger, entry: Any) -> None:
        monkeypatch.setattr(Ledger, "record", record)
        other.record(1, release, "in between")
        record(self, entry)

    monkeypatch.setattr(Ledger, "record", after_the_other)
    with pytest.raises(PrivacyError, match=BUDGET):  # before its training
        mine.record(2, release, "a test")
    assert len(Ledger(path).entries) == 3  # which counts one too many


def test_what_is_replaced_moves_the_sum_by_two_clips(tmp_path: Path) -> None:
    """With a sensitivity of 2 the accounted multiplier is half of what the noise has."""
    privacy = (
        Config().with_overrides({"privacy.mode": "local", "privacy.target-epsilon": 3.0}).privacy
    )
    ledger = Account(
        Ledger(tmp_path / "l.jsonl"), "data", "run", privacy, "client", "replace-one", 2.0
    )
    multiplier = ledger.noise_multiplier(lambda m: [Release((m / 2,), 1.0)] * 3)
    ledger.record(1, Release((multiplier / 2,), 1.0), "an update")
    assert ledger.noise_multiplier(lambda m: []) == pytest.approx(multiplier)


@pytest.mark.usefixtures("simulated")
def test_a_client_plans_for_the_rounds_that_are_left_and_then_refuses(
    private: Config, start: Tensors, tmp_path: Path
) -> None:
    tree = private.to_dict()
    del tree["privacy"]["noise-multiplier"]
    tree["privacy"]["target-epsilon"] = 2.0
    config = Config.from_dict(tree)
    replies = [train(config, start, tmp_path, round=round) for round in (1, 2, 3, 4)]
    told = [reply.metrics.get("epsilon") for reply in replies[:3]]
    assert told == sorted(told) and 1.9 < told[-1] <= 2.0  # federation.rounds is 3
    assert replies[3].refusal.startswith(BUDGET) and replies[3].arrays is None
    assert "privacy.target-epsilon is 2" in replies[3].refusal


# The fingerprint


def examples(*rows: float) -> TensorExamples:
    return TensorExamples({"x": torch.tensor(rows)[:, None], "labels": torch.zeros(len(rows))})


def test_the_fingerprint_is_of_the_rows_and_not_of_their_order() -> None:
    assert fingerprint(examples(1.0, 2.0, 3.0)) == fingerprint(examples(3.0, 1.0, 2.0))
    others = [(1.0, 2.0), (1.0, 2.0, 3.0, 3.0), (1.0, 2.0, 4.0), (1.0, 1.0, 2.0, 3.0)]
    found = {fingerprint(examples(*rows)) for rows in others}
    assert len(found) == 4 and fingerprint(examples(1.0, 2.0, 3.0)) not in found


def test_every_client_of_a_simulation_has_one(digits: Task) -> None:
    found = {fingerprint(digits.train(client)) for client in range(2)}
    assert len(found) == 2
    batch = digits.train(0).batch(np.array([0]))
    assert fingerprint(TensorExamples(batch)) not in found
