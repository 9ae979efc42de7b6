"""Robust rules: against dense definitions on whole updates, and under attack."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import dense
import numpy as np
import pytest
import torch
from federations import LAYER, Federation, federation, federations, numpy_of, two_clients
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fedgraft.adapter import Adapter, LoraLayer, Tensors
from fedgraft.config import Config, ConfigError
from strategies import coordinatewise
from strategies.aggregation import Aggregated
from strategies.coordinatewise import rising
from strategies.geometric_median import typical_distance, weiszfeld
from strategies.gram import gram_of_changes, squared_distances
from strategies.registry import build_rule
from strategies.robust import clients_a_round
from strategies.strategy import sample_size

quick = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
EXTRA = "classifier.weight"
ROBUST = [
    "krum",
    "multi-krum",
    "geometric-median",
    "norm-bounding",
    "trimmed-mean",
    "coordinate-median",
]
rules = pytest.mark.parametrize("name", ROBUST)


def products(fed: Federation, layer: str = LAYER) -> np.ndarray:
    """B_k A_k of all clients (K, d_out, d_in), in the order of names, unscaled."""
    return np.stack([c.B @ c.A for c in in_order(fed).clients(layer)])


def in_order(fed: Federation) -> Federation:
    return replace(fed, updates=dict(sorted(fed.updates.items())))


def product_of(layer: LoraLayer) -> np.ndarray:
    A, B = numpy_of(layer)
    return B @ A


def changes(fed: Federation) -> np.ndarray:
    """What each client changes of the scaled products and extras, in one row (K, n)."""
    theirs = [fed.current.with_tensors(tensors) for _, tensors in in_order(fed).updates.values()]
    return np.stack([flat(adapter) - flat(fed.current) for adapter in theirs])


def flat(adapter: Adapter) -> np.ndarray:
    """All scaled products, then the extras."""
    layers = [layer.scaling * product_of(layer).ravel() for layer in adapter.layers.values()]
    extras = [extra.double().numpy().ravel() for extra in adapter.extras.values()]
    return np.concatenate([*layers, *extras])


def is_best_for(layer: LoraLayer, wanted: np.ndarray, size: float) -> None:
    """B A is as close to a matrix as any product of its rank; entries were made in float32."""
    values = np.linalg.svd(wanted, compute_uv=False)
    lost = float(np.linalg.norm(values[layer.rank :]))
    assert np.linalg.norm(product_of(layer) - wanted) <= lost + 2e-6 * size


def size_of(fed: Federation) -> float:
    return max(float(np.linalg.norm(c.B) * np.linalg.norm(c.A)) for c in fed.clients())


# Distances


@quick
@given(
    seed=st.integers(0, 2**32 - 1),
    r=st.integers(1, 4),
    drift=st.sampled_from([1.0, 1e-3, 1e-5]),
)
def test_gram_matrix_is_that_of_the_dense_changes(seed: int, r: int, drift: float) -> None:
    """Also where clients hardly moved: by <B_i A_i, B_j A_j> it would be off by 1e-6 at 1e-5."""
    fed = federation(
        np.random.default_rng(seed), d_out=7, d_in=5, r=r, weights=[1.0] * 4, drift=drift
    ).without_extras()
    clients = [LoraLayer(*map(torch.from_numpy, (c.A, c.B)), 2.0) for c in fed.clients()]
    current = fed.current.layers[LAYER]
    gram = gram_of_changes(clients, current).numpy()
    B, A = current.B.double().numpy(), current.A.double().numpy()
    # in the form that does not cancel, for the dense difference itself is off by 1e-11 at 1e-5
    dense_changes = np.stack(
        [2.0 * ((c.B - B) @ c.A + B @ (c.A - A)).ravel() for c in fed.clients()]
    )
    expected = dense_changes @ dense_changes.T
    np.testing.assert_allclose(gram, expected, atol=1e-13 * np.abs(expected).max())
    assert (gram == gram.T).all()


def test_gram_matrix_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = federation(np.random.default_rng(0), d_out=9, d_in=8, r=2, weights=[1.0] * 3)
    layers = [LoraLayer(*map(torch.from_numpy, (c.A, c.B)), 2.0) for c in fed.clients()]
    whole = gram_of_changes(layers, fed.current.layers[LAYER])
    monkeypatch.setattr("strategies.gram._BLOCK", 4)
    torch.testing.assert_close(gram_of_changes(layers, fed.current.layers[LAYER]), whole)


def test_equal_changes_are_at_distance_zero() -> None:
    rng = np.random.default_rng(1)
    changes = np.repeat(rng.standard_normal((1, 500)), 3, axis=0)
    gram = torch.from_numpy(changes @ changes.T) * (1 + 1e-15 * torch.randn(3, 3).double())
    assert not squared_distances(gram).any()


# Krum and Multi-Krum


@quick
@given(fed=federations(), byzantine=st.none() | st.integers(0, 2))
def test_krum_hands_out_the_client_of_the_lowest_score(
    fed: Federation, byzantine: int | None
) -> None:
    K = len(fed.updates)
    assume(K >= 3)
    f = min((K - 1) // 3 if byzantine is None else byzantine, (K - 3) // 2)
    order = dense.krum_order(changes(fed), f)
    made = fed.aggregate("krum", byzantine=byzantine).adapter
    _, tensors = list(in_order(fed).updates.values())[order[0]]
    for name, tensor in made.tensors().items():
        assert torch.equal(tensor, tensors[name].float())


@quick
@given(fed=federations(), selected=st.none() | st.integers(1, 7))
def test_multi_krum_is_the_mean_of_the_lowest_scores(fed: Federation, selected: int | None) -> None:
    K = len(fed.updates)
    assume(K >= 3)
    f = min((K - 1) // 3, (K - 3) // 2)
    m = min(selected or K, K - f)
    chosen = sorted(dense.krum_order(changes(fed), f)[:m])
    made = fed.aggregate("multi-krum", selected=selected).adapter
    is_best_for(made.layers[LAYER], products(fed)[chosen].mean(0), size_of(fed))
    values = [t[EXTRA].double().numpy() for _, t in in_order(fed).updates.values()]
    expected = np.mean([values[k] for k in chosen], axis=0)
    np.testing.assert_allclose(made.extras[EXTRA], expected, rtol=1e-6, atol=1e-6)


def scalars(*values: float) -> Federation:
    """A layer of 1 x 1 and rank 1 with A = 1 throughout, so that clients are numbers; now 0."""
    tensors = {
        f"{k}": (
            1.0,
            {
                f"{LAYER}.lora_A.weight": torch.ones(1, 1),
                f"{LAYER}.lora_B.weight": torch.tensor([[value]]),
            },
        )
        for k, value in enumerate(values)
    }
    return Federation(Adapter({LAYER: LoraLayer(torch.ones(1, 1), torch.zeros(1, 1))}), tensors)


def number(made: Aggregated) -> float:
    return made.adapter.layers[LAYER].product().item()


def test_krum_by_hand() -> None:
    """Of 1, 2, 4, 8, 100 with f = 1 each has 2 neighbours: scores 1 + 9, 1 + 4, 4 + 9, ..."""
    fed = scalars(1.0, 2.0, 4.0, 8.0, 100.0)
    assert number(fed.aggregate("krum", byzantine=1)) == 2.0
    assert number(fed.aggregate("multi-krum", byzantine=1)) == pytest.approx(15.0 / 4.0)
    # 2 (5), 1 (10), 4 (13)
    made = fed.aggregate("multi-krum", byzantine=1, selected=3)
    assert number(made) == pytest.approx(7.0 / 3.0)


def test_equal_scores_go_to_the_first_name() -> None:
    assert number(scalars(5.0, 1.0, 1.0, 5.0, 3.0).aggregate("krum")) == 5.0
    made = scalars(2.0, 1.0, 3.0).aggregate("krum")  # 1 neighbour each, all at distance 1
    assert number(made) == 2.0 and made.notes == ()


def test_krum_says_what_it_cannot_hold_against() -> None:
    assert scalars(1.0, 2.0).aggregate("krum").notes == (
        "krum cannot tell a hostile update among 2: it takes 3",
    )
    assert scalars(1.0, 2.0, 3.0, 4.0).aggregate("multi-krum", byzantine=3).notes == (
        "multi-krum holds against 0 hostile updates of 4, not 3",
    )


# Geometric median


@quick
@given(fed=federations(), weights=st.sampled_from(["equal", "examples"]))
def test_geometric_median_is_where_all_pulls_cancel(fed: Federation, weights: str) -> None:
    fed, D = in_order(fed), changes(fed)
    w = np.array([weight for weight, _ in fed.updates.values()])
    w = w / w.sum() if weights == "examples" else np.full(len(D), 1.0 / len(D))
    shares = weiszfeld(torch.from_numpy(D @ D.T), torch.from_numpy(w), 1e-6).numpy()
    assert shares.sum() == pytest.approx(1.0) and (shares >= 0.0).all()
    # Weiszfeld's steps get small where the optimum is a client or nearly one
    assert dense.median_slope(D, w, shares @ D) <= 1e-3
    made = fed.aggregate("geometric-median", weights=weights).adapter
    wanted = np.einsum("k,kij->ij", shares, products(fed))
    is_best_for(made.layers[LAYER], wanted, size_of(fed))
    values = np.stack([t[EXTRA].double().numpy() for _, t in fed.updates.values()])
    expected = np.einsum("k,kij->ij", shares, values)
    np.testing.assert_allclose(made.extras[EXTRA], expected, rtol=1e-5, atol=1e-5)


def test_geometric_median_by_hand() -> None:
    """On a line it is the median; at the corners of a cross, the crossing."""
    assert number(scalars(1.0, 2.0, 9.0).aggregate("geometric-median")) == pytest.approx(2, 1e-4)
    cross = torch.tensor([[3.0, 0], [-1, 0], [0, 5], [0, -2]]).double()
    shares = weiszfeld(cross @ cross.T, torch.full((4,), 0.25).double(), 1e-6)
    torch.testing.assert_close(shares @ cross, torch.zeros(2).double(), atol=1e-6, rtol=0)


def test_typical_distance_is_that_of_the_closer_half() -> None:
    points = torch.tensor([0.0, 1.0, 3.0, 1e9, -1e9]).double()
    squares = (points[:, None] - points).square()
    assert typical_distance(squares) == 2.0  # of 1 to its two closest, 0 and 3
    assert typical_distance(torch.zeros(3, 3)) == 0.0
    together = torch.tensor([0.0, 0.0, 0.0, 7.0]).double()
    assert typical_distance((together[:, None] - together).square()) == 7.0


# Norm bounding


@quick
@given(fed=federations(), bound=st.none() | st.sampled_from([1e-3, 1.0, 1e6]))
def test_norm_bounding_is_the_mean_of_clipped_changes(fed: Federation, bound: float | None) -> None:
    fed, D = in_order(fed), changes(fed)
    norms = np.sort(np.linalg.norm(D, axis=1))
    M = norms[(len(norms) - 1) // 2] if bound is None else bound
    K = len(D)
    kept = np.array([min(1.0, M / max(np.linalg.norm(d), 1e-300)) for d in D]) / K
    made = fed.aggregate("norm-bounding", norm=bound).adapter
    now = product_of(fed.current.layers[LAYER])
    wanted = now + np.einsum("k,kij->ij", kept, products(fed) - now)
    is_best_for(made.layers[LAYER], wanted, size_of(fed))
    whole = dense.norm_bounded(D, np.full(K, 1.0 / K), M)
    extra = whole[-made.extras[EXTRA].numel() :].reshape(made.extras[EXTRA].shape)
    expected = fed.current.extras[EXTRA].double().numpy() + extra
    np.testing.assert_allclose(made.extras[EXTRA], expected, rtol=1e-5, atol=1e-5)


def test_norm_bounding_by_hand() -> None:
    """From 0: 1, -2 and 60 clipped to the median norm 2 have the mean 1 / 3."""
    fed = scalars(1.0, -2.0, 60.0)
    assert number(fed.aggregate("norm-bounding")) == pytest.approx(1.0 / 3.0)
    assert number(fed.aggregate("norm-bounding", norm=4.0)) == pytest.approx(1.0)
    assert number(fed.aggregate("norm-bounding", norm=0.5)) == pytest.approx(0.5 / 3.0)


def test_claimed_examples_count_only_where_they_are_asked_for() -> None:
    fed = scalars(2.0, 1.0, 3.0)
    fed.updates["2"] = (1e9, fed.updates["2"][1])
    for name in ROBUST:
        expected = 5.0 / 3.0 if name == "norm-bounding" else 2.0  # 3 is clipped to 2
        assert number(fed.aggregate(name)) == pytest.approx(expected, rel=1e-4), name
    made = fed.aggregate("geometric-median", weights="examples")
    assert number(made) == pytest.approx(3.0, rel=1e-4)
    assert number(fed.aggregate("norm-bounding", weights="examples")) == pytest.approx(2.0)


# Trimmed mean and coordinate median


@quick
@given(fed=federations(), byzantine=st.none() | st.integers(0, 3))
def test_coordinatewise_rules_equal_their_dense_definitions(
    fed: Federation, byzantine: int | None
) -> None:
    fed, K = in_order(fed), len(fed.updates)
    f = min((K - 1) // 3 if byzantine is None else byzantine, (K - 1) // 2)
    values = np.stack([t[EXTRA].double().numpy() for _, t in fed.updates.values()])
    made = fed.aggregate("trimmed-mean", byzantine=byzantine).adapter
    is_best_for(made.layers[LAYER], dense.trimmed_mean(products(fed), f), size_of(fed))
    np.testing.assert_allclose(made.extras[EXTRA], dense.trimmed_mean(values, f), rtol=1e-6)
    made = fed.aggregate("coordinate-median").adapter
    is_best_for(made.layers[LAYER], np.median(products(fed), axis=0), size_of(fed))
    np.testing.assert_allclose(made.extras[EXTRA], np.median(values, axis=0), rtol=1e-6)


def test_coordinatewise_rules_by_hand() -> None:
    fed = scalars(-50.0, 1.0, 2.0, 6.0, 1000.0)
    assert number(fed.aggregate("coordinate-median")) == 2.0
    assert number(fed.aggregate("trimmed-mean", byzantine=1)) == 3.0
    assert number(fed.aggregate("trimmed-mean", byzantine=9)) == 2.0  # as many as leave a median
    assert number(scalars(1.0, 2.0, 4.0, 9.0).aggregate("coordinate-median")) == 3.0
    assert number(scalars(1.0, 4.0).aggregate("trimmed-mean", byzantine=1)) == 2.5


def test_rows_are_made_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = federation(np.random.default_rng(2), d_out=7, d_in=5, r=2, weights=[1.0] * 4)
    whole = fed.aggregate("coordinate-median").adapter
    seen: list[int] = []

    def counted(values: torch.Tensor) -> torch.Tensor:
        seen.append(values.shape[1])
        return rising(values)

    monkeypatch.setattr(coordinatewise, "_BLOCK", 4 * 5 * 3)
    monkeypatch.setattr(coordinatewise, "rising", counted)
    assert fed.aggregate("coordinate-median").adapter.digest() == whole.digest()
    assert seen == [15, 15, 5, 15]  # three blocks of rows, and the classifier


# Of all of them


def attacked(rng: np.random.Generator, attack: str, hostile: int = 3) -> Federation:
    """Ten clients, seven of which move the same way with some noise, and the others against it."""
    fed = federation(rng, d_out=12, d_in=10, r=2, weights=[1.0] * 10, drift=0.1)
    common = {n: 0.5 * torch.randn_like(t) for n, t in fed.current.tensors().items()}
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
    torch.manual_seed(0)
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
@settings(quick, max_examples=25)
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


def test_two_clients_by_hand() -> None:
    """Products are diag(2, 0) and diag(0, 4); their mean, cut to rank 1, is diag(0, 2)."""
    made = two_clients().aggregate("trimmed-mean").adapter.layers[LAYER]
    np.testing.assert_allclose(product_of(made), [[0, 0], [0, 2]], atol=1e-6)
