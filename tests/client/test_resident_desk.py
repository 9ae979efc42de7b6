"""What a resident trainer answers: as `client.app` does, within the policy, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from trainers import order, own, request

import client.resident.desk as desk_module
from client.policy import Policy
from client.resident.desk import Answer, Desk
from client.trainer import Assignment, train
from fedgraft.adapter import Adapter, Tensors, digest, from_arrays
from fedgraft.config import RUN_CONFIG_KEY, Config
from fedgraft.errors import DataError, RunError, StoppedError
from fedgraft.messages import HELLO, SPENT, Hello, Reply
from fedgraft.privacy.ledger import Ledger
from fedgraft.refusal import CONFIG
from fedgraft.resident_model import ResidentModel
from fedgraft.stopping import stopping_when
from fedgraft.tasks.task import Task
from strategies.local import Training


def records(answer: Answer) -> RecordDict:
    return recorddict_from_proto(ProtoRecordDict.FromString(answer.content))


def refused(answer: Answer) -> str:
    return Reply.decode(records(answer)).refusal


@pytest.fixture
def start(model: ResidentModel) -> Tensors:
    return model.initial_adapter(0).tensors()


def test_it_trains_as_the_client_of_that_name(
    tiny: Config, model: ResidentModel, digits: Task, start: Tensors, tmp_path: Path
) -> None:
    """Its partition's data, and random streams of its name."""
    reply = Reply.decode(records(Desk(own(tmp_path)).answer(order("train", tiny, request(start)))))
    assert reply.arrays is not None, reply.refusal
    work = Assignment(tiny.train, tiny.seed, 1, 3, "north", Training(factors=frozenset("AB")))
    adapter = Adapter.from_tensors(start, model.scaling)
    by_hand = train(model, digits, digits.train(1), adapter, work)
    assert digest(from_arrays(reply.arrays)) == digest(by_hand.tensors)
    assert reply.weight == 390 and reply.metrics.keys() == {"loss", "steps", "seconds"}


def test_it_says_who_it_is_and_what_the_policy_lets_it(tiny: Config, tmp_path: Path) -> None:
    domain = tiny.with_overrides({"federation.partition": "domain"})
    ask = order(HELLO, domain, RecordDict())
    said = Hello.decode(records(Desk(own(tmp_path)).answer(ask)))
    assert said.name == "north" and "rotated" in said.description and said.memory > 2**30
    less = own(tmp_path, 'metrics = ["memory"]')
    said = Hello.decode(records(Desk(less).answer(ask)))
    assert (said.name, said.description) == ("north", "") and said.memory > 2**30
    strict = own(tmp_path, 'privacy-mode = "local"')
    assert Hello.decode(records(Desk(strict).answer(ask))) == Hello("north")


