"""What every rule must keep to, one row a rule (rows.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import dense
import numpy as np
import pytest
import torch
from federations import (
    LAYER,
    Federation,
    federation,
    federations,
    numpy_of,
    of_ranks,
    two_clients,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rows import ELSEWHERE, ROWS, Row

from fedgraft.adapter import Adapter, LoraLayer
from fedgraft.errors import ConfigError
from strategies.options import SteppedOptions
from strategies.registry import build_rule, rule_names
from strategies.rule import SumOnlyRule

rows = pytest.mark.parametrize("row", ROWS, ids=str)
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("row", [row for row in ROWS if row.oracle], ids=str)
@quick
@given(fed=federations(odd=True))
def test_factors_equal_their_dense_definition(row: Row, fed: Federation) -> None:
    assert row.oracle is not None
    expected_A, expected_B = row.oracle(fed.clients(factors=row.factors))
    A, B = numpy_of(fed.aggregate(row.rule()).adapter.layers[LAYER])
    # relative to the clients' own size: means of opposite signs cancel, their rounding does not
    size = max(np.abs(c.B).max() for c in fed.clients())
    np.testing.assert_allclose(A, expected_A, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(B, expected_B, rtol=row.tolerance, atol=row.tolerance * size)


@pytest.mark.parametrize("row", [row for row in ROWS if row.product], ids=str)
@quick
@given(fed=federations(odd=True))
def test_product_equals_its_dense_definition(row: Row, fed: Federation) -> None:
    assert row.product is not None
    clients = fed.clients(factors=row.factors)
    A, B = numpy_of(fed.current.layers[LAYER])
    expected = row.product(clients, dense.Client(A, B, 0.0))
    size = max(np.linalg.norm(c.B) * np.linalg.norm(c.A) for c in clients)
    np.testing.assert_allclose(whole_product(fed, row), expected, atol=row.tolerance * size)


@pytest.mark.parametrize(
    "row",
    [r for r in ROWS if r.rule().capabilities.mixed_ranks and (r.oracle or r.product)],
    ids=str,
)
@quick
@given(fed=federations(odd=True), data=st.data())
def test_mixed_ranks_equal_their_dense_definition(
    row: Row, fed: Federation, data: st.DataObject
) -> None:
    layer = fed.current.layers[LAYER]
    ranks = [data.draw(st.integers(1, layer.rank)) for _ in fed.updates]
    mixed, trained = of_ranks(fed, ranks)
    clients = mixed.clients(factors=row.factors)
    if row.factors == "AB":  # what is padded is what was trained, alpha / r_k and all
        np.testing.assert_allclose(
            layer.scaling * dense.ideal(clients), dense.ideal(trained), rtol=1e-5, atol=1e-5
        )
    current = dense.Client(*numpy_of(layer), 0.0)
    size = max(np.linalg.norm(c.B) * np.linalg.norm(c.A) for c in clients)
    if row.product is not None:
        found = whole_product(mixed, row)
        np.testing.assert_allclose(found, row.product(clients, current), atol=1e-6 * size)
        return
    assert row.oracle is not None
    expected = row.mixed(clients, ranks, current) if row.mixed else row.oracle(clients)
    made = numpy_of(mixed.aggregate(row.rule()).adapter.layers[LAYER])
    size = max(np.abs(c.B).max() for c in [*clients, current])
    for found, wanted in zip(made, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * max(1.0, size))


@rows
@quick
@given(fed=federations(odd=True), factor=st.sampled_from([1e-3, 0.5, 3.0, 1e4]))
def test_a_common_factor_of_all_weights_changes_nothing(
    row: Row, fed: Federation, factor: float
) -> None:
    scaled = {client: (factor * w, tensors) for client, (w, tensors) in fed.updates.items()}
    first = fed.aggregate(row.rule()).adapter
    second = replace(fed, updates=scaled).aggregate(row.rule()).adapter
    sizes = [float(c.A.norm() * c.B.norm()) for c in padded_layers(fed)]
    for made, again in zip(first.layers.values(), second.layers.values(), strict=True):
        # shares are off by rounding in float64; factors of an SVD may turn, their product not
        torch.testing.assert_close(
            made.product(), again.product(), rtol=1e-5, atol=1e-5 * max(sizes)
        )
    for name, value in first.extras.items():
        torch.testing.assert_close(value, second.extras[name], rtol=1e-5, atol=1e-5)


def padded_layers(fed: Federation) -> list[LoraLayer]:
    with fed.spooled() as spool:
        return [u.factors for u in spool.updates(LAYER, fed.current.layers[LAYER])]


@rows
@quick
@given(fed=federations(odd=True))
def test_declared_treatment_of_extras_is_true(row: Row, fed: Federation) -> None:
    """Of heads that are the mean, robust, or nobody's but the client's."""
    rule, extra = row.rule(), "classifier.weight"
    if rule.server_optimizer is not None:
        return
    made = fed.aggregate(rule).adapter.extras[extra]
    total = sum(weight for weight, _ in fed.updates.values())
    mean = sum(w / total * tensors[extra].double() for w, tensors in fed.updates.values())
    declared = rule.capabilities.extras
    if row.name == "hetlora":  # the mean by its own weights, see its tests
        return
    assert (declared == "personal") == (not rule.plan(1).extras)
    if declared == "mean":
        torch.testing.assert_close(made.double(), mean, rtol=1e-6, atol=1e-6)
    elif declared == "personal":
        assert torch.equal(made, fed.current.extras[extra])
    else:
        assert declared == "robust"


@rows
def test_robust_extras_are_not_the_mean_and_others_are_moved_by_an_outlier(row: Row) -> None:
    rng = np.random.default_rng(0)
    fed = federation(rng, d_out=4, d_in=4, r=2, weights=[1.0] * 7)
    bad = dict(fed.updates["client-0"][1])
    bad["classifier.weight"] = bad["classifier.weight"] + 1e3
    fed = replace(fed, updates=fed.updates | {"client-0": (1.0, bad)})
    rule = row.rule()
    made = fed.aggregate(rule).adapter.extras["classifier.weight"]
    moved = float((made - fed.current.extras["classifier.weight"]).abs().max())
    if rule.server_optimizer is None and rule.plan(1).extras:
        assert (moved < 10.0) == (rule.capabilities.extras == "robust")


@rows
def test_a_residual_appears_where_it_is_declared(row: Row) -> None:
    fed = federation(np.random.default_rng(0), d_out=5, d_in=4, r=2, weights=[1.0, 2.0])
    made = fed.aggregate(row.rule()).adapter
    assert bool(made.residual) == row.rule().capabilities.base_residual


@rows
def test_what_stood_beside_the_base_from_the_start_stays(row: Row) -> None:
    """As it is, or as a part of the sum under a rule that adds to it; or the base would change."""
    fed = federation(np.random.default_rng(0), d_out=5, d_in=4, r=2, weights=[1.0, 2.0])
    first = LoraLayer(torch.ones(1, 4), 3.0 * torch.ones(5, 1))
    begun = replace(fed, current=replace(fed.current, residual={LAYER: first}))
    plain, made = fed.aggregate(row.rule()).adapter, begun.aggregate(row.rule()).adapter
    expected = first.product()
    if row.rule().capabilities.base_residual:
        expected = expected + plain.residual[LAYER].product()
    else:
        assert made.residual[LAYER] is first
    torch.testing.assert_close(made.residual[LAYER].product(), expected, rtol=1e-5, atol=1e-5)


def test_every_rule_has_a_row() -> None:
    assert {row.name for row in ROWS} | ELSEWHERE == set(rule_names())


@pytest.mark.parametrize("name", rule_names())
def test_server_optimisers_go_where_they_are_declared(name: str) -> None:
    rule = build_rule(name)
    takes = rule.capabilities.server_optimizer
    assert takes == (isinstance(rule.options, SteppedOptions) or name == "scaffold")
    own = {"strategy.server-optimizer": "avgm"}
    if takes:
        return
    with pytest.raises(ConfigError) as caught:
        build_rule(name, {"server-optimizer": own["strategy.server-optimizer"]})
    assert "takes no server optimiser" in caught.value.message
    assert "fedavg" in caught.value.remedy and name not in caught.value.remedy.split(", ")


def whole_product(fed: Federation, row: Row) -> np.ndarray:
    """B A and what has joined the base, over the common scaling."""
    made = fed.aggregate(row.rule()).adapter
    A, B = numpy_of(made.layers[LAYER])
    product = B @ A
    if LAYER in made.residual:
        residual = made.residual[LAYER]
        A, B = numpy_of(residual)
        product = product + residual.scaling / made.layers[LAYER].scaling * (B @ A)
    return product


@rows
@quick
@given(fed=federations(odd=True), data=st.data())
def test_order_of_arrival_changes_no_bit(row: Row, fed: Federation, data: st.DataObject) -> None:
    order = data.draw(st.permutations(list(fed.updates)))
    shuffled = replace(fed, updates={client: fed.updates[client] for client in order})
    first, second = fed.aggregate(row.rule()), shuffled.aggregate(row.rule())
    assert first.adapter.digest() == second.adapter.digest()
    assert first.notes == second.notes


@rows
@quick
@given(fed=federations(odd=True), copies=st.integers(1, 6), weight=st.floats(1e-3, 1e6))
def test_equal_clients_are_what_they_all_are(
    row: Row, fed: Federation, copies: int, weight: float
) -> None:
    if not row.identity:
        pytest.skip("the rule means to differ, see its own tests")
    _, update = next(iter(fed.updates.values()))
    equal = replace(fed, updates={f"{k}": (weight + k, update) for k in range(copies)})
    expected_A, expected_B = (
        (update if factor in row.factors else fed.current.tensors())[
            f"{LAYER}.lora_{factor}.weight"
        ]
        for factor in "AB"
    )
    if row.identity == "product":
        product = (expected_B.double() @ expected_A.double()).numpy()
        size = float(expected_B.double().norm() * expected_A.double().norm())
        np.testing.assert_allclose(whole_product(equal, row), product, atol=1e-6 * size)
        return
    layer = equal.aggregate(row.rule()).adapter.layers[LAYER]
    for made, expected in ((layer.A, expected_A.float()), (layer.B, expected_B.float())):
        if row.exact_bits:
            assert torch.equal(made, expected)
        else:
            torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-6)


@rows
@quick
@given(fed=federations(odd=True), scaling=st.sampled_from([0.25, 1.0, 4.0]))
def test_scaling_is_carried_and_does_not_bend_the_factors(
    row: Row, fed: Federation, scaling: float
) -> None:
    """alpha / r is common to server and clients, so it cancels in every rule.

    Without extras, which have no scaling: some rules weigh clients by both together.
    """
    fed = fed.without_extras()
    plain = fed.with_scaling(1.0).aggregate(row.rule()).adapter.layers[LAYER]
    scaled = fed.with_scaling(scaling).aggregate(row.rule()).adapter.layers[LAYER]
    assert scaled.scaling == scaling
    if row.exact_bits:
        assert torch.equal(scaled.product(), scaling * plain.product())
    else:
        torch.testing.assert_close(scaled.product(), scaling * plain.product())


@rows
@quick
@given(fed=federations(odd=True))
def test_declared_capabilities_are_true(row: Row, fed: Federation) -> None:
    rule = row.rule()
    assert rule.capabilities.sum_only == isinstance(rule, SumOnlyRule)
    assert rule.plan(1).train == frozenset(row.factors)
    if rule.capabilities.exact:
        clients = fed.clients(factors=row.factors)
        size = max(np.abs(c.B).max() * np.abs(c.A).sum(0).max() for c in clients)
        # float32 factors whose product is exact up to their rounding
        np.testing.assert_allclose(whole_product(fed, row), dense.ideal(clients), atol=1e-6 * size)


@rows
def test_rules_are_cited_and_named_as_registered(row: Row) -> None:
    rule = row.rule()
    assert rule.name == row.name and rule.title and "arXiv" in rule.citation


def test_fedavg_by_hand() -> None:
    layer = two_clients().aggregate("fedavg").adapter.layers[LAYER]
    assert layer.A.tolist() == [[0.25, 0.75]]
    assert layer.B.tolist() == [[0.5], [3.0]]
    # 2 * B A, with the cross terms that FedAvg is known for: the mean product is 2 * diag(.5, 3)
    assert layer.product().tolist() == [[0.25, 0.75], [1.5, 4.5]]


def test_ffa_lora_by_hand() -> None:
    """A is the server's own, whatever a client sends; B is averaged."""
    layer = two_clients().aggregate("ffa-lora").adapter.layers[LAYER]
    assert layer.A.tolist() == [[8.0, 16.0]]
    assert layer.B.tolist() == [[0.5], [3.0]]


