"""The ClientApp: what it answers, and what it refuses with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from client.app import app
from client.trainer import Assignment, train
from fedgraft.adapter import Adapter, Tensors, digest, from_arrays, to_arrays
from fedgraft.config import RUN_CONFIG_KEY, Config
from fedgraft.flower import set_identity, set_message_id
from fedgraft.messages import HELLO, Hello, Reply, TrainRequest
from fedgraft.resident_model import ResidentModel
from fedgraft.run_directory import LEDGER_KEY, PERSONAL_KEY
from fedgraft.tasks.task import Task
from strategies.local import Training


def ask(
    kind: str,
    content: RecordDict,
    config: Config,
    *,
    node: dict[str, Any] | None = None,
    personal: Path | None = None,
    ledgers: Path | None = None,
) -> Message:
    """Send one message to the ClientApp, as partition 1 of 2 unless `node` says another."""
    set_identity(7)
    message = Message(content, 2, kind)
    set_message_id(message, "m")
    run_config: dict[str, Any] = {RUN_CONFIG_KEY: config.to_json()}
    if personal is not None:
        run_config[PERSONAL_KEY] = str(personal)
    if ledgers is not None:
        run_config[LEDGER_KEY] = str(ledgers)
    node = {"partition-id": 1, "num-partitions": 2} if node is None else node
    reply: Message = app(
        message=message,
        context=Context(7, 2, node, RecordDict(), run_config),
    )
    return reply


def answer(kind: str, content: RecordDict, config: Config, **options: Any) -> Reply:
    return Reply.decode(ask(kind, content, config, **options).content)


@pytest.fixture
def start(model: ResidentModel) -> Tensors:
    return model.initial_adapter(0).tensors()


def request(tensors: Tensors, **fields: Any) -> RecordDict:
    return TrainRequest(round=1, arrays=to_arrays(tensors), **fields).encode()


def assignment(config: Config, factors: str = "AB", round: int = 1) -> Assignment:
    return Assignment(
        config.train, config.seed, round, 3, "1", Training(factors=frozenset(factors))
    )


def test_it_says_who_it_is(tiny: Config):
    domain = tiny.with_overrides({"federation.partition": "domain"})
    hello = Hello.decode(ask(HELLO, RecordDict(), domain).content)
    assert hello.name == "1" and "rotated" in hello.description  # a client of two: three domains
    assert Hello.decode(ask(HELLO, RecordDict(), tiny).content).name == "1"


def test_it_trains_on_its_own_data(
    tiny: Config, model: ResidentModel, digits: Task, start: Tensors
):
    reply = answer("train", request(start, base_hash=model.base_hash), tiny)
    by_hand = train(
        model, digits, digits.train(1), Adapter.from_tensors(start, model.scaling), assignment(tiny)
    )
    assert reply.arrays is not None and reply.weight == len(digits.train(1)) == 390
    assert digest(from_arrays(reply.arrays)) == digest(by_hand.tensors)
    assert reply.metrics.keys() == {"loss", "steps", "seconds"}
    assert (reply.metrics["loss"], reply.metrics["steps"]) == (by_hand.loss, 2.0)


def test_it_trains_the_factors_that_are_asked_for(
    tiny: Config, model: ResidentModel, digits: Task, start: Tensors
):
    a_hash = digest({n: t for n, t in start.items() if "lora_A" in n})
    sent = {n: t for n, t in start.items() if "lora_A" not in n}
    reply = answer("train", request(sent, train="B", a_hash=a_hash), tiny)
    assert reply.arrays is not None
    trained = from_arrays(reply.arrays)
    assert set(trained) == set(sent)
    by_hand = train(
        model,
        digits,
        digits.train(1),
        Adapter.from_tensors(start, model.scaling),
        assignment(tiny, "B"),
    )
    assert digest(trained) == digest(by_hand.tensors)


def test_it_evaluates_on_its_own_validation_data(
    tiny: Config, model: ResidentModel, digits: Task, start: Tensors
):
    reply = answer("evaluate", request(start), tiny)
    adapter = Adapter.from_tensors(start, model.scaling)
    own = model.evaluate(digits, adapter, digits.validation(1))
    assert reply.arrays is None and reply.weight == own["examples"] == 180
    assert reply.metrics == own


def test_flowers_own_strategies_are_understood(tiny: Config, start: Tensors):
    # What FedAvg sends: arrays under "arrays", the round in the config.
    content = RecordDict({"arrays": to_arrays(start), "config": ConfigRecord({"server-round": 2})})
    reply = ask("train", content, tiny).content
    assert list(reply.array_records) == ["arrays"]
    assert reply.metric_records["metrics"]["num-examples"] == 390.0
    assert set(reply.array_records["arrays"]) == set(start)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_another_base_is_refused(kind: str, tiny: Config, start: Tensors):
    reply = answer(kind, request(start, base_hash="0123456789abcdef"), tiny)
    assert "is not the server's 0123456789ab" in reply.refusal and reply.arrays is None
    assert "Let model.base and model.revision name the same weights" in reply.refusal
    assert "\n" not in reply.refusal


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_another_a_is_refused(kind: str, tiny: Config, model: ResidentModel, start: Tensors):
    sent = {n: t for n, t in start.items() if "lora_A" not in n}
    for wrong in (digest(model.derived_A(1)), digest(start), "x"):
        reply = answer(kind, request(sent, train="B", a_hash=wrong), tiny)
        assert reply.refusal.startswith("the A factors derived from the seed are not the server's")


def test_missing_and_unknown_tensors_are_refused_by_name(tiny: Config, start: Tensors):
    name = next(n for n in start if "lora_B" in n)
    reply = answer("train", request({n: t for n, t in start.items() if n != name}), tiny)
    assert f"the server's adapter lacks factor {name!r}" in reply.refusal
    head = next(n for n in start if "classifier" in n)
    reply = answer("train", request({n: t for n, t in start.items() if n != head}), tiny)
    assert f"lacks extra {head!r}" in reply.refusal
    reply = answer("train", request(start | {"new": torch.zeros(1)}), tiny)
    assert "has an unknown extra 'new'" in reply.refusal


def test_tensors_of_another_shape_are_refused_by_name(tiny: Config, start: Tensors):
    name = next(n for n in start if "lora_A" in n)
    reply = answer("train", request(start | {name: torch.zeros(8, 63)}), tiny)
    assert f"{name!r} has shape (8, 63); this model's is (8, 64)" in reply.refusal


def test_a_message_without_arrays_is_refused(tiny: Config):
    assert "array records" in answer("train", RecordDict(), tiny).refusal
    assert "array records" in answer("evaluate", RecordDict(), tiny).refusal


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"partition-id": 0, "num-partitions": 3}, "has 3 nodes, but federation.clients is 2"),
        ({"partition-id": 2, "num-partitions": 2}, "there is no client 2: federation.clients is 2"),
        ({"partition-id": -1, "num-partitions": 2}, "there is no client -1"),
        ({}, "this node has no partition-id"),
    ],
)
def test_a_node_that_does_not_fit_the_config_is_refused(
    node: dict[str, Any], said: str, tiny: Config, start: Tensors
):
    for kind in ("train", "evaluate"):
        assert said in answer(kind, request(start), tiny, node=node).refusal


def test_a_node_without_a_count_takes_the_configs(tiny: Config, start: Tensors):
    reply = answer("evaluate", request(start), tiny, node={"partition-id": 0})
    assert reply.weight == 180


def test_a_bad_config_is_refused(tiny: Config, start: Tensors):
    config = tiny.with_overrides({"task.name": "none"})
    assert "task.name is 'none'" in answer("train", request(start), config).refusal


def test_garbage_is_refused_and_names_the_tensor(tiny: Config, start: Tensors):
    content = request(start)
    arrays: ArrayRecord = content.array_records["arrays"]
    name = next(iter(arrays))
    arrays[name].data = b"garbage"
    assert f"tensor {name!r} cannot be read" in answer("train", content, tiny).refusal


# Personal state


def test_optimizer_state_is_kept_by_lineage_and_round(tiny: Config, start: Tensors, tmp_path: Path):
    keep = tiny.with_overrides({"train.optimizer-state": "keep"})

    def train_round(
        tensors: Tensors, round: int, lineage: str = "one", counted: int = -1
    ) -> Tensors:
        request = TrainRequest(round, to_arrays(tensors), lineage=lineage, counted=counted)
        content = request.encode()
        reply = answer("train", content, keep, personal=tmp_path)
        assert reply.arrays is not None, reply.refusal
        return from_arrays(reply.arrays)

    first = train_round(start, 1)
    second = train_round(first, 2)
    assert len(list(tmp_path.rglob("round-*"))) == 2
    # A round that runs again after a crash starts from the state that it started from.
    assert digest(train_round(first, 2)) == digest(second)
    # Another lineage has no state yet, and so another second round.
    assert digest(train_round(first, 2, lineage="other")) != digest(second)
    assert digest(train_round(start, 1, lineage="third")) == digest(first)
    # Nor has a client whose first update the server refused.
    assert digest(train_round(first, 2, counted=1)) == digest(second)
    assert digest(train_round(first, 2, counted=0)) != digest(second)


def test_nothing_is_kept_unless_asked_for(tiny: Config, start: Tensors, tmp_path: Path):
    answer("train", request(start), tiny, personal=tmp_path)
    assert list(tmp_path.iterdir()) == []
