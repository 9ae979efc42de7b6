"""Bad updates: each is named, and the round is as if its client were not there."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from fake_grid import (
    A0,
    ARRAYS,
    B1,
    HEAD,
    NAMES,
    START,
    Answer,
    Bad,
    Client,
    FakeGrid,
    Seen,
    nodes,
    run,
)
from flwr.app import Array, ArrayRecord, Error, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy

from fedgraft.adapter import Tensors, from_arrays, to_arrays
from fedgraft.errors import RunError
from fedgraft.messages import Reply, TrainRequest
from strategies.registry import build_rule
from strategies.rule import Rule
from strategies.strategy import AdapterStrategy
from strategies.validation import outliers


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Answer]:
    return lambda tensors: Reply(
        to_arrays(tensors | {name: change(tensors[name])}), 10.0, {}
    ).encode()


def poked(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def poke(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return poke


def weighing(weight: float) -> Callable[[Tensors], Answer]:
    return lambda tensors: Reply(to_arrays(tensors), weight, {"loss": 0.0}).encode()


def with_array(name: str, data: bytes, stype: str = "numpy.ndarray") -> Callable[..., Answer]:
    def answer(tensors: Tensors) -> Answer:
        arrays = to_arrays(tensors)
        arrays[name] = Array(dtype="float32", shape=(2, 4), stype=stype, data=data)
        return Reply(arrays, 10.0, {}).encode()

    return answer


def zipped() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros(3))
    return buffer.getvalue()


def metrics_only(**metrics: Any) -> Callable[[Tensors], Answer]:
    return lambda tensors: RecordDict(
        {"arrays": to_arrays(tensors), "metrics": MetricRecord(metrics)}
    )


REFUSED: dict[str, tuple[Callable[[Tensors], Answer], str]] = {
    "missing": (
        lambda t: Reply(to_arrays({n: v for n, v in t.items() if n != B1}), 10.0).encode(),
        f"tensor '{B1}' is missing",
    ),
    "extra": (
        lambda t: Reply(to_arrays(t | {"more": torch.zeros(2)}), 10.0).encode(),
        "tensor 'more' is not part of the adapter",
    ),
    "renamed": (
        lambda t: Reply(to_arrays({n.replace("q.", "k."): v for n, v in t.items()}), 10.0).encode(),
        f"tensor '{A0}' is missing",
    ),
    "nothing": (lambda t: Reply(ArrayRecord(), 10.0).encode(), f"tensor '{A0}' is missing"),
    "no arrays": (lambda t: Reply(None, 10.0).encode(), "the reply has no arrays"),
    "transposed": (changed(B1, lambda t: t.T), f"'{B1}' has shape (2, 4), not (4, 2)"),
    "one row that would broadcast": (
        changed(A0, lambda t: t[:1]),
        f"'{A0}' has shape (1, 4), not (2, 4)",
    ),
    "a scalar that would broadcast": (
        changed(HEAD, lambda t: torch.tensor(1.0)),
        f"'{HEAD}' has shape (), not (3, 4)",
    ),
    "double": (changed(A0, lambda t: t.double()), f"'{A0}' has dtype torch.float64, not"),
    "whole numbers": (changed(A0, lambda t: t.long()), f"'{A0}' has dtype torch.int64, not"),
    "complex": (changed(A0, lambda t: t.cfloat()), f"'{A0}' has dtype torch.complex64, not"),
    "NaN": (changed(B1, poked(math.nan)), f"tensor '{B1}' holds NaN or Inf"),
    "Inf": (changed(HEAD, poked(math.inf)), f"tensor '{HEAD}' holds NaN or Inf"),
    "minus Inf": (changed(A0, poked(-math.inf)), f"tensor '{A0}' holds NaN or Inf"),
    "absurd norm": (changed(HEAD, lambda t: t * 1e5), "is absurd; the limit is"),
    "zero weight": (weighing(0.0), "its weight (num-examples) is 0, not a positive number"),
    "negative weight": (weighing(-5.0), "is -5, not a positive number"),
    "NaN weight": (weighing(math.nan), "is nan, not a positive number"),
    "infinite weight": (weighing(math.inf), "is inf, not a positive number"),
    "absurd weight": (weighing(1e12), "is 1e+12, more than 1e+09"),
    "weight that is a list": (metrics_only(**{"num-examples": [1, 2]}), "is [1, 2], not a number"),
    "no weight": (metrics_only(loss=1.0), "the weight 'num-examples' is None"),
    "no metrics": (
        lambda t: RecordDict({"arrays": to_arrays(t)}),
        "the reply has no metrics record",
    ),
    "two array records": (
        lambda t: RecordDict(
            {
                "a": to_arrays(t),
                "b": to_arrays(t),
                "metrics": MetricRecord({"num-examples": 1}),
            }
        ),
        "2 array records, not one named 'arrays'",
    ),
    "garbage": (with_array(A0, b"garbage"), f"tensor '{A0}' cannot be read"),
    "a pickle": (with_array(A0, b"\x80\x04\x95."), f"tensor '{A0}' cannot be read"),
    "a zip": (with_array(A0, zipped()), f"tensor '{A0}' cannot be read"),
    "bits where none are due": (
        with_array(A0, bytes(8), "fedgraft.sparse"),
        "it is written in bits, of shape (2, 4); at most 0 entries may be",
    ),
    "another serialisation": (with_array(A0, b"", "torch"), f"tensor '{A0}' cannot be read"),
}
FAILED: dict[str, tuple[Callable[[Tensors], Answer], str]] = {
    "error": (lambda t: Error(1, "Traceback\n  ...\nValueError: no"), "ValueError: no"),
    "error without reason": (lambda t: Error(2003), "Flower's error 2003"),
    "refusal": (lambda t: Reply(refusal="not today").encode(), "not today"),
    "silence": (lambda t: None, "no reply within the deadline"),
}


@pytest.fixture(scope="module")
def without() -> Seen:
    """A round of clients 0, 2 and 3 alone; their nodes and weights are as with client 1."""
    grid = FakeGrid({node: own for node, own in nodes().items() if node != 101})
    return run(grid=grid)


@pytest.mark.parametrize("case", [*REFUSED, *FAILED])
def test_a_bad_update_is_named_and_the_round_is_as_if_its_client_were_not_there(
    case: str, without: Seen
):
    answer, reason = (REFUSED | FAILED)[case]
    bad = Bad("1", answer=answer)
    outcome = run(grid=FakeGrid(nodes(c1=bad))).last
    listed, other = (
        (outcome.refused, outcome.failed) if case in REFUSED else (outcome.failed, outcome.refused)
    )
    assert list(listed) == ["1"] and reason in listed["1"] and other == {}
    assert outcome.sampled == ["0", "1", "2", "3"] and list(outcome.reports) == ["0", "2", "3"]
    assert outcome.state.adapter.digest() == without.last.state.adapter.digest()
    assert outcome.reports == without.last.reports and outcome.bias == without.last.bias


def test_the_hooks_hear_of_every_client_once():
    grid = FakeGrid(nodes(c1=Bad("1", answer=REFUSED["NaN"][0]), c3=Bad("3")))
    seen = run(grid=grid)
    heard = {client: trouble for _, client, trouble in seen.replies}
    assert len(seen.replies) == 4 and heard["0"] == heard["2"] == ""
    assert "NaN" in heard["1"] and heard["3"] == "no reply within the deadline"


@dataclass
class Beside(Client):
    """Sends what its rule sends beside the adapter, so many times as large as an honest client."""

    rule: Rule = field(default_factory=lambda: build_rule("scaffold"))
    size: float = 1.0

    def reply(self, request: TrainRequest) -> Answer:
        shapes = self.rule.companion_shapes(START, request.round)
        companions = {name: torch.full(shape, 0.1 * self.size) for name, shape in shapes.items()}
        arrays = to_arrays(self.trained(request))
        return Reply(arrays, self.weight, {}, companions=to_arrays(companions)).encode()


@pytest.mark.parametrize("rule", ["scaffold", "fed-sb"])
def test_what_goes_beside_the_adapter_may_not_dwarf_the_others(rule: str):
    """Shapes and numbers are right, and one client's norm is 10^4 times the median."""
    built = build_rule(rule)
    clients = {f"c{name}": Beside(name, rule=built) for name in NAMES}
    clients["c1"] = Beside("1", rule=built, size=1e4)
    if rule == "fed-sb":  # it sends no factors in round 1
        for client in clients.values():
            client.trained = lambda request: {}  # type: ignore[method-assign]
    seen = run(built, grid=FakeGrid(nodes(**clients)))
    outcome = seen.last
    assert list(outcome.refused) == ["1"] and list(outcome.reports) == ["0", "2", "3"]
    assert "beside the adapter" in outcome.refused["1"]
    assert "100 times the round's median" in outcome.refused["1"]
    assert all(float(tensor.abs().max()) < 100.0 for tensor in outcome.state.rule.values())


