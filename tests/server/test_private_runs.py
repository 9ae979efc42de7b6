"""Whole runs under privacy by client and local noise: the ledger, the budget, what is shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_runs import Killed, Summary, go, new, saved, state

from fedgraft.config import Config
from fedgraft.deployed import simulation
from fedgraft.errors import PrivacyError
from fedgraft.privacy.figures import rounded_up
from fedgraft.privacy.ledger import Entry, Ledger
from fedgraft.run_directory import RunDirectory
from server.client_privacy import fingerprint, ledger_folder
from server.run import FederatedRun
from strategies.rounds import RoundOutcome

CLIENT: dict[str, Any] = {
    "privacy__mode": "client",
    "privacy__noise_multiplier": 1.0,
    "federation__fraction": 0.7,
    "federation__sampling": "poisson",
}


@pytest.fixture
def simulated() -> Iterator[None]:
    with simulation():
        yield


def entries(directory: RunDirectory, who: str = "server") -> list[Entry]:
    return Ledger(directory.ledgers / f"{who}.jsonl").entries


def finished(path: Path, tiny: Config, **settings: Any) -> tuple[RunDirectory, Summary]:
    directory = new(path, tiny, **settings)
    return directory, go(directory)


@pytest.mark.usefixtures("simulated")
def test_every_round_is_on_the_servers_record(tmp_path: Path, tiny: Config) -> None:
    settings = CLIENT | {"strategy__name": "lora-fair"}
    directory, summary = finished(tmp_path / "run", tiny, **settings)
    ledger = Ledger(directory.ledgers / "server.jsonl")
    spent = ledger.epsilon(fingerprint(directory.config()), 1e-5, "rdp")
    assert summary["epsilon"] == spent > 0 and summary["delta"] == 1e-5
    assert summary["privacy"]["unit"] == "one client" and summary["privacy"]["study"]
    told = [record["epsilon"] for record in directory.rounds()]
    assert told[0] == 0 and told[1:] == sorted(set(told[1:])) and told[-1] == spent
    card = (directory.adapter / "README.md").read_text()
    assert (
        f"| differential privacy | epsilon {rounded_up(spent)} at delta 1e-05 for one client"
        in card
    )
    # every client weighs 1, which is no number of examples
    assert summary["client_examples"] == {} and "| training examples | not told" in card
    found = entries(directory)
    assert [entry.round for entry in found] == [1, 2, 3]
    for entry in found:
        assert entry.release.noise_multipliers == (1.0, 1.0)  # both phases of one sample
        assert (entry.release.sampling_rate, entry.release.count) == (0.7, 1)
        assert (entry.mode, entry.unit) == ("client", "client")
        assert (entry.relation, entry.run) == ("add-or-remove-one", "lineage")
        assert entry.fingerprint == fingerprint(directory.config())
    assert all("signal_to_noise" in record for record in directory.rounds()[1:])


@pytest.mark.usefixtures("simulated")
def test_a_study_repeats_itself_and_resumes(tmp_path: Path, tiny: Config) -> None:
    """From the run's seed, adaptive clips and all; a round that is run again is counted again."""
    settings = CLIENT | {"privacy__adaptive_clip": True, "train__schedule": "constant"}
    whole, _ = finished(tmp_path / "whole", tiny, **settings)
    part, _ = finished(tmp_path / "part", tiny, **settings | {"federation__rounds": 2})
    part.summary_file.unlink()
    go(part, federation__rounds=3)
    assert state(part).digest() == state(whole).digest()
    assert saved(part).keys() == saved(whole).keys()
    assert len(entries(part)) == 3
    (part.checkpoints / "round-000003.safetensors").unlink()  # as if it had died before that
    go(part)
    assert state(part).digest() == state(whole).digest()
    assert [entry.round for entry in entries(part)] == [1, 2, 3, 3]


