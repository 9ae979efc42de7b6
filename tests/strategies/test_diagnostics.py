"""Aggregation bias and repairable share against dense matrices, exactly and by projection."""

from __future__ import annotations

from dataclasses import replace

import dense
import numpy as np
import pytest
import torch
from federations import LAYER, Federation, cached_rule, federation, federations, numpy_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedgraft.adapter import Adapter, LoraLayer
from strategies import diagnostics
from strategies.diagnostics import AggregationBias, aggregation_bias

RULES = [
    ("fedavg", {}),
    ("ffa-lora", {}),
    ("lora-fair", {}),
    ("lora-fair", {"objective": "cosine"}),
    ("fedsvd", {}),  # other factors of the same product
    ("flexlora", {}),
    ("fedex-lora", {}),  # a part joins the base
    ("flora", {}),  # all of it does
]
JOINING = ["fedex-lora", "flora"]
every_rule = pytest.mark.parametrize(("name", "options"), RULES, ids=lambda value: str(value))


def measure(
    fed: Federation, name: str = "fedavg", made: Adapter | None = None, **options: object
) -> AggregationBias:
    """Measure a rule's result, or any adapter in its place."""
    rule = cached_rule(name, **options)
    made = made or fed.aggregate(rule).adapter
    with fed.spooled() as spool:
        return aggregation_bias(rule, spool, fed.current, made, 1)


def expected(
    fed: Federation, name: str = "fedavg", made: Adapter | None = None, **options: object
) -> AggregationBias:
    """The same from dense matrices, over all layers with their scalings."""
    rule = cached_rule(name, **options)
    made = made or fed.aggregate(rule).adapter
    factors = "".join(rule.plan(1).train)
    total = np.zeros(4)
    for layer, lora in made.layers.items():
        joined = (beside(made, layer) - beside(fed.current, layer)) / lora.scaling
        squares = dense.bias(fed.clients(layer, factors), *numpy_of(lora), joined)
        total += lora.scaling**2 * np.array(squares)
    ideal, averaging, after, repairable = np.sqrt(total)
    share = repairable / averaging if averaging > 0 else None
    return AggregationBias(averaging / ideal, after / ideal, share)


def beside(adapter: Adapter, layer: str) -> np.ndarray | float:
    """What stands beside the base, scaling included."""
    if layer not in adapter.residual:
        return 0.0
    A, B = numpy_of(adapter.residual[layer])
    return adapter.residual[layer].scaling * (B @ A)


@every_rule
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(fed=federations(), scaling=st.floats(0.1, 8.0), foreign=st.booleans())
def test_diagnostics_equal_their_dense_definitions(
    name: str, options: dict[str, object], fed: Federation, scaling: float, foreign: bool
) -> None:
    """For what the rule made, and for any other adapter (the one that the round started from)."""
    fed = fed.with_scaling(scaling)
    made = fed.current if foreign else None
    found = measure(fed, name, made, **options)
    wanted = expected(fed, name, made, **options)
    # Abar and Bbar are the float32 ones that are handed out: 6e-8 of each factor, which is more of
    # R where the clients drift little and of DW where their products cancel, so both absolute in
    # the ratio and relative to it
    clients = fed.clients(factors="".join(cached_rule(name, **options).plan(1).train))
    size = max(np.linalg.norm(c.B) * np.linalg.norm(c.A) for c in clients)
    slack = 1e-6 * size / np.linalg.norm(dense.ideal(clients))
    assert found.before == pytest.approx(wanted.before, abs=slack, rel=slack)
    assert found.after == pytest.approx(wanted.after, abs=slack, rel=max(slack, 1e-6))
    if wanted.before > 100 * slack:
        assert found.repairable == pytest.approx(wanted.repairable, abs=10 * slack / wanted.before)