def test_of_two_nobody_can_tell_which_is_absurd():
    assert outliers({"a": 1.0, "b": 1e6}) == {}
    assert list(outliers({"a": 1.0, "b": 1e6, "c": 2.0})) == ["b"]
    assert outliers({"a": 0.0, "b": 0.0, "c": 2.0}) == {} == outliers({})


def test_a_client_hears_which_of_its_updates_counted():
    """What it kept of the refused one is void, see client.personal."""

    class OnceBad(Client):
        def reply(self, request: TrainRequest) -> Answer:
            if request.round == 2:
                return REFUSED["NaN"][0](self.trained(request))
            return super().reply(request)

    bad, good = OnceBad("1"), Client("2")
    seen = run(grid=FakeGrid(nodes(c1=bad, c2=good)), rounds=4)
    assert [request.counted for request in bad.heard] == [0, 1, 1, 3]
    assert [request.counted for request in good.heard] == [0, 1, 2, 3]
    assert seen.last.state.counted == {"0": 4, "1": 4, "2": 4, "3": 4}


def test_metrics_that_are_nonsense_are_left_out_and_the_update_is_used():
    def answer(tensors: Tensors) -> Answer:
        metrics = {"loss": math.nan, "steps": 1e300, "seconds": 2.0}
        return Reply(to_arrays(tensors), 10.0, metrics).encode()

    outcome = run(grid=FakeGrid(nodes(c1=Bad("1", answer=answer)))).last
    assert outcome.reports["1"].metrics == {"seconds": 2.0}
    assert outcome.reports["0"].metrics["loss"] == 10 / 7


