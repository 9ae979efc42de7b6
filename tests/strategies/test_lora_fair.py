"""LoRA-FAIR: the ridge in closed form, its two sums, and the paper's cosine with its safeguards."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import dense
import numpy as np
import pytest
import torch
from federations import LAYER, Federation, federation, federations, hostile, numpy_of
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fedgraft.adapter import Adapter, LoraLayer
from strategies.lora_fair import LoRAFair, LoRAFairCosine, LoRAFairOptions
from strategies.lora_fair_cosine import CosineProblem
from strategies.means import weighted_mean
from strategies.registry import build_rule
from strategies.ridge import ridge_correction
from strategies.rule import LayerContext

many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def by_hand() -> Federation:
    """d = 2, r = 1, equal shares: A = (1, 0), B = (2, 0)^T and A = (0, 3), B = (0, 4)^T.

    Then Abar = (.5, 1.5), Bbar = (1, 2)^T, G = 2.5, DW = diag(1, 6), H = (.5, 9)^T, and
    R Abar^T = H - Bbar G = (-2, 4)^T.
    """
    A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
    first = {A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[2.0], [0.0]])}
    second = {A: torch.tensor([[0.0, 3.0]]), B: torch.tensor([[0.0], [4.0]])}
    current = Adapter({LAYER: LoraLayer(torch.zeros(1, 2), torch.zeros(2, 1))})
    return Federation(current, {"0": (1.0, first), "1": (1.0, second)})


def corrected(fed: Federation, **options: object) -> np.ndarray:
    return numpy_of(fed.aggregate("lora-fair", **options).adapter.layers[LAYER])[1]


# The ridge


def test_ridge_by_hand() -> None:
    layer = by_hand().aggregate("lora-fair", lambda_=1.0).adapter.layers[LAYER]
    assert layer.A.tolist() == [[0.5, 1.5]]
    # lambda = 1 * trace(G) / r = 2.5, so X = (-2, 4) / 5
    np.testing.assert_allclose(layer.B.flatten(), [0.6, 2.8], rtol=1e-7)
    np.testing.assert_allclose(corrected(by_hand(), lambda_=0.0).ravel(), [0.2, 3.6], rtol=1e-7)


@many
@given(fed=federations(), lambda_rel=st.sampled_from([0.0, 1e-4, 1e-2, 1.0, 100.0]))
def test_ridge_never_leaves_more_than_fedavg(fed: Federation, lambda_rel: float) -> None:
    clients = fed.clients()
    DW, (A_mean, B_mean) = dense.ideal(clients), dense.means(clients)
    A, B = numpy_of(fed.aggregate("lora-fair", lambda_=lambda_rel).adapter.layers[LAYER])
    size = max(np.linalg.norm(c.B) * np.linalg.norm(c.A) for c in clients)
    # the slack is the rounding of A and B to float32
    assert np.linalg.norm(DW - B @ A) <= np.linalg.norm(DW - B_mean @ A_mean) + 3e-7 * size


@pytest.mark.parametrize(("drift", "bound"), [(1.0, 1e-6), (0.1, 1e-6), (0.01, 2e-6)])
def test_two_sums_equal_the_direct_form_also_at_small_drift(drift: float, bound: float) -> None:
    """The correction X in float32 against its direct float64 form, in relative error.

    Bounds are a few times what the centred sums give (under 4e-7 at each drift). Summed without
    centring, the same X is off by 1e-2 at drift 0.01: that is what these bounds would catch.
    """
    rng = np.random.default_rng(3)
    fed = federation(rng, d_out=96, d_in=80, r=8, weights=[1.0, 3.0, 2.0, 5.0, 4.0], drift=drift)
    clients = fed.clients()
    A, B = dense.means(clients)
    expected = dense.ridge(clients, 1e-2)[1] - B
    # X as the second phase makes it, before it disappears in the rounding of Bbar + X
    rule = build_rule("lora-fair")
    assert isinstance(rule, LoRAFair)
    X = _correction(rule, fed)
    assert np.linalg.norm(X - expected) <= bound * np.linalg.norm(expected)

    H = sum(c.share * (c.B.astype("f4") @ (c.A @ A.T).astype("f4")) for c in clients)
    naive = H - B.astype("f4") @ (A @ A.T).astype("f4")
    uncentred = ridge_correction(torch.from_numpy(naive), torch.from_numpy(A), 1e-2).numpy()
    if drift == 0.01:
        assert np.linalg.norm(uncentred - expected) > 100 * bound * np.linalg.norm(expected)


def _correction(rule: LoRAFair, fed: Federation) -> np.ndarray:
    """Run the rule's phases as a secure sum would, float32 between them, and return X."""
    context = LayerContext(LAYER, 1, fed.current.layers[LAYER])
    with fed.spooled() as spool:
        for phase in rule.phases(1):
            mean = weighted_mean(
                (update.share, phase.contribute(update.factors, context))
                for update in spool.updates(LAYER, context.current)
            )
            if phase.name == "residual":
                return ridge_correction(mean["residual"], context.shared["A"], 1e-2).numpy()
            shared = {name: t.float() for name, t in phase.finish(mean, context).items()}
            context = replace(context, shared=shared)
    raise AssertionError("the rule has no residual phase")