def test_ffa_lora_is_the_exact_mean_of_products() -> None:
    """On integers float32 rounds nothing: equal to the last bit, and not within a tolerance."""
    rng = np.random.default_rng(0)
    fed = federation(rng, d_out=6, d_in=6, r=6, weights=[1.0, 2.0, 5.0])
    updates = {
        client: (weight, {name: (8 * tensor).round() for name, tensor in tensors.items()})
        for client, (weight, tensors) in fed.updates.items()
    }
    A0 = (4 * fed.current.layers[LAYER].A).round()
    fed = Federation(Adapter({LAYER: LoraLayer(A0, torch.zeros(6, 6))}), updates)
    layer = fed.aggregate("ffa-lora").adapter.layers[LAYER]
    products = sum(
        weight / 8.0 * (tensors[f"{LAYER}.lora_B.weight"].double() @ A0.double())
        for weight, tensors in updates.values()
    )
    assert torch.equal(layer.B.double() @ layer.A.double(), products)
    assert torch.equal(layer.product().double(), products)


def test_ffa_lora_plan() -> None:
    plan = build_rule("ffa-lora").plan(3)
    assert plan.train == plan.send == {"B"} and plan.derive_A


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "cosin"}, "strategy.objective"),
        ({"lambda": -1.0}, "strategy.lambda"),
        ({"lambda": "much"}, "strategy.lambda"),
        ({"lamda": 0.1}, "strategy.lambda"),  # the nearest valid key
    ],
)
def test_options_out_of_range_name_the_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_rule("lora-fair", options)
