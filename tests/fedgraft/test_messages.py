"""What a request and a reply hold: Flower's own convention, and nothing trusted that comes in."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedgraft.adapter import to_arrays
from fedgraft.errors import UpdateError
from fedgraft.messages import Hello, Reply, TrainRequest

ARRAYS = to_arrays({"x": torch.tensor([1.0, 2.0])})


def test_a_request_comes_back_as_it_was():
    request = TrainRequest(
        round=7,
        arrays=ARRAYS,
        train="B",
        lineage="abc",
        a_hash="a1",
        base_hash="b2",
        durable_round=5,
    )
    content = request.encode(ConfigRecord({"lr": 0.5, "server-round": 99}))
    assert TrainRequest.decode(content) == request
    # The caller's own settings travel; ours are not to be overwritten by them.
    assert content.config_records["config"]["lr"] == 0.5
    assert request.tensors()["x"].tolist() == [1.0, 2.0]


def test_a_request_of_another_strategy_has_defaults():
    # What Flower's FedAvg sends.
    content = RecordDict(
        {"arrays": ARRAYS, "config": ConfigRecord({"server-round": 3, "learning-rate": 0.1})}
    )
    request = TrainRequest.decode(content)
    assert (request.round, request.train, request.lineage) == (3, "AB", "")
    assert (request.a_hash, request.base_hash, request.durable_round) == ("", "", 0)
    assert TrainRequest.decode(RecordDict({"model": ARRAYS})).round == 1
    odd = RecordDict({"arrays": ARRAYS, "config": ConfigRecord({"server-round": "three"})})
    assert TrainRequest.decode(odd).round == 1


def test_messages_without_one_set_of_arrays_are_refused():
    with pytest.raises(UpdateError, match="0 array records"):
        TrainRequest.decode(RecordDict({"config": ConfigRecord()}))
    two = RecordDict({"a": ARRAYS, "b": ARRAYS})
    with pytest.raises(UpdateError, match="2 array records, not one named 'arrays'"):
        TrainRequest.decode(two)
    two["arrays"] = ArrayRecord()
    assert len(TrainRequest.decode(two).arrays) == 0


def test_a_reply_comes_back_as_it_was():
    reply = Reply(arrays=ARRAYS, weight=130.0, metrics={"loss": 0.25, "steps": 5.0})
    content = reply.encode()
    assert Reply.decode(content) == reply
    assert content.metric_records["metrics"]["num-examples"] == 130.0  # Flower's own key
    evaluation = Reply(weight=60.0, metrics={"accuracy": 0.5})
    assert Reply.decode(evaluation.encode()) == evaluation
    assert Reply.decode(Reply(refusal="no").encode()) == Reply(refusal="no")


def test_arrays_go_as_soon_as_the_message_does():
    """Not at the garbage collector's next call: the replies before it would all be in memory."""
    gc.collect()
    gc.disable()
    try:
        content = Reply(to_arrays({"x": torch.ones(2)}), 1.0, {"loss": 1.0}).encode()
        arrays = weakref.ref(content["arrays"])
        Reply.decode(content)
        TrainRequest.decode(content)
        del content
        assert arrays() is None
    finally:
        gc.enable()


def test_a_reply_under_other_names_is_read():
    content = RecordDict({"model": ARRAYS, "numbers": MetricRecord({"num-examples": 3})})
    reply = Reply.decode(content)
    assert (reply.weight, reply.arrays) == (3.0, ARRAYS)


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"loss": 1.0}, "is None, not a number"),
        ({"num-examples": [3, 4]}, r"is \[3, 4\], not a number"),
    ],
)
def test_a_weight_that_is_no_number_is_refused(metrics: dict[str, object], said: str):
    with pytest.raises(UpdateError, match=said):
        Reply.decode(RecordDict({"metrics": MetricRecord(metrics)}))


def test_a_reply_without_metrics_is_refused():
    with pytest.raises(UpdateError, match="no metrics record"):
        Reply.decode(RecordDict({"arrays": ARRAYS}))


def test_absurd_metrics_are_left_out():
    # A sum over clients, or JSON, would choke on them.
    metrics = {
        "num-examples": 2,
        "loss": float("nan"),
        "steps": float("inf"),
        "seconds": -float("inf"),
        "big": 1e300,
        "list": [1.0, 2.0],
        "count": 7,
        "accuracy": 0.5,
    }
    reply = Reply.decode(RecordDict({"metrics": MetricRecord(metrics)}))
    assert reply.metrics == {"count": 7.0, "accuracy": 0.5}


def test_a_hello_comes_back_as_it_was():
    hello = Hello("3", "rotated +45")
    assert Hello.decode(hello.encode()) == hello
    # Its words are cut and made printable, its memory is none where that is absurd.
    rude = Hello.decode(Hello("3", "\x1b[2Jscans\n" + "x" * 10**6, memory=7).encode())
    assert rude.description == " [2Jscans " + "x" * 190 and rude.memory == 7
    for memory in (-1, float("nan"), float("inf"), 1e300):
        assert Hello.decode(Hello("3", memory=memory).encode()).memory == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "x" * 101, "a\nb", "a\x1b[31m", "a\x00"])
def test_names_that_no_screen_could_show_are_refused(name: str):
    with pytest.raises(UpdateError, match="the node"):
        Hello.decode(Hello(name).encode())
    assert Hello.decode(Hello("Hôpital 3 (île)").encode()).name == "Hôpital 3 (île)"


def test_a_hello_of_somebody_else_is_refused():
    with pytest.raises(UpdateError, match="without a client name"):
        Hello.decode(RecordDict())