def test_too_few_usable_updates_end_the_run_with_every_reason():
    grid = FakeGrid(
        nodes(
            ("0", "2", "10"),
            c0=Bad("0", answer=REFUSED["NaN"][0]),
            c10=Bad("10", answer=FAILED["refusal"][0]),
        )
    )
    with pytest.raises(RunError) as caught:
        run(grid=grid, min_clients=2)
    message = caught.value.message
    assert message.startswith("round 1: 1 usable updates, fewer than the 2 that")
    assert "federation.min-clients asks for (client 0: tensor" in message
    assert message.index("client 0: ") < message.index("client 10: not today")
    assert "client 2" not in message
    assert run(grid=grid, min_clients=1).last.state.round == 1


def test_a_federation_that_everybody_left_ends_the_run_too():
    grid = FakeGrid(nodes())
    seen = Seen()
    strategy = AdapterStrategy(hooks=seen, deadline=0.3)
    seen.on_reply = lambda *_: grid.nodes.clear()  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"round 2: 0 usable updates.*no client was there to ask"):
        strategy.start(grid, ARRAYS, num_rounds=3)
    assert len(seen.outcomes) == 2


def test_a_run_that_failed_can_go_on_with_the_same_strategy():
    bad = Bad("0", answer=REFUSED["NaN"][0])
    grid = FakeGrid(nodes(c0=bad))
    strategy = AdapterStrategy(scaling=2.0, min_clients=4, deadline=0.3)
    with pytest.raises(RunError):
        strategy.start(grid, ARRAYS, num_rounds=1)
    grid.nodes[100] = Client("0")
    result = strategy.start(grid, ARRAYS, num_rounds=1)
    assert from_arrays(result.arrays)[A0].equal(run().last.state.adapter.tensors()[A0])


def test_flowers_own_loop_can_go_on_after_a_round_that_failed():
    grid = FakeGrid(nodes(c0=Bad("0", answer=REFUSED["NaN"][0])))
    strategy = AdapterStrategy(scaling=2.0, min_clients=4)
    with pytest.raises(RunError):
        Strategy.start(strategy, grid, ARRAYS, num_rounds=1, timeout=1)
    grid.nodes[100] = Client("0")
    result = Strategy.start(strategy, grid, ARRAYS, num_rounds=1, timeout=1)
    assert from_arrays(result.arrays)[A0].equal(run().last.state.adapter.tensors()[A0])


def test_a_client_that_goes_away_while_it_works_is_missing_and_no_more():
    grid = FakeGrid(nodes())
    seen = Seen()

    def leave(round: int, sampled: list[str]) -> None:
        del grid.nodes[102]

    seen.on_sampled = leave  # type: ignore[method-assign]
    assert run(grid=grid, hooks=seen).last.failed == {"2": "no reply within the deadline"}