def test_diagnostics_by_hand() -> None:
    """d = 2, r = 1, equal shares: A = (1, 0), B = (2, 0)^T and A = (0, 3), B = (0, 4)^T.

    DW = diag(1, 6), Abar = (.5, 1.5), Bbar = (1, 2)^T, R = ((.5, -1.5), (-1, 3)); R Abar^T is
    (-2, 4)^T and ||Abar||^2 = 2.5, so ||R P||^2 = 20 / 2.5. LoRA-FAIR with lambda = 0 makes
    B = (.2, 3.6)^T, which repairs just that.
    """
    A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
    first = {A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[2.0], [0.0]])}
    second = {A: torch.tensor([[0.0, 3.0]]), B: torch.tensor([[0.0], [4.0]])}
    current = Adapter({LAYER: LoraLayer(torch.zeros(1, 2), torch.zeros(2, 1), 3.0)})
    fed = Federation(current, {"0": (1.0, first), "1": (1.0, second)})
    found = measure(fed, "lora-fair", **{"lambda": 0.0})
    assert found.before == pytest.approx((12.5 / 37) ** 0.5)
    assert found.repairable == pytest.approx((8 / 12.5) ** 0.5)
    assert found.after == pytest.approx(((12.5 - 8) / 37) ** 0.5)
    assert list(found.layers) == [LAYER]
    assert found.layers[LAYER] == replace(found, layers={})


@every_rule
def test_equal_clients_show_no_bias(name: str, options: dict[str, object]) -> None:
    fed = federation(np.random.default_rng(0), d_out=5, d_in=4, r=3, weights=[1.0] * 3)
    (weight, update), *_ = fed.updates.values()
    equal = replace(fed, updates={f"{k}": (weight + k, update) for k in range(3)})
    found = measure(equal, name, **options)
    assert found.before == 0.0 and found.repairable is None
    # the rounding of new factors to float32
    assert found.after == pytest.approx(0.0, abs=1e-7 if name != "flexlora" else 3e-7)


def test_an_exact_rule_leaves_no_bias() -> None:
    fed = federation(np.random.default_rng(1), d_out=5, d_in=4, r=3, weights=[1.0, 7.0, 2.0])
    found = measure(fed, "ffa-lora")
    assert found == AggregationBias(0.0, 0.0, None, found.layers)


@pytest.mark.parametrize("zero", ["A", "B", "AB"])
def test_no_change_at_all_has_no_bias_to_speak_of(zero: str) -> None:
    fed = federation(np.random.default_rng(2), d_out=5, d_in=4, r=3, weights=[1.0, 7.0])
    updates = {
        client: (
            weight,
            {
                tensor_name: torch.zeros_like(tensor)
                if any(f"lora_{factor}" in tensor_name for factor in zero)
                else tensor
                for tensor_name, tensor in tensors.items()
            },
        )
        for client, (weight, tensors) in fed.updates.items()
    }
    found = measure(replace(fed, updates=updates))
    assert found.before is None and found.after is None and found.repairable is None


def test_what_lies_outside_the_rows_of_the_mean_cannot_be_repaired() -> None:
    """A and -A average to 0: all of DW is missed, and no B could bring any of it back."""
    fed = federation(np.random.default_rng(7), d_out=5, d_in=4, r=3, weights=[1.0, 1.0])
    (_, first), (_, second) = fed.updates.values()
    opposite = second | {f"{LAYER}.lora_A.weight": -first[f"{LAYER}.lora_A.weight"]}
    found = measure(replace(fed, updates={"0": (1.0, first), "1": (1.0, opposite)}))
    assert (found.before, found.after, found.repairable) == (1.0, 1.0, 0.0)


def test_the_whole_adapter_sums_layers_with_their_scalings() -> None:
    fed = federation(np.random.default_rng(3), d_out=5, d_in=4, r=2, weights=[1.0, 2.0], layers=3)
    layers = {
        name: replace(layer, scaling=scaling)
        for (name, layer), scaling in zip(fed.current.layers.items(), (0.1, 1.0, 30.0), strict=True)
    }
    fed = replace(fed, current=Adapter(layers, fed.current.extras))
    found, wanted = measure(fed, "lora-fair"), expected(fed, "lora-fair")
    for field in ("before", "after", "repairable"):
        assert getattr(found, field) == pytest.approx(getattr(wanted, field), rel=1e-5)
    # a layer's own figures are ratios and know nothing of its scaling
    unscaled = measure(fed.with_scaling(1.0), "lora-fair")
    assert found.layers == unscaled.layers and found.before != unscaled.before