def test_what_the_policy_forbids_is_refused_before_the_data_are_read(
    tiny: Config, start: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("the data were read")

    monkeypatch.setattr(desk_module, "app", read)
    desk = Desk(own(tmp_path, 'tasks = ["causal-lm"]'))
    for kind in ("train", "evaluate"):
        answer = desk.answer(order(kind, tiny, request(start)))
        assert refused(answer).startswith("policy of client north, tasks: the run's task.name")
    desk = Desk(own(tmp_path, f'bases = ["{"ab" * 32}"]'))
    answer = desk.answer(order("train", tiny, request(start, base_hash="cd" * 32)))
    assert "bases: the base cdcdcdcdcdcd is not on its list" in refused(answer)


def test_a_policy_counts_from_the_next_request_on(
    tiny: Config, model: ResidentModel, start: Tensors, tmp_path: Path
) -> None:
    mine = own(tmp_path, f'bases = ["{model.base_hash}"]\nrounds-per-day = 1')
    ask = order("train", tiny, request(start, base_hash=model.base_hash))
    assert refused(Desk(mine).answer(ask)) == ""
    assert "rounds-per-day: 1 rounds have begun" in refused(Desk(mine).answer(ask))
    mine.policy_file.write_text("rounds-per-day = 2")
    assert refused(Desk(mine).answer(ask)) == ""
    mine.policy_file.write_text("rounds-per-day = two")
    assert "is not valid TOML" in refused(Desk(mine).answer(ask))  # and not: allows anything


def test_metrics_that_may_not_leave_do_not(tiny: Config, start: Tensors, tmp_path: Path) -> None:
    desk = Desk(own(tmp_path, 'metrics = ["steps"]'))
    content = records(desk.answer(order("train", tiny, request(start))))
    assert dict(content.metric_records["metrics"]) == {"steps": 2.0, "num-examples": 1.0}
    desk = Desk(own(tmp_path, 'metrics = ["accuracy", "num-examples"]'))
    content = records(desk.answer(order("evaluate", tiny, request(start))))
    assert set(content.metric_records["metrics"]) == {"accuracy", "num-examples"}
    assert content.metric_records["metrics"]["num-examples"] == 180


def test_the_server_chooses_neither_data_nor_base_nor_folders(
    tiny: Config, start: Tensors, tmp_path: Path
) -> None:
    hostile = tiny.with_overrides(
        {
            "task.data": "/etc/passwd",
            "model.base": "/nowhere",
            "model.device": "meta",
            "train.optimizer-state": "keep",
        }
    )
    elsewhere = str(tmp_path / "elsewhere")
    text = json.dumps(
        {
            RUN_CONFIG_KEY: hostile.to_json(),
            "fedgraft.personal": elsewhere,
            "fedgraft.ledgers": elsewhere,
        }
    )
    mine = own(tmp_path)
    asked = order("train", hostile, request(start), run_config=text)
    assert refused(Desk(mine).answer(asked)) == ""
    assert not Path(elsewhere).exists()
    assert len(list((mine.state / "personal").rglob("round-*"))) == 1


def test_own_data_are_all_of_one_client(tmp_path: Path) -> None:
    run = Config().with_overrides(
        {
            "federation.clients": 5,
            "federation.min-clients": 3,
            "federation.ranks": [8, 8, 4, 4, 4],
            "federation.partition": "natural",
            "federation.partition-column": "site",
            "adapter.from": "/nowhere",
        }
    )
    mine = own(tmp_path, data="/data/mine.jsonl", base="/models/b", partition=None, partitions=1)
    config = mine.config(run)
    assert (config.task.data, config.model.base) == ("/data/mine.jsonl", "/models/b")
    federation = config.federation
    assert (federation.clients, federation.partition, federation.ranks) == (1, "iid", None)
    assert config.adapter.from_ is None and federation.rounds == run.federation.rounds
    said = mine.node_config(Policy())
    assert (said["partition-id"], said["num-partitions"], said["name"]) == (0, 1, "north")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "query.steal"}, "answers no message of type 'query.steal'"),
        ({"run_config": "[1]"}, "the run's config is no JSON object"),
        ({"run_config": "{"}, "the run's config is no JSON object"),
        ({"run_config": '{"fedgraft.config": "{"}'}, "the run's config cannot be read"),
        ({"run_config": '{"train.lrr": 1}'}, "unknown config key train.lrr"),
        ({"content": b"\xff\xff\xff"}, "the message cannot be read"),
    ],
)
def test_only_what_the_protocol_allows(
    changes: dict[str, Any], said: str, tiny: Config, tmp_path: Path
) -> None:
    answer = Desk(own(tmp_path)).answer(
        order(**({"kind": "train", "config": tiny, "records": RecordDict()} | changes))
    )
    assert said in refused(answer)


def test_no_other_records(tiny: Config, start: Tensors, tmp_path: Path) -> None:
    desk = Desk(own(tmp_path))
    for name, record in {
        "code": ConfigRecord({"x": 1}),
        "arrays": ConfigRecord({"x": 1}),
        "metrics": MetricRecord({"x": 1}),
    }.items():
        content = request(start)
        content[name] = record
        answer = desk.answer(order("train", tiny, content))
        assert f"holds a {type(record).__name__} named {name!r}" in refused(answer)
    content = request(start)
    arrays: ArrayRecord = content.array_records["arrays"]
    name = next(iter(arrays))
    arrays[name].stype = "pickle"
    said = refused(desk.answer(order("train", tiny, content)))
    assert f"tensor {name!r} cannot be read: it is serialised as 'pickle'" in said


