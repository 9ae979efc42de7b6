"""The host under privacy by client: equal to the plain one without noise, bounded, and noised."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from federations import LAYER, Federation, cached_rule, federation, federations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from miniature import Server, world
from numpy.typing import NDArray
from torch import Tensor

from fedgraft.adapter import Adapter, LoraLayer, Tensors
from fedgraft.privacy.randomness import SeededRandomness
from strategies.aggregation import aggregate
from strategies.client_privacy import ClientPrivacy
from strategies.private_round import PrivateAggregate, aggregate_privately
from strategies.registry import rule_class, rule_names
from strategies.rule import ExtraContext, ExtraResult, LayerContext, LayerUpdate, Phase, SumOnlyRule
from strategies.spool import UpdateSpool

WORKS = [name for name in rule_names() if rule_class(name).capabilities.client_privacy]
A, B, HEAD = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight", "classifier.weight"
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Silent:
    """A source of zeros that remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[int, ...], float]] = []

    def normal(self, shape: tuple[int, ...], scale: float) -> Tensor:
        self.asked.append((shape, scale))
        return torch.zeros(shape, dtype=torch.float64)

    def poisson_sample(self, count: int, rate: float) -> NDArray[np.int64]:
        return np.arange(count)


def privacy(clients: int, *, clip: float = 1e12, z: float = 0.0, **others: object) -> ClientPrivacy:
    """Everybody takes part, and nothing is drawn unless `randomness` says otherwise."""
    fields: dict[str, object] = {"rate": 1.0, "randomness": lambda purpose, round: Silent()}
    return ClientPrivacy(noise_multiplier=z, clip=clip, clients=clients, **(fields | others))  # type: ignore[arg-type]


def seeded(seed: int, clients: int, **others: object) -> ClientPrivacy:
    def source(purpose: str, round: int) -> SeededRandomness:
        return SeededRandomness(np.random.default_rng([seed, round, len(purpose)]))

    return privacy(clients, randomness=source, **others)


def run(
    fed: Federation,
    rule: SumOnlyRule,
    how: ClientPrivacy,
    *,
    round: int = 1,
    state: Tensors | None = None,
) -> PrivateAggregate:
    with fed.spooled() as spool:
        return aggregate_privately(rule, spool, fed.current, state or {}, round, how)


def equal_weights(fed: Federation) -> Federation:
    return replace(fed, updates={name: (1.0, own) for name, (_, own) in fed.updates.items()})


def close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=2e-5, atol=2e-5)


# Without noise and clip it is the plain host


@pytest.mark.parametrize("name", [name for name in WORKS if name != "fed-sb"])
@quick
@given(fed=federations(), round=st.integers(1, 2))
def test_without_noise_and_clip_it_is_the_plain_mean(
    name: str, fed: Federation, round: int
) -> None:
    rule = cached_rule(name)
    made = run(fed, rule, privacy(len(fed.updates)), round=round).made
    with equal_weights(fed).spooled() as spool:
        plain = aggregate(rule, spool, fed.current, {}, round)
    if name == "fedsvd":  # whose basis turns with the last bit
        for layer, own in made.adapter.layers.items():
            torch.testing.assert_close(
                own.product(), plain.adapter.layers[layer].product(), rtol=2e-5, atol=5e-5
            )
        close(made.adapter.extras, plain.adapter.extras)
    else:
        close(made.adapter.tensors(), plain.adapter.tensors())
        close(made.state, plain.state)


@pytest.mark.parametrize("name", WORKS)
def test_whole_rounds_are_those_of_the_plain_host(name: str) -> None:
    """Both halves of every rule that works, round after round, over two layers and a head."""
    ends = []
    for how in (None, privacy(3)):
        adapter, clients = world(seed=5)
        for client in clients.values():
            client.weight, client.lr = 1.0, 0.005  # LoRA-A2's is five times that for B
        server = Server(cached_rule(name), adapter, how)
        for _ in range(3):
            server.step(clients)
        ends.append(server.adapter)
    plain, private = ends
    assert plain.digest() != world(seed=5)[0].digest()
    for layer, own in private.layers.items():
        product = plain.layers[layer].product()
        torch.testing.assert_close(own.product(), product, rtol=1e-3, atol=1e-4)
    close(private.extras, plain.extras)


# What every phase releases