# Many clients: behind a projection


def many_clients(d_in: int) -> Federation:
    return federation(
        np.random.default_rng(4), d_out=30, d_in=d_in, r=4, weights=[1.0, 2.0] * 50, drift=0.3
    )


@every_rule
@pytest.mark.parametrize("d_in", [40, 128, 600])
def test_many_clients_are_measured_behind_a_projection(
    name: str, options: dict[str, object], d_in: int
) -> None:
    """Exact (in float32) up to 128 wide; above, within three standard errors of 6% at worst."""
    fed = many_clients(d_in)
    found, wanted = measure(fed, name, **options), expected(fed, name, **options)
    within = 1e-5 if d_in <= 128 else 0.18
    assert found.before == pytest.approx(wanted.before, rel=within, abs=1e-6)
    assert found.after == pytest.approx(wanted.after, rel=within, abs=1e-6)
    if cached_rule(name, **options).plan(1).train != {"B"}:
        assert found.repairable == pytest.approx(wanted.repairable, rel=within)


def test_the_projection_keeps_norms_on_average_with_the_error_stated() -> None:
    """The worst case is one direction, x y^T: its squared norm is that of y alone.

    For random y, ||y P||^2 has mean 1 and standard deviation sqrt(2/m (1 - m/d)) at most: 0.116
    for m = 128, d = 1000, which is 5.8% of the norm. 2,000 draws estimate it to 2% of itself.
    """
    projection = diagnostics._projection(1000).double().numpy()
    y = np.random.default_rng(5).standard_normal((2000, 1000))
    ratios = np.linalg.norm(y @ projection, axis=1) ** 2 / np.linalg.norm(y, axis=1) ** 2
    assert ratios.mean() == pytest.approx(1.0, abs=4 * 0.116 / 2000**0.5)
    assert ratios.std() == pytest.approx(0.116, rel=0.1)
    square = diagnostics._projection(64).double()
    torch.testing.assert_close(
        square @ square.T, torch.eye(64, dtype=torch.float64), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("name", JOINING)
@pytest.mark.parametrize("columns", [diagnostics._EXACT_COLUMNS, 0])
def test_only_what_joined_in_this_round_counts(
    monkeypatch: pytest.MonkeyPatch, name: str, columns: int
) -> None:
    """A residual 100 times as large stood there before; measured exactly and by projection."""
    monkeypatch.setattr(diagnostics, "_EXACT_COLUMNS", columns)
    rng = np.random.default_rng(8)
    fed = federation(rng, d_out=20, d_in=30, r=4, weights=[1.0, 2.0, 4.0])
    A, B = (torch.from_numpy(rng.standard_normal(shape)).float() for shape in ((3, 30), (20, 3)))
    before = {LAYER: LoraLayer(A, B, 100.0)}
    fed = replace(fed, current=replace(fed.current, residual=before))
    # the whole residual is rounded to float32, 6e-8 of its 100 fold size
    assert measure(fed, name).after == pytest.approx(0.0, abs=1e-5)
    # an adapter that lost it has an error of all of it
    made = replace(fed.aggregate(name).adapter, residual={})
    found, wanted = measure(fed, name, made), expected(fed, name, made)
    assert found.after == pytest.approx(wanted.after, rel=1e-5) and found.after > 10.0


def test_both_ways_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = federation(np.random.default_rng(6), d_out=20, d_in=30, r=4, weights=[1.0, 2.0, 4.0])
    exact = measure(fed, "lora-fair", fed.current)
    monkeypatch.setattr(diagnostics, "_EXACT_COLUMNS", 0)
    projected = measure(fed, "lora-fair", fed.current)
    for field in ("before", "after", "repairable"):
        assert getattr(exact, field) == pytest.approx(getattr(projected, field), rel=1e-5)
