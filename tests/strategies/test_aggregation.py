"""The host of a rule: extras, precision, state, and what it lets a rule see."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from federations import LAYER, Federation, federation, federations, two_clients
from hypothesis import HealthCheck, given, settings

from fedgraft.adapter import Adapter, LoraLayer
from fedgraft.errors import RunError
from strategies.aggregation import aggregate
from strategies.rule import (
    Capabilities,
    LayerContext,
    LayerResult,
    PerClientRule,
    Phase,
    Plan,
    Rule,
    SumOnlyRule,
    WeightedLayer,
)
from strategies.spool import UpdateSpool

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(fed=federations(dtypes=(torch.float32, torch.float16, torch.bfloat16)))
def test_extras_are_weighted_means(fed: Federation) -> None:
    made = fed.aggregate("fedavg").adapter.extras["classifier.weight"]
    total = sum(weight for weight, _ in fed.updates.values())
    expected = sum(
        weight / total * tensors["classifier.weight"].double()
        for weight, tensors in fed.updates.values()
    )
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_full(dtype: torch.dtype) -> None:
    """2048 + 1 is 2048 in float16, and 256 + 1 is 256 in bfloat16: their sums must not be."""
    big = 2048.0 if dtype == torch.float16 else 256.0
    names = [f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"]
    updates = {
        client: (1.0, {name: torch.tensor([[value]], dtype=dtype) for name in names})
        for client, value in [("0", big), ("1", 1.0)]
    }
    current = Adapter({LAYER: LoraLayer(torch.zeros(1, 1), torch.zeros(1, 1))})
    layer = Federation(current, updates).aggregate("fedavg").adapter.layers[LAYER]
    assert layer.A.item() == layer.B.item() == (big + 1.0) / 2.0


def test_a_round_without_updates_is_refused() -> None:
    fed = replace(two_clients(), updates={})
    with pytest.raises(RunError, match="round 1 has no update"):
        fed.aggregate("fedavg")


def test_sum_only_rules_hold_one_update_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory must not grow with the number of clients: earlier updates are gone by the next."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = UpdateSpool.layer

    def counted(self: UpdateSpool, *args: Any) -> LoraLayer:
        nonlocal most
        layer = read(self, *args)
        alive.append(weakref.ref(layer.B))
        most = max(most, sum(reference() is not None for reference in alive))
        return layer

    monkeypatch.setattr(UpdateSpool, "layer", counted)
    fed = federation(np.random.default_rng(1), d_out=5, d_in=4, r=2, weights=[1.0] * 30)
    for name in ("fedavg", "ffa-lora", "lora-fair"):
        fed.aggregate(name)
    assert len(alive) == 30 * 4  # one phase each, and LoRA-FAIR's two
    assert most <= 2  # the one being folded and the one just read


class Counting(SumOnlyRule):
    """A rule with state: B moves by half of what the mean moved, and rounds are counted."""

    name = "counting"
    title = "Counting"
    citation = "none"
    capabilities = Capabilities(sum_only=True)

    def phases(self, round: int) -> tuple[Phase, ...]:
        return (Phase("B", lambda update, context: {"B": update.B}, lambda mean, context: mean),)

    def conclude(self, context: LayerContext) -> LayerResult:
        rounds = context.state.get("rounds", torch.zeros(1)) + 1
        half = (context.current.B + context.shared["B"]) / 2
        factors = context.current.with_factors({"B": half})
        return LayerResult(factors, {"rounds": rounds}, (f"round {context.round}",))


def test_state_and_notes_are_kept_by_layer() -> None:
    fed = federation(np.random.default_rng(2), d_out=3, d_in=4, r=2, weights=[1.0, 2.0], layers=3)
    with fed.spooled() as spool:
        first = aggregate(Counting(), spool, fed.current, {}, 1)
        second = aggregate(Counting(), spool, first.adapter, first.state, 2)
    names = list(fed.current.layers)
    assert list(second.state) == [f"{name}::rounds" for name in names]
    assert all(tensor.tolist() == [2.0] for tensor in second.state.values())
    assert second.notes == tuple(f"{name}: round 2" for name in names)


class Heaviest(PerClientRule):
    """A rule that needs single updates: the heaviest client's, to see what the host hands over."""

    name = "heaviest"
    title = "Heaviest"
    citation = "none"
    capabilities = Capabilities(sum_only=False)

    def combine(self, updates: list[WeightedLayer], context: LayerContext) -> LayerResult:
        assert sum(update.share for update in updates) == pytest.approx(1.0, abs=1e-15)
        assert all(update.factors.B.dtype == torch.float32 for update in updates)
        return LayerResult(max(updates, key=lambda update: update.share).factors)


@quick
@given(fed=federations())
def test_per_client_rules_see_every_client(fed: Federation) -> None:
    layer = fed.aggregate(Heaviest()).adapter.layers[LAYER]
    heaviest = max(fed.updates, key=lambda client: fed.updates[client][0])
    assert torch.equal(layer.B, fed.updates[heaviest][1][f"{LAYER}.lora_B.weight"].float())


def test_only_planned_factors_come_from_the_updates() -> None:
    class OnlyB(Heaviest):
        def plan(self, round: int) -> Plan:
            return Plan(train=frozenset({"B"}), send=frozenset({"B"}))

    layer = two_clients().aggregate(OnlyB()).adapter.layers[LAYER]
    assert layer.A.tolist() == [[8.0, 16.0]] and layer.B.tolist() == [[0.0], [4.0]]


def test_a_rule_of_neither_kind_is_a_bug() -> None:
    class Neither(Rule):
        name = title = citation = "neither"
        capabilities = Capabilities(sum_only=False)

    with pytest.raises(TypeError, match="Neither is neither"):
        two_clients().aggregate(Neither())
