"""Faults on a whole federation of real processes: whatever dies, the run ends as it should.

The reference of every run is the same config in process, where nothing dies.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from real_federation import SMALL, RealFederation, furthest, pause, real_federation
from waiting import until

from client import app as client_app
from fedgraft.config import Config
from fedgraft.errors import UpdateError
from fedgraft.files import read_tensors
from fedgraft.messages import Reply, TrainRequest
from fedgraft.privacy.ledger import Ledger
from simulations.simulate import simulate

pytestmark = [pytest.mark.soak, pytest.mark.timeout(2400)]
NAMES = ("0", "1", "2")
_ROUND_SECONDS = 3.0
"""About what a round takes here: a kill's moment is drawn from it."""
_DEADLINE = 40.0
"""Seconds; more than a round takes."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealFederation]:
    with real_federation(tmp_path_factory.mktemp("f"), NAMES) as one:
        yield one


def undisturbed(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    absent: frozenset[tuple[int, str]] = frozenset(),
) -> Path:
    """The adapter of the same run in process, in which clients may be absent from rounds."""
    train = client_app._train

    def trained(message: Message, context: Context) -> Reply:
        round = TrainRequest.decode(message.content).round
        if (round, str(context.node_config["partition-id"])) in absent:
            raise UpdateError("absent")
        return train(message, context)

    with monkeypatch.context() as patch:
        patch.setattr(client_app, "_train", trained)
        keys = SMALL | {"federation.clients": len(NAMES)} | settings
        simulate(Config().with_overrides(keys), out=path)
    return path / "adapter"


@pytest.mark.parametrize("seed", [0])
def test_every_part_killed_one_after_another_costs_no_finished_round_and_no_client(
    federation: RealFederation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Each at a random moment of a round of its own; what was lost in a round is asked again."""
    draw = np.random.default_rng(seed)
    victims = ["superlink", "server-app", "gateway", "supernode", "trainer", "client-app"]
    draw.shuffle(victims)
    rounds = len(victims) + 1  # the last kill is in a round, too
    settings = {"federation.rounds": rounds, "federation.min-clients": len(NAMES)}
    run = federation.submit("killed", settings, "--until-done")
    for round, part in enumerate(victims, 1):
        run.until_round(round)
        pause(float(draw.uniform(0.0, _ROUND_SECONDS)))
        of = str(draw.choice(NAMES)) if part in ("supernode", "trainer", "client-app") else ""
        federation.kill(part, of)
    said = run.done()
    records = run.rounds()
    assert [record["round"] for record in records] == list(range(1, rounds + 1)), said
    assert [record["failed"] for record in records] == [{}] * rounds, said
    here = undisturbed(tmp_path / "here", monkeypatch, settings)
    assert furthest(run.out / "adapter", here) <= 1e-5