@dataclass
class Released:
    """One sum as a phase was given it, what unmoved clients would add, and what clients added."""

    owner: str
    mean: Tensors
    unmoved: Tensors
    added: list[Tensors] = field(default_factory=list)

    def moved(self) -> Tensor:
        """How far the mean is from the start, as one vector."""
        parts = [self.mean[key].double() - self.unmoved[key].double() for key in self.unmoved]
        return torch.cat([part.flatten() for part in parts])

    def noise(self, clients: int) -> Tensor:
        """The mean less that of what clients added; less the start, where nobody came."""
        if not clients:
            return self.moved()
        parts = []
        for key, mean in self.mean.items():
            clean = sum(added[key].double() for added in self.added[-clients:]) / clients
            parts.append((mean - clean).flatten())
        return torch.cat(parts)


class Watched:
    """A rule whose sums are looked at: `phases` by number, the extras in the first."""

    def __init__(self, name: str) -> None:
        self.phases: list[list[Released]] = []
        self.rule = copy.copy(cached_rule(name))
        assert isinstance(self.rule, SumOnlyRule)
        own, conclude = self.rule.phases, self.rule.conclude_extra

        def phases(round: int) -> tuple[Phase, ...]:
            found = own(round)
            self.phases = [[] for _ in found]
            return tuple(
                self._watched(phase, seen) for phase, seen in zip(found, self.phases, strict=True)
            )

        def conclude_extra(mean: Tensors, context: ExtraContext) -> ExtraResult:
            released = Released(context.name, mean, {"value": context.current})
            self.phases[0].append(released)
            return conclude(mean, context)

        self.rule.phases = phases  # type: ignore[method-assign]
        self.rule.conclude_extra = conclude_extra  # type: ignore[method-assign]

    @staticmethod
    def _watched(phase: Phase, seen: list[Released]) -> Phase:
        added: dict[str, list[Tensors]] = {}

        def contribute(update: LayerUpdate, context: LayerContext) -> Tensors:
            made = phase.contribute(update, context)
            added.setdefault(context.name, []).append(made)
            return made

        def finish(mean: Tensors, context: LayerContext) -> Tensors:
            unmoved = phase.unmoved(context)
            seen.append(Released(context.name, mean, unmoved, added.get(context.name, [])))
            return phase.finish(mean, context)

        return Phase(phase.name, contribute, finish, phase.start)

    def vectors(self) -> list[Tensor]:
        """How far each phase's sums are from the start, over the whole adapter."""
        return [torch.cat([released.moved() for released in phase]) for phase in self.phases]


def small(clients: int = 3, drift: float = 0.5, seed: int = 0) -> Federation:
    rng = np.random.default_rng(seed)
    weights = [float(k + 1) for k in range(clients)]
    return federation(rng, d_out=3, d_in=4, r=2, weights=weights, drift=drift, layers=2)


@pytest.mark.parametrize("name", WORKS)
def test_every_coordinate_of_every_sum_has_the_promised_noise(name: str) -> None:
    """z C / (q N) on each, and on no two the same."""
    fed, watched, draws = small(), Watched(name), 120
    if name == "fed-sb":  # whose clients send other things than factors
        fed = replace(fed, updates={})
    came = len(fed.updates)
    seen: list[list[Tensor]] = []
    for seed in range(draws):
        # nothing is clipped, and z C is 0.6
        run(fed, watched.rule, seeded(seed, 3, clip=1e6, z=6e-7))
        seen.append(
            [
                torch.cat([released.noise(came) for released in phase if released.owner != HEAD])
                for phase in watched.phases
            ]
        )
    for noises in zip(*seen, strict=True):
        sample = torch.stack(noises) / 0.2
        # relative standard errors are 6.5% by coordinate, and below 1% together
        assert ((sample.std(0) - 1.0).abs() < 0.3).all()
        assert abs(float(sample.std()) - 1.0) < 0.04
        assert (sample.mean(0).abs() < 5.0 / math.sqrt(draws)).all()
        related = torch.corrcoef(sample.T) - torch.eye(sample.shape[1], dtype=sample.dtype)
        assert related.abs().max() < 6.0 / math.sqrt(draws)


def test_extras_have_the_promised_noise() -> None:
    fed, draws = small(), 200
    clean = run(fed, cached_rule("ffa-lora"), privacy(3)).made.adapter.extras[HEAD]
    values = [
        run(fed, cached_rule("ffa-lora"), seeded(k, 3, clip=1e6, z=6e-7)).made.adapter.extras[HEAD]
        for k in range(draws)
    ]
    sample = (torch.stack(values) - clean) / 0.2
    assert ((sample.std(0) - 1.0).abs() < 0.25).all() and abs(float(sample.std()) - 1.0) < 0.06


