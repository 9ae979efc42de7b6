"""All robust rules: under attack, from few clients, whatever the factors, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from federations import LAYER, Federation, federation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rounds_by_hand import EXTRA, number, product_of, products, scalars, size_of

from fedgraft.adapter import Adapter, Tensors
from fedgraft.config import Config
from fedgraft.errors import ConfigError
from strategies.registry import build_rule
from strategies.robust import clients_a_round
from strategies.sampling import sample_size

quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ROBUST = [
    "krum",
    "multi-krum",
    "geometric-median",
    "norm-bounding",
    "trimmed-mean",
    "coordinate-median",
]
rules = pytest.mark.parametrize("name", ROBUST)


def test_claimed_examples_count_only_where_they_are_asked_for() -> None:
    fed = scalars(2.0, 1.0, 3.0)
    fed.updates["2"] = (1e9, fed.updates["2"][1])
    for name in ROBUST:
        expected = 5.0 / 3.0 if name == "norm-bounding" else 2.0  # 3 is clipped to 2
        assert number(fed.aggregate(name)) == pytest.approx(expected, rel=1e-4), name
    made = fed.aggregate("geometric-median", weights="examples")
    assert number(made) == pytest.approx(3.0, rel=1e-4)
    assert number(fed.aggregate("norm-bounding", weights="examples")) == pytest.approx(2.0)


def attacked(rng: np.random.Generator, attack: str, hostile: int = 3) -> Federation:
    """Ten clients, seven of which move the same way with some noise, and the others against it."""
    fed = federation(rng, d_out=12, d_in=10, r=2, weights=[1.0] * 10, drift=0.1)
    common = {
        n: 0.5 * torch.from_numpy(rng.standard_normal(t.shape)).float()
        for n, t in fed.current.tensors().items()
    }
    updates: dict[str, tuple[float, Tensors]] = {}
    for k, (client, (weight, tensors)) in enumerate(fed.updates.items()):
        moved = {n: t + common[n] for n, t in tensors.items()}
        if k < hostile:
            now = fed.current.tensors()
            moved = {
                n: {
                    "sign": now[n] - 4.0 * (t - now[n]),
                    "noise": now[n] + 100.0 * (t - now[n] - common[n]),
                    "colluding": now[n] + 30.0 * torch.ones_like(t),
                    "zero": torch.zeros_like(t),
                    "huge": 1e15 * torch.ones_like(t),
                }[attack]
                for n, t in moved.items()
            }
        updates[client] = (weight, moved)
    return replace(fed, updates=updates)


@rules
@pytest.mark.parametrize("attack", ["sign", "noise", "colluding", "zero", "huge"])
def test_three_hostile_clients_of_ten_do_not_get_through(name: str, attack: str) -> None:
    fed = attacked(np.random.default_rng(6), attack)
    honest = products(fed)[3:]
    mean = honest.mean(0)
    spread = np.linalg.norm(honest - mean, axis=(1, 2)).max()
    moved = np.linalg.norm(mean - product_of(fed.current.layers[LAYER]))
    made = fed.aggregate(name).adapter
    error = np.linalg.norm(product_of(made.layers[LAYER]) - mean)
    plain = np.linalg.norm(product_of(fed.aggregate("fedavg").adapter.layers[LAYER]) - mean)
    assert moved > 3 * spread  # what the attack would undo is far more than what clients differ by
    if name == "norm-bounding":  # bounds what three of ten can do, and finds nobody
        assert error <= 0.7 * moved
    else:
        assert error <= 1.5 * spread
    if attack != "zero":  # whose harm is bounded too
        assert plain > 1.2 * moved and error < plain / 3


@rules
@quick
@given(
    seed=st.integers(0, 2**32 - 1),
    r=st.integers(1, 4),
    d_out=st.integers(1, 6),
    clients=st.integers(1, 7),
    drift=st.sampled_from([1.0, 0.1]),
)
def test_how_a_client_factors_its_product_does_not_matter(
    name: str, seed: int, r: int, d_out: int, clients: int, drift: float
) -> None:
    """With d_in = r, for a cut to fewer directions may turn on a rounding where two are alike."""
    rng = np.random.default_rng(seed)
    fed = federation(rng, d_out=d_out, d_in=r, r=r, weights=[1.0] * clients, drift=drift)
    turned: dict[str, tuple[float, Tensors]] = {}
    for client, (weight, tensors) in fed.updates.items():
        A, B = (tensors[f"{LAYER}.lora_{factor}.weight"].double() for factor in "AB")
        Q = torch.from_numpy(np.eye(r) + 0.5 / r * rng.standard_normal((r, r)))
        other = {
            f"{LAYER}.lora_A.weight": (Q @ A).float(),
            f"{LAYER}.lora_B.weight": torch.linalg.solve(Q.T, B.T).T.float(),
        }
        turned[client] = (weight, tensors | other)
    first, second = (each.aggregate(name).adapter for each in (fed, replace(fed, updates=turned)))
    torch.testing.assert_close(second.extras, first.extras, rtol=1e-4, atol=1e-5)
    size = max(size_of(fed), size_of(replace(fed, updates=turned)))
    # the factors are rounded to float32, and the shares of a geometric median follow distances
    tolerance = (1e-4 if name == "geometric-median" else 1e-6) * size
    np.testing.assert_allclose(
        product_of(second.layers[LAYER]), product_of(first.layers[LAYER]), atol=tolerance
    )


@rules
@pytest.mark.parametrize("clients", [1, 2, 3])
def test_rounds_of_few_clients(name: str, clients: int) -> None:
    fed = federation(np.random.default_rng(7), d_out=4, d_in=5, r=2, weights=[1.0] * clients)
    made = fed.aggregate(name).adapter
    assert all(tensor.isfinite().all() for tensor in made.tensors().values())
    if clients == 1:
        only = products(fed)[0]
        np.testing.assert_allclose(product_of(made.layers[LAYER]), only, atol=1e-5)


@rules
def test_nothing_learned_leaves_an_adapter_that_can_learn(name: str) -> None:
    """All products zero: B is zero, and A must not be, or no gradient would ever reach either."""
    fed = federation(np.random.default_rng(8), d_out=4, d_in=5, r=2, weights=[1.0] * 4)
    B = f"{LAYER}.lora_B.weight"
    updates = {c: (w, t | {B: torch.zeros_like(t[B])}) for c, (w, t) in fed.updates.items()}
    layer = fed.current.layers[LAYER].with_factors({"B": torch.zeros(4, 2)})
    fed = Federation(Adapter({LAYER: layer}, fed.current.extras), updates)
    made = fed.aggregate(name).adapter.layers[LAYER]
    assert not made.B.any() and made.A.any(1).all()


@rules
def test_directions_that_small_clients_lack_go_on_training(name: str) -> None:
    """Three clients of rank 1, padded to 3, and the product is theirs: A stays in the other two."""
    fed = federation(np.random.default_rng(11), d_out=4, d_in=5, r=3, weights=[1.0] * 3)
    _, tensors = next(iter(fed.updates.values()))
    A, B = (tensors[f"{LAYER}.lora_{factor}.weight"].clone() for factor in "AB")
    A[1:], B[:, 1:] = 0.0, 0.0
    small = tensors | {f"{LAYER}.lora_A.weight": A, f"{LAYER}.lora_B.weight": B}
    fed = replace(fed, updates={f"{k}": (1.0, small) for k in range(3)})
    layer = fed.aggregate(name).adapter.layers[LAYER]
    np.testing.assert_allclose(product_of(layer), (B @ A).numpy(), atol=1e-5)
    assert layer.A.any(1).all()
    if name not in (
        "trimmed-mean",
        "coordinate-median",
    ):  # whose float32 entries have no exact rank
        assert layer.B.any(0).tolist() == [True, False, False]
        assert torch.equal(layer.A[1:], fed.current.layers[LAYER].A[1:])


@rules
def test_zero_updates_change_nothing(name: str) -> None:
    fed = federation(np.random.default_rng(9), d_out=4, d_in=5, r=2, weights=[1.0] * 5, drift=0.0)
    made = fed.aggregate(name).adapter
    now = product_of(fed.current.layers[LAYER])
    np.testing.assert_allclose(product_of(made.layers[LAYER]), now, atol=1e-6)
    torch.testing.assert_close(made.extras[EXTRA], fed.current.extras[EXTRA])


@rules
def test_a_smaller_client_gets_the_best_cut(name: str) -> None:
    layer = federation(np.random.default_rng(10), d_out=6, d_in=5, r=3, weights=[1.0]).current
    part = build_rule(name).cut(layer.layers[LAYER], 2)
    values = np.linalg.svd(product_of(layer.layers[LAYER]), compute_uv=False)
    error = np.linalg.norm(product_of(part) - product_of(layer.layers[LAYER]))
    assert part.rank == 2 and part.A.dtype == torch.float32
    assert error == pytest.approx(values[2], rel=1e-5)


def config(clients: int, fraction: float = 1.0, **train: Any) -> Config:
    return Config.from_dict(
        {"federation": {"clients": clients, "fraction": fraction}, "train": train}
    )


@pytest.mark.parametrize(
    ("name", "options", "clients", "message"),
    [
        ("krum", {}, 2, "needs 2 f \\+ 3 = 3 clients a round"),
        ("krum", {"byzantine": 3}, 8, "strategy.byzantine = 3.*geometric-median"),
        ("multi-krum", {"byzantine": 3}, 8, "multi-krum needs 2 f \\+ 3 = 9"),
        ("multi-krum", {"byzantine": 3, "selected": 8}, 10, "Set strategy.selected to 7 or less"),
        ("trimmed-mean", {"byzantine": 5}, 10, "strategy.name=coordinate-median"),
    ],
)
def test_configs_that_cannot_be_honoured_are_refused(
    name: str, options: dict[str, Any], clients: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        build_rule(name, options).check(config(clients))
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        build_rule(name, options).check(config(2 * clients, 0.5))
    build_rule(name, options).check(config(20))


@pytest.mark.parametrize(("clients", "fraction"), [(10, 1.0), (10, 0.25), (7, 0.5), (3, 0.1)])
def test_checks_count_the_clients_that_the_host_samples(clients: int, fraction: float) -> None:
    assert clients_a_round(config(clients, fraction)) == sample_size(fraction, clients)


@rules
def test_optimizers_cannot_be_kept(name: str) -> None:
    build_rule(name).check(config(5))
    with pytest.raises(ConfigError, match=f"under {name}"):
        build_rule(name).check(config(5, **{"optimizer-state": "keep"}))