def test_a_straggler_is_left_behind_and_its_late_update_is_not_mixed_in(
    federation: RealFederation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its trainer is held at work in round 1 until round 2 has begun."""
    settings = {
        "federation.min-clients": 2,
        "federation.deadline": _DEADLINE,
        "train.steps": 400,  # some seconds, in which it can be caught
    }
    before = federation.log("2").count("train, round 1 of run")
    run = federation.submit("late", settings)
    until(
        lambda: federation.log("2").count("train, round 1 of run") > before,
        _DEADLINE * 3,
        "the straggler's training",
    )
    federation.kill("trainer", "2", signal.SIGSTOP)
    try:
        run.until_round(2)
    finally:
        federation.kill("trainer", "2", signal.SIGCONT)
    said = run.done()
    first, *later = run.rounds()
    assert first["failed"] == {"2": "no reply within the deadline"}, said
    assert [record["failed"] for record in later] == [{}, {}], said
    here = undisturbed(tmp_path / "here", monkeypatch, settings, frozenset({(1, "2")}))
    assert furthest(run.out / "adapter", here) <= 1e-5


def test_a_third_of_the_clients_fails_in_every_round(
    federation: RealFederation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one hangs in each round, and the two that answer go on."""
    settings = {"federation.min-clients": 2, "federation.deadline": _DEADLINE, "train.steps": 200}

    def begun(round: int, name: str) -> int:
        return federation.log(name).count(f"train, round {round} of run")

    before = {name: begun(round, name) for round, name in enumerate(NAMES, 1)}
    run = federation.submit("thirds", settings)
    for round, name in enumerate(NAMES, 1):
        until(lambda r=round, n=name: begun(r, n) > before[n], 120.0, f"{name} in round {round}")
        federation.kill("trainer", name, signal.SIGSTOP)
        try:
            until(lambda r=round: len(run.rounds()) == r, 120.0, f"the end of round {round}")
        finally:
            federation.kill("trainer", name, signal.SIGCONT)
    said = run.done()
    reason = "no reply within the deadline"
    assert [record["failed"] for record in run.rounds()] == [{name: reason} for name in NAMES], said
    absent = frozenset(enumerate(NAMES, 1))
    here = undisturbed(tmp_path / "here", monkeypatch, settings, absent)
    assert furthest(run.out / "adapter", here) <= 1e-5


def test_client_apps_that_fail_in_every_round_cost_time_alone(
    federation: RealFederation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of three is killed in each round: the server asks that client once more."""
    draw = np.random.default_rng(1)
    settings = {"federation.min-clients": 2}
    run = federation.submit("failing", settings)
    for round in (1, 2, 3):
        run.until_round(round)
        federation.kill("client-app", str(draw.choice(NAMES)))
    said = run.done()
    assert [record["failed"] for record in run.rounds()] == [{}] * 3, said
    here = undisturbed(tmp_path / "here", monkeypatch, settings)
    assert furthest(run.out / "adapter", here) <= 1e-5


def test_a_client_that_comes_at_round_5_takes_part_from_then_on(
    federation: RealFederation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is held in round 4 until the newcomer is connected."""
    assert federation.stop_client("2") == 0
    settings = {"federation.min-clients": 2, "federation.rounds": 7}
    run = federation.submit("joined", settings)
    try:
        run.until_round(4)
        federation.kill("server-app", number=signal.SIGSTOP)
        federation.start_client("2")
    finally:
        federation.kill("server-app", number=signal.SIGCONT)
    said = run.done()
    took = ["2" in record["clients"] for record in run.rounds()]
    joined = took.index(True) + 1
    assert joined in (5, 6) and all(took[joined - 1 :]), said
    absent = frozenset((round, "2") for round in range(1, joined))
    here = undisturbed(tmp_path / "here", monkeypatch, settings, absent)
    assert furthest(run.out / "adapter", here) <= 1e-5


def test_a_machine_that_is_started_anew_has_its_personal_state_and_its_ledger(
    federation: RealFederation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of client 1 is killed in round 2 and started again; B never leaves it."""
    settings = {"strategy.name": "fedsa-lora", "federation.min-clients": len(NAMES)}
    run = federation.submit("rebooted", settings, "--until-done")
    run.until_round(2)
    federation.crash_client("1")
    federation.start_client("1")
    said = run.done()
    assert [record["failed"] for record in run.rounds()] == [{}] * 3, said
    here = undisturbed(tmp_path / "here", monkeypatch, settings)
    assert furthest(run.out / "adapter", here) <= 1e-5
    there = tmp_path / "here" / "personal" / "1"
    for kept in there.glob("round-*"):
        (mine,) = (federation.state("1") / "trainer" / "personal").rglob(kept.name)
        ours, theirs = read_tensors(mine)[0], read_tensors(kept)[0]
        assert all(bool((ours[name] - theirs[name]).abs().max() <= 1e-5) for name in theirs)

    private = {"privacy.mode": "example", "privacy.noise-multiplier": 1.0}
    run = federation.submit("private", private | {"federation.min-clients": len(NAMES)})
    run.until_round(2)
    ledger = federation.state("1") / "trainer" / "ledger.jsonl"
    before = ledger.read_text()
    federation.crash_client("1")
    federation.start_client("1")
    run.done()
    assert ledger.read_text().startswith(before)
    rounds = [entry.round for entry in Ledger(ledger).entries]
    assert sorted(set(rounds)) == [1, 2, 3] and rounds == sorted(rounds)
    # the round in which it was killed may be paid for twice, and never less than once
    assert len(rounds) in (3, 4)


def test_a_full_disk_ends_a_run_clearly_and_space_lets_it_go_on(
    federation: RealFederation,
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = federation.submit(str(small_disk / "run"))
    run.until_round(2)
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    assert run.process.wait(300) == 1
    assert "the disk is full: " in run.said.read_text()
    done = len(run.rounds())
    ballast.unlink()
    said = federation.resume(run.out).done()
    records = run.rounds()
    assert [record["round"] for record in records] == [1, 2, 3] and done >= 1, said
    here = undisturbed(tmp_path / "here", monkeypatch, {})
    assert furthest(run.out / "adapter", here) <= 1e-5