@pytest.mark.parametrize("name", [name for name in WORKS if name != "fed-sb"])
@pytest.mark.parametrize("size", [1e6, 1e30])
def test_no_client_moves_a_sum_by_more_than_the_clip(name: str, size: float) -> None:
    """Alone in a round, since the rest is added; in every phase, over layers and extras together.

    At 1e30 LoRA-FAIR's second contribution is not finite in float32 and counts as none.
    """
    fed = small(1)
    client, (weight, tensors) = next(iter(fed.updates.items()))
    huge = {key: size * tensor for key, tensor in tensors.items()}
    bad = replace(fed, updates={client: (weight, huge)})
    watched = Watched(name)
    made = run(bad, watched.rule, privacy(4, clip=0.5)).made
    norms = [float(vector.norm()) for vector in watched.vectors()]
    assert norms[0] == pytest.approx(0.5 / 4, rel=1e-9)
    assert all(norm <= 0.5 / 4 * (1.0 + 1e-9) for norm in norms)
    assert all(bool(tensor.isfinite().all()) for tensor in made.adapter.tensors().values())


@quick
@given(seed=st.integers(0, 2**32 - 1), clip=st.floats(1e-3, 10.0), drift=st.floats(0.0, 3.0))
def test_each_client_is_clipped_as_one_vector(seed: int, clip: float, drift: float) -> None:
    """Against a dense form: all layers and the head laid end to end."""
    fed = small(4, drift, seed % 1000)
    made = run(fed, cached_rule("fedavg"), privacy(5, clip=clip, rate=0.5)).made.adapter
    now = np.concatenate([t.double().numpy().ravel() for t in fed.current.tensors().values()])
    total = np.zeros_like(now)
    for _, tensors in fed.updates.values():
        ordered = [tensors[name].double().numpy().ravel() for name in fed.current.tensors()]
        change = np.concatenate(ordered) - now
        total += change * min(1.0, clip / max(float(np.linalg.norm(change)), 1e-300))
    found = np.concatenate([t.double().numpy().ravel() for t in made.tensors().values()])
    np.testing.assert_allclose(found, now + total / 2.5, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", WORKS)
def test_without_clients_or_changes_a_round_is_its_noise(name: str) -> None:
    """Nothing is divided by zero, and without noise nothing moves."""
    fed = small(2, drift=0.0)
    still = {**fed.current.tensors()}
    rounds = [replace(fed, updates={})]
    if name != "fed-sb":
        rounds.append(replace(fed, updates={"a": (1.0, still), "b": (3.0, still)}))
    for given_ in rounds:
        made = run(given_, cached_rule(name), privacy(2)).made.adapter
        for layer, own in made.layers.items():
            wanted = fed.current.layers[layer].product()
            if name == "fed-sb":  # whose first product is made of the gradient
                wanted = torch.zeros_like(wanted)
            torch.testing.assert_close(own.product(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(made.extras[HEAD], fed.current.extras[HEAD])
        noised = run(given_, cached_rule(name), seeded(0, 2, z=1e-13)).made.adapter
        assert noised.digest() != made.digest()


def test_weights_do_not_count_and_the_denominator_is_fixed() -> None:
    """Of 4 clients sampled at 1/2 two came, by chance 2 q N: the sum is divided by 2, not by K."""
    fed = small(3)
    rule = cached_rule("fedavg")
    one = run(fed, rule, privacy(4, rate=0.5)).made.adapter
    assert one.digest() == run(equal_weights(fed), rule, privacy(4, rate=0.5)).made.adapter.digest()
    now = fed.current.tensors()[A].double()
    total = sum(own[A].double() - now for _, own in fed.updates.values())
    torch.testing.assert_close(one.tensors()[A].double(), now + total / 2.0, rtol=1e-6, atol=1e-6)


def test_one_update_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    read = UpdateSpool.layer

    def counted(self: UpdateSpool, *args: Any) -> LoraLayer:
        nonlocal most
        layer = read(self, *args)
        alive.append(weakref.ref(layer.B))
        most = max(most, sum(reference() is not None for reference in alive))
        return layer

    monkeypatch.setattr(UpdateSpool, "layer", counted)
    run(small(12), cached_rule("lora-fair"), privacy(12))
    assert len(alive) == 12 * 2 * 2 * 2 and most <= 2


# Adaptive clipping


def test_the_clip_follows_the_median() -> None:
    """A layer of 1 x 1: clients move by 1, 1 and 3 with a clip of 2, so b = 2/3."""
    current = Adapter({LAYER: LoraLayer(torch.ones(1, 1), torch.zeros(1, 1))})
    moved = {
        str(k): (1.0, {A: torch.ones(1, 1), B: torch.tensor([[by]])})
        for k, by in enumerate([1.0, 1.0, 3.0])
    }
    fed = Federation(current, moved)
    how = privacy(3, clip=2.0, adaptive=True)
    made = run(fed, cached_rule("ffa-lora"), how)
    assert made.clips == pytest.approx((2.0 * math.exp(-0.2 * (2 / 3 - 1 / 2)),))
    # the mean of 1, 1 and the clipped 3
    assert made.made.adapter.layers[LAYER].B.item() == pytest.approx(4.0 / 3.0)
    with fed.spooled() as spool:
        next_ = aggregate_privately(cached_rule("ffa-lora"), spool, current, {}, 2, how, (0.5,))
    assert next_.clips == pytest.approx((0.5 * math.exp(0.1),))
    assert next_.made.adapter.layers[LAYER].B.item() == pytest.approx(0.5)


def test_phases_have_clips_of_their_own() -> None:
    how = privacy(3, clip=0.5, adaptive=True)
    watched = Watched("lora-fair")
    fed = small(3)
    with fed.spooled() as spool:
        made = aggregate_privately(watched.rule, spool, fed.current, {}, 2, how, (0.25, 1e9))
    up, down = math.exp(0.1), math.exp(-0.1)
    assert made.clips == pytest.approx((0.25 * up, 1e9 * down))


def test_what_is_asked_of_the_source() -> None:
    """The vectors' noise is a little larger than z C, and the count's has sigma_b."""
    silent = Silent()
    how = privacy(200, clip=2.0, z=1.0, adaptive=True, randomness=lambda purpose, round: silent)
    run(small(3), cached_rule("fedsvd"), how)
    assert how.count_scale == 10.0  # q N / 20
    scale = 2.0 / math.sqrt(1.0 - 1.0 / 400.0)
    assert silent.asked[-1] == ((1,), 10.0)
    assert [asked for _, asked in silent.asked[:-1]] == pytest.approx([scale] * 3)


@quick
@given(z=st.floats(0.1, 50.0), clients=st.integers(1, 5000), rate=st.floats(0.01, 1.0))
def test_vector_and_count_together_cost_what_is_said(z: float, clients: int, rate: float) -> None:
    how = privacy(clients, z=z, rate=rate, adaptive=True)
    for phases in (1, 2):
        release = how.release(phases)
        assert release.noise_multiplier == pytest.approx(z / math.sqrt(phases))
        assert len(release.noise_multipliers) == 2 * phases
        assert (release.sampling_rate, release.count) == (rate, 1)
    assert how.vector_multiplier <= z * math.sqrt(1.0 / 0.9) * (1.0 + 1e-9)


# Signal and noise


def test_only_noise_on_both_factors_multiplies() -> None:
    """Against dense products; FFA-LoRA's A has no noise, and so no product of two."""
    fed = small(3)
    for name, product in [("fedavg", True), ("ffa-lora", False)]:
        how = seeded(3, 3, clip=1e6, z=6e-7, study=True)
        made = run(fed, cached_rule(name), how)
        clean = run(fed, cached_rule(name), privacy(3)).made.adapter.layers
        for layer, signal in made.signal.items():
            now, then = fed.current.layers[layer], clean[layer]
            noised = made.made.adapter.layers[layer]
            assert signal.signal == pytest.approx(_norm(then.product() - now.product()), rel=1e-4)
            assert signal.noise == pytest.approx(_norm(noised.product() - then.product()), rel=1e-4)
            both = now.scaling * (noised.B - then.B) @ (noised.A - then.A)
            assert signal.noise_product == pytest.approx(_norm(both), rel=1e-3, abs=1e-12)
            assert (signal.noise_product > 0.0) == product
            assert signal.ratio == pytest.approx(signal.signal / signal.noise)


def test_nothing_but_a_study_measures_what_has_no_noise() -> None:
    assert run(small(3), cached_rule("fedavg"), privacy(3)).signal == {}


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double()))