@pytest.mark.usefixtures("simulated")
def test_noise_is_found_for_the_budget_and_the_run_ends_within_it(
    tmp_path: Path, tiny: Config
) -> None:
    budget: dict[str, Any] = {"privacy__target_epsilon": 6.0}
    settings = {key: value for key, value in CLIENT.items() if "noise" not in key} | budget
    directory, summary = finished(tmp_path / "run", tiny, **settings)
    spent = Ledger(directory.ledgers / "server.jsonl").epsilon(
        fingerprint(directory.config()), 1e-5, "rdp"
    )
    assert 5.5 < spent <= 6.0 and not summary["budget_spent"]
    directory.summary_file.unlink()
    summary = go(directory, federation__rounds=9)
    assert summary["budget_spent"] and summary["rounds"] == 3
    assert len(entries(directory)) == 3


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("mode", ["client", "example", "local"])
def test_a_killed_run_tells_all_that_its_ledgers_hold(
    tmp_path: Path, tiny: Config, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its last round was paid for, it can pay for no other, and keeps the others."""
    settings: dict[str, Any] = {"privacy__mode": mode, "privacy__target_epsilon": 6.0}
    if mode == "client":
        settings |= {"federation__fraction": 0.7, "federation__sampling": "poisson"}
    directory = new(tmp_path / "run", tiny, checkpoint__every=9, **settings)

    def killed(self: FederatedRun, outcome: RoundOutcome) -> bool:
        if outcome.state.round == 3:
            raise Killed
        return on_round(self, outcome)

    on_round = FederatedRun.on_round
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(FederatedRun, "on_round", killed)
        go(directory)
    summary = go(directory)
    assert summary["budget_spent"] and summary["rounds"] == 2
    ledgers = [Ledger(path) for path in sorted(directory.ledgers.glob("*.jsonl"))]
    assert all([entry.round for entry in ledger.entries] == [1, 2, 3] for ledger in ledgers)
    spent = [led.epsilon(led.entries[0].fingerprint, 1e-5, "rdp") for led in ledgers]
    assert summary["epsilon"] == max(spent) > 5.5


@pytest.mark.usefixtures("simulated")
def test_whatever_fails_under_local_noise_noise_alone_leaves(
    tmp_path: Path, tiny: Config, caplog: pytest.LogCaptureFixture
) -> None:
    """What was trained is infinite, which the rule's own work on the client cannot bear."""
    settings: dict[str, Any] = {
        "privacy__mode": "local",
        "privacy__noise_multiplier": 0.01,
        "strategy__name": "fedrot-lora",
        "federation__rounds": 2,
        "train__lr": 1e39,
    }
    directory, _ = finished(tmp_path / "run", tiny, **settings)
    for record in directory.rounds()[1:]:
        assert len(record["clients"]) == 2 and not record["failed"] and not record["refused"]
    assert sum("noise alone" in line for line in caplog.messages) == 4


@pytest.mark.usefixtures("simulated")
def test_a_new_run_pays_for_the_ones_before(tmp_path: Path, tiny: Config) -> None:
    directory, _ = finished(tmp_path / "first", tiny, **CLIENT)
    again = new(tmp_path / "again", tiny, **CLIENT)
    again.ledgers.parent.mkdir(exist_ok=True)
    directory.ledgers.rename(again.ledgers)
    before = entries(again)
    config = again.config().to_dict()
    del config["privacy"]["noise-multiplier"]
    config["privacy"]["target-epsilon"] = 0.5  # less than was spent
    again.write_config(Config.from_dict(config), "another lineage")
    with pytest.raises(PrivacyError, match="the privacy budget is spent"):
        go(again)
    assert entries(again) == before


def test_a_deployed_run_shows_what_noise_covers(
    tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of one config differ, and neither tells who was sampled or what clients said."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    runs = [finished(tmp_path / name, tiny, **CLIENT)[0] for name in ("one", "two")]
    one, two = runs
    assert state(one).digest() != state(two).digest()
    kept = Ledger(ledger_folder(one.ledgers, deployed=True) / "server.jsonl")
    assert len(kept.entries) == 6 and not one.ledgers.exists()
    for record in one.rounds():
        assert record["clients"] == {} and record["sampled"] == []
        assert record["failed"] == record["refused"] == {}
        assert record["train_loss"] is record["bytes_up"] is record["bytes_down"] is None
        assert record["aggregation_bias"] is None and "signal_to_noise" not in record
        assert record["seconds"].keys() <= {"evaluate"}  # a training's length tells of the sample
    summary = one.summary()
    assert summary is not None
    assert summary["bytes_up"] is None and summary["client_examples"] == {}
    assert summary["client_descriptions"] == {}
    events = [json.loads(line) for line in one.progress.read_text().splitlines()]
    assert all(event["event"] != "reply" and not event.get("clients") for event in events)


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("name", ["fedavg", "flora", "fed-sb", "flasc", "geometric-median"])
def test_clients_noise_their_updates_whatever_the_rule(
    tmp_path: Path, tiny: Config, name: str
) -> None:
    settings = {
        "privacy__mode": "local",
        "privacy__noise_multiplier": 0.01,
        "strategy__name": name,
        "federation__rounds": 2,
    }
    directory, _ = finished(tmp_path / "run", tiny, **settings)
    for client in ("0", "1"):
        found = entries(directory, client)
        assert [entry.round for entry in found] == [1, 2]
        assert all(entry.release.noise_multipliers == (0.005,) for entry in found)
    for record in directory.rounds()[1:]:
        assert len(record["clients"]) == 2 and not record["failed"] and not record["refused"]
        assert record["train_loss"] is None
        assert all("examples" not in client for client in record["clients"].values())


@pytest.mark.usefixtures("simulated")
def test_clients_end_the_run_when_their_budget_is_spent(tmp_path: Path, tiny: Config) -> None:
    settings = {"privacy__mode": "local", "privacy__target_epsilon": 8.0}
    directory, _ = finished(tmp_path / "run", tiny, **settings | {"federation__rounds": 2})
    directory.summary_file.unlink()
    summary = go(directory, federation__rounds=5)
    assert summary["budget_spent"] and summary["rounds"] == 2