@pytest.mark.parametrize("objective", ["ridge", "cosine"])
@pytest.mark.parametrize("lambda_", [0.0, 0.01])
def test_degenerate_rounds_are_safe(objective: str, lambda_: float) -> None:
    rng = np.random.default_rng(4)
    fed = federation(rng, d_out=4, d_in=5, r=3, weights=[1.0, 1.0])
    A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
    (w0, u0), (w1, u1) = fed.updates.values()

    def run(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> LoraLayer:
        updates = {"0": (w0, u0 | first), "1": (w1, u1 | second)}
        made = replace(fed, updates=updates).aggregate(
            "lora-fair", objective=objective, lambda_=lambda_
        )
        layer = made.adapter.layers[LAYER]
        assert layer.A.isfinite().all() and layer.B.isfinite().all()
        return layer

    zero_A, zero_B = torch.zeros_like(u0[A]), torch.zeros_like(u0[B])
    # nothing was learned: B = 0 everywhere, so there is nothing to correct
    assert not run({B: zero_B}, {B: zero_B}).B.any()
    # Abar = 0, from zeros and from opposites: no correction of B changes anything
    expected = (u0[B].double() + u1[B].double()).float() / 2
    torch.testing.assert_close(run({A: zero_A}, {A: zero_A}).B, expected)
    torch.testing.assert_close(run({}, {A: -u0[A]}).B, expected)
    # G singular: all rows of A are the same
    run({A: u0[A][:1].expand(3, 5).clone()}, {A: u1[A][:1].expand(3, 5).clone()})
    # DW = 0: opposite products
    run({}, {A: u0[A], B: -u0[B]})
    run({}, {A: -u0[A], B: u0[B]})


def test_objective_picks_the_class() -> None:
    ridge = build_rule("lora-fair")
    cosine = build_rule("lora-fair", {"objective": "cosine"})
    assert type(ridge) is LoRAFair and ridge.capabilities.sum_only
    assert type(cosine) is LoRAFairCosine and not cosine.capabilities.sum_only
    assert ridge.options == LoRAFairOptions(lambda_=0.01)


# The cosine


def cosine(fed: Federation, penalty: float) -> tuple[np.ndarray, tuple[str, ...]]:
    made = fed.aggregate("lora-fair", objective="cosine", lambda_=penalty)
    return numpy_of(made.adapter.layers[LAYER])[1], made.notes


def objective(fed: Federation, penalty: float) -> dense.Cosine:
    """The loss with Abar and Bbar as clients would get them, in float32."""
    A, B = numpy_of(fed.aggregate("fedavg").adapter.layers[LAYER])
    return dense.Cosine(A, B, dense.ideal(fed.clients()), penalty)


def test_cosine_by_hand() -> None:
    """With lambda = 0 the best direction is H G^-1 = (.2, 3.6)^T, at the length nearest to Bbar.

    That is sigma = <Bbar, H G^-1> / ||H G^-1||^2 = (.2 + 7.2) / (.04 + 12.96) = 7.4 / 13.
    """
    B, notes = cosine(by_hand(), 0.0)
    np.testing.assert_allclose(B.ravel(), [0.2 * 7.4 / 13, 3.6 * 7.4 / 13], rtol=1e-7)
    assert notes == ()


@many
@given(
    fed=federations(),
    penalty=st.sampled_from([0.0, 1e-6, 1e-2, 1.0, 100.0]),
    attack=st.none() | st.tuples(*[st.sampled_from([-50.0, -3.0, -1.0, 0.0, 1.0, 50.0])] * 2),
    data=st.data(),
)
def test_cosine_never_ends_above_doing_nothing(
    fed: Federation,
    penalty: float,
    attack: tuple[float, float] | None,
    data: st.DataObject,
) -> None:
    """Among them one hostile client: signs turned, factors blown up or zeroed."""
    if attack is not None:
        fed = hostile(fed, data.draw(st.sampled_from(list(fed.updates))), *attack)
    B, _ = cosine(fed, penalty)
    assert np.isfinite(B).all()
    loss = objective(fed, penalty)
    # float64 throughout; under cancellation (an attack of -1 or -50) S loses some digits
    assert loss.loss(B) <= loss.loss(loss.B) * (1 + 1e-9) + 1e-9


@settings(many, max_examples=40)
@given(fed=federations(dtypes=(torch.float32,)), penalty=st.sampled_from([1e-3, 1e-2, 0.3]))
def test_cosine_is_as_low_as_an_optimiser_gets(fed: Federation, penalty: float) -> None:
    """On ordinary cases (no note), by loss: gradients at a root are known only to 1e-12."""
    assume(len(fed.updates) > 1)
    B, notes = cosine(fed, penalty)
    assume(not notes)
    loss = objective(fed, penalty)
    ridge = dense.ridge(fed.clients(), 1e-2)[1]
    # rounding B to float32 costs second order only, for the gradient vanishes there
    assert loss.loss(B) <= loss.minimum([loss.B, ridge, B]) + 1e-10 * (1 + loss.loss(B))


@pytest.mark.parametrize(
    ("seed", "d", "r", "clients", "penalty", "attack"),
    [
        (141, 4, 4, 2, 0.03, (-1.0, 1.0)),
        (479, 3, 2, 2, 0.01, (-1.0, 3.0)),
        (857, 3, 3, 2, 0.1, (1.0, 0.05)),
        (44, 4, 4, 2, 0.01, (-1.0, 0.05)),
    ],
)
def test_the_best_of_several_roots_is_taken(
    seed: int, d: int, r: int, clients: int, penalty: float, attack: tuple[float, float]
) -> None:
    """Found by search: F has three roots here, the worst with a loss 0.17 to 0.6 above the best."""
    rng = np.random.default_rng(seed)
    fed = federation(rng, d_out=d, d_in=d, r=r, weights=[1.0] * clients, drift=1.0)
    fed = hostile(fed, "client-0", *attack)
    B, notes = cosine(fed, penalty)
    loss = objective(fed, penalty)
    ridge = dense.ridge(fed.clients(), 1e-2)[1]
    best = loss.minimum([ridge, *(loss.B * scale for scale in (0.01, 0.1, 0.5, 1.0, 2.0))])
    assert notes == () and loss.loss(B) == pytest.approx(best, abs=1e-9)


def test_a_point_worse_than_nothing_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the search for roots ever fail, the ridge stands in: B = Bbar is the bar to pass."""

    def poor(self: CosineProblem) -> tuple[torch.Tensor, str]:
        return -self.B, "no stationary point beats Bbar"

    monkeypatch.setattr(CosineProblem, "_optimum", poor)
    B, notes = cosine(by_hand(), 0.01)
    # lambda = .01 * 2.5, so X = (-2, 4) / 2.525
    np.testing.assert_allclose(B.ravel(), [1 - 2 / 2.525, 2 + 4 / 2.525], rtol=1e-6)
    assert notes == (f"{LAYER}: the ridge stood in for the cosine: no stationary point beats Bbar",)


@pytest.mark.parametrize(
    ("turn_A", "turn_B", "reason"), [(-1.0, 50.0, "<Bbar, H> < 0"), (50.0, -1.0, "<Bbar, H")]
)
def test_hostile_client_is_met_by_the_ridge_and_a_note(
    turn_A: float, turn_B: float, reason: str
) -> None:
    fed = federation(np.random.default_rng(5), d_out=6, d_in=7, r=2, weights=[1.0] * 4, drift=0.1)
    _, notes = cosine(hostile(fed, "client-0", turn_A, turn_B), 1e-2)
    assert len(notes) == 1 and notes[0].startswith(f"{LAYER}: ") and reason in notes[0]


def test_every_safeguard_can_be_reached() -> None:
    """Over many hostile rounds each reason and each stand-in occurs."""
    seen: set[str] = set()
    for seed, (a, b) in product(range(12), [(-1.0, 50.0), (50.0, -1.0), (-3.0, 1.0), (5.0, -5.0)]):
        fed = federation(np.random.default_rng(seed), d_out=5, d_in=5, r=3, weights=[1.0] * 3)
        for penalty in (1e-4, 1e-2, 1.0):
            seen |= set(cosine(hostile(fed, "client-0", a, b), penalty)[1])
    for part in ("<Bbar, H> < 0", "<Bbar, H G^-1> <= 0", "the ridge stood in", "B stays the mean"):
        assert any(part in note for note in seen), (part, seen)