def test_a_bug_tells_the_server_its_kind_and_no_more(
    tiny: Config, start: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("the patient's name is Smith")

    monkeypatch.setattr(desk_module, "app", broken)
    answer = Desk(own(tmp_path)).answer(order("train", tiny, request(start)))
    assert refused(answer) == "the trainer failed (ValueError); its own log says where"


def test_broken_data_are_not_quoted_to_the_server(
    tiny: Config, start: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message about a row may hold what stands in it."""

    def broken(*_: Any) -> None:
        raise DataError("line 7: label 'ill' has no number")

    monkeypatch.setattr("client.seat.resident_task", broken)
    answer = Desk(own(tmp_path)).answer(order("train", tiny, request(start)))
    assert refused(answer) == "this client's data do not fit the run; its own log says why"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("16 GiB"), RunError("there is not enough memory on cpu")]
)
def test_out_of_memory_is_said_and_asks_for_a_new_process(
    error: Exception,
    tiny: Config,
    start: Tensors,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("client.seat.train", full)
    answer = Desk(own(tmp_path)).answer(order("train", tiny, request(start)))
    assert answer.out_of_memory and refused(answer).startswith("there is not enough memory on ")
    monkeypatch.setattr("client.app.resident_task", full)
    answer = Desk(own(tmp_path)).answer(order(HELLO, tiny, RecordDict()))
    assert answer.out_of_memory and Hello.decode(records(answer)) == Hello("north")


def test_training_stops_at_its_next_step(tiny: Config, start: Tensors, tmp_path: Path) -> None:
    asked = iter([False, True])
    many = tiny.with_overrides({"train.steps": 50})
    desk = Desk(own(tmp_path))
    with stopping_when(lambda: next(asked)), pytest.raises(StoppedError):
        desk.answer(order("train", many, request(start)))
    assert next(asked, "no step was taken after it") == "no step was taken after it"


# Privacy


PRIVATE = {"privacy.mode": "example", "privacy.noise-multiplier": 1.0}


def test_private_training_writes_the_clients_own_ledger(
    tiny: Config, start: Tensors, tmp_path: Path
) -> None:
    mine = own(tmp_path)
    ask = order("train", tiny.with_overrides(PRIVATE), request(start, lineage="run"))
    first, second = (Reply.decode(records(Desk(mine).answer(ask))) for _ in range(2))
    assert first.refusal == "" and first.metrics["epsilon"] < second.metrics["epsilon"]
    assert first.arrays is not None and second.arrays is not None
    # The same request twice: the noise comes from the operating system, not from the seed.
    assert digest(from_arrays(first.arrays)) != digest(from_arrays(second.arrays))
    assert [entry.run for entry in Ledger(mine.ledger).entries] == ["run", "run"]


def test_noise_that_a_run_fits_to_its_budget_is_checked_when_it_is_paid(
    tiny: Config, start: Tensors, tmp_path: Path
) -> None:
    loose = tiny.with_overrides({"privacy.mode": "example", "privacy.target-epsilon": 50.0})
    mine = own(tmp_path, "noise-multiplier = 5.0")
    answer = Desk(mine).answer(order("train", loose, request(start)))
    assert "policy of client north, noise-multiplier: the run's noise is" in refused(answer)
    assert not mine.ledger.exists()


def test_a_lifetime_that_is_spent_is_refused(tiny: Config, start: Tensors, tmp_path: Path) -> None:
    mine = own(tmp_path)
    ask = order("train", tiny.with_overrides(PRIVATE), request(start))
    spent = Reply.decode(records(Desk(mine).answer(ask))).metrics["epsilon"]
    mine.policy_file.write_text(f"lifetime-epsilon = {1.0001 * spent}")
    said = refused(Desk(mine).answer(ask))
    assert "policy of client north, lifetime-epsilon: this round would bring epsilon to" in said
    assert len(Ledger(mine.ledger).entries) == 1
    mine.policy_file.write_text(f"lifetime-epsilon = {0.9999 * spent}")
    assert "lifetime-epsilon: epsilon is at" in refused(Desk(mine).answer(ask))


@pytest.mark.parametrize("told", [True, False])
def test_it_says_what_its_data_have_spent_where_its_policy_lets_it(
    tiny: Config, start: Tensors, tmp_path: Path, told: bool
) -> None:
    mine = own(tmp_path, "lifetime-epsilon = 100.0")
    config = tiny.with_overrides(PRIVATE)
    ask = order(SPENT, config, RecordDict({CONFIG: ConfigRecord()}))
    before = Reply.decode(records(Desk(mine).answer(ask)))
    assert before.metrics == {"epsilon": 0.0, "epsilon-left": 100.0}
    trained = Reply.decode(records(Desk(mine).answer(order("train", config, request(start)))))
    if not told:
        mine.policy_file.write_text('metrics = ["epsilon-left"]\nlifetime-epsilon = 100.0')
    after = Reply.decode(records(Desk(mine).answer(ask)))
    expected = {key: trained.metrics[key] for key in ("epsilon", "epsilon-left")}
    assert after.refusal == "" and expected["epsilon"] > 0
    if not told:
        del expected["epsilon"]
    assert after.metrics == pytest.approx(expected)
