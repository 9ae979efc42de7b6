"""DP-SGD on the client: its steps by hand, its noise measured, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from private import Family, Silent, differs, family, norm, one_by_one, privately, trained
from torch import Tensor, nn

from client import batch_gradient
from client.private_training import sampling_rate
from fedgraft.adapter import Adapter, Tensors, parse_factor
from fedgraft.errors import PrivacyError, RunError
from fedgraft.quantization import mixes_examples
from fedgraft.tasks.task import Batch
from strategies.local import Training

FFA = Training(factors=frozenset("B"))
BATCH = [5, 1, 13, 2, 7]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family("digits", tmp_path_factory.mktemp("digits"))


def step_by_hand(made: Family, batch: list[int], clip: float, size: int, names: Any) -> Tensors:
    """What a step of SGD with a rate of 1 leaves, without noise."""
    alone = one_by_one(made, np.array(batch), list(names))
    start = made.start.tensors()
    return {
        name: start[name]
        - sum((min(1.0, clip / norm(g)) * g[name] for g in alone), torch.zeros(())) / size
        for name in names
    }


# Steps by hand


@pytest.mark.parametrize("micro_batch", [None, 1, 2])
@pytest.mark.parametrize("plan", [Training(), FFA])
def test_a_step_is_the_clipped_sum_over_the_batch_size(
    micro_batch: int | None, plan: Training, llama: Family
) -> None:
    """A batch of five where four are expected: the divisor stays four."""
    found = trained(llama, privately(0.5, BATCH), plan=plan, micro_batch=micro_batch).tensors
    names = {n for n in llama.names if plan.factors == {"A", "B"} or "lora_A" not in n}
    assert differs(found, step_by_hand(llama, BATCH, 0.5, 4, sorted(names))) < 1e-5


def test_a_batch_of_none_is_a_step_of_noise_alone(llama: Family) -> None:
    still = trained(llama, privately(0.5, BATCH, []), steps=2).tensors
    assert differs(still, step_by_hand(llama, BATCH, 0.5, 4, llama.names)) < 1e-5
    noised = trained(llama, privately(0.5, [], noise=2.0)).tensors
    start = llama.start.tensors()
    assert all(bool((noised[name] != start[name]).all()) for name in noised)


def test_adamw_steps_on_the_noised_mean(llama: Family) -> None:
    found = trained(llama, privately(0.5, BATCH, noise=1.0), optimizer="adamw", lr=0.01).tensors
    gradient = trained(llama, privately(0.5, BATCH, noise=1.0)).tensors
    start = llama.start.tensors()
    for name, tensor in found.items():  # the first step of Adam is the gradient's sign
        sign = torch.sign(start[name] - gradient[name])
        assert torch.allclose(start[name] - tensor, 0.01 * sign, atol=1e-4)


def test_grad_clip_does_not_clip_what_is_noised(llama: Family) -> None:
    one, other = (
        trained(llama, privately(0.5, BATCH, noise=1.0), grad_clip=value).tensors
        for value in (0.0, 1e-3)
    )
    assert differs(one, other) == 0.0


def test_a_proximal_term_a_penalty_and_masks_act_on_what_was_noised(llama: Family) -> None:
    """The step after a first one, by hand: the pull to the start is linear and needs no data."""
    first = trained(llama, privately(0.5, BATCH, noise=1.0)).tensors
    start = llama.start.tensors()
    pulled = trained(llama, privately(0.5, BATCH, [], noise=0.0), steps=2, proximal_mu=0.5).tensors
    plain = trained(llama, privately(0.5, BATCH)).tensors
    by_hand = {name: plain[name] - 0.5 * (plain[name] - start[name]) for name in plain}
    assert differs(pulled, by_hand) < 1e-5

    name = llama.names[0]
    tilted = Training(penalty=lambda own: 3.0 * own[name].sum())
    moved = trained(llama, privately(0.5, BATCH, noise=1.0), plan=tilted).tensors
    assert differs({name: moved[name]}, {name: first[name] - 3.0}) < 1e-5

    mask = torch.zeros_like(start[name], dtype=torch.bool)
    mask[0, 0] = True
    held = trained(
        llama, privately(0.5, BATCH, noise=1.0), plan=Training(masks={name: mask})
    ).tensors[name]
    assert bool((held == start[name])[~mask].all()) and held[0, 0] != start[name][0, 0]


def test_rates_and_bases_of_a_rule_step_on_what_was_noised(llama: Family) -> None:
    """B at twice the rate; and one B = U C, whose core C gets U^T of the gradient."""
    start, once = llama.start.tensors(), trained(llama, privately(0.5, BATCH)).tensors
    doubled = trained(llama, privately(0.5, BATCH), plan=Training(rates={"B": 2.0})).tensors
    by_hand = {n: t + (t - start[n] if "lora_B" in n else 0.0) for n, t in once.items()}
    assert differs(doubled, by_hand) < 1e-5

    name = next(n for n in llama.names if "lora_B" in n)
    basis = torch.linalg.qr(torch.randn(len(start[name]), 4))[0]
    begun = Adapter.from_tensors(
        start | {name: basis @ torch.ones(4, start[name].shape[1])}, llama.model.scaling
    )
    plain = trained(llama, privately(0.5, BATCH), start=begun).tensors[name]
    held = trained(
        llama, privately(0.5, BATCH), start=begun, plan=Training(bases={name: basis})
    ).tensors[name]
    assert torch.allclose(held, basis @ (basis.T @ plain), atol=1e-5)


def test_a_smaller_rank_stays_one(llama: Family) -> None:
    """Noise must not fill the rows that pad a client's factors to the model's rank."""
    cut = {
        name: tensor[:2] if "lora_A" in name else tensor[:, :2]
        for name, tensor in llama.start.tensors().items()
    }
    start = Adapter.from_tensors(cut, llama.model.scaling)
    found = trained(llama, privately(0.5, BATCH, noise=1.0), start=start, steps=1)
    assert {name: t.shape for name, t in found.tensors.items()} == {
        name: t.shape for name, t in cut.items()
    }
    for name, tensor in llama.model.read().items():
        rest = tensor[2:] if "lora_A" in name else tensor[:, 2:]
        assert not rest.any() and bool((found.tensors[name] != cut[name]).all())


def test_short_of_memory_the_step_is_the_same(
    llama: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(llama, privately(0.5, BATCH, noise=1.0)).tensors
    loss, sizes = llama.task.loss, []

    def limited(model: nn.Module, batch: Batch) -> Tensor:
        sizes.append(len(batch["labels"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return loss(model, batch)

    monkeypatch.setattr(llama.task, "loss", limited)
    monkeypatch.setattr(batch_gradient, "release_memory", lambda device: None)
    try:
        assert differs(trained(llama, privately(0.5, BATCH, noise=1.0)).tensors, whole) < 1e-5
    finally:
        llama.model.micro_batch = None
    assert sizes == [4, 2, 2, 1]


def test_one_example_that_is_no_number_spoils_no_other(
    llama: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = llama.task.loss

    def broken(model: nn.Module, batch: Batch) -> Tensor:
        whole = loss(model, batch)
        return whole * (float("nan") if len(batch["labels"]) == 1 else 1.0)

    monkeypatch.setattr(llama.task, "loss", broken)
    found = trained(llama, privately(0.5, BATCH), micro_batch=2).tensors  # the last is alone
    monkeypatch.undo()
    assert differs(found, step_by_hand(llama, BATCH[:4], 0.5, 4, llama.names)) < 1e-5


# Noise


def noise_of(made: Family, plan: Training, multiplier: float, clip: float) -> Tensors:
    """What noise does in a step on a batch: the step with it, less the one without."""
    loud = trained(made, privately(clip, BATCH, noise=multiplier), plan=plan).tensors
    silent = trained(made, privately(clip, BATCH), plan=plan).tensors
    return {name: loud[name] - silent[name] for name in loud}


@pytest.mark.parametrize("plan", [Training(), FFA])
def test_noise_has_the_promised_scale_on_every_coordinate(plan: Training, digits: Family) -> None:
    """Standard deviation = multiplier * clip / batch size, over all and in every single tensor.

    A sample deviation of n normals is off by more than 5 / sqrt(2 n) once in two million.
    """
    multiplier, clip, size = 1.5, 0.25, 4
    promised = multiplier * clip / size
    found = noise_of(digits, plan, multiplier, clip)
    assert {n for n in found if "lora_A" in n} == set() or plan is not FFA
    for name, noise in found.items():
        assert bool((noise != 0.0).all()), name
        n = noise.numel()
        scaled = noise.double() / promised
        assert abs(float(scaled.square().mean().sqrt()) - 1.0) < 5.0 / (2 * n) ** 0.5, name
        assert abs(float(scaled.mean())) < 5.0 / n**0.5, name
    whole = torch.cat([noise.flatten() for noise in found.values()]).double() / promised
    assert len(whole) > 7_500
    assert abs(float(whole.square().mean().sqrt()) - 1.0) < 5.0 / (2 * len(whole)) ** 0.5
    assert abs(float((whole.abs() < 1.0).double().mean()) - 0.6827) < 0.02  # a normal's share
    pairs = whole[: len(whole) // 2 * 2].reshape(2, -1)  # no value tells of another
    assert abs(float((pairs[0] * pairs[1]).mean())) < 5.0 / pairs.shape[1] ** 0.5


def test_each_step_has_noise_of_its_own(llama: Family) -> None:
    found = trained(llama, privately(0.5, [], [], noise=1.0), steps=2).tensors
    first = trained(llama, privately(0.5, [], noise=1.0)).tensors
    start = llama.start.tensors()
    name = llama.names[0]
    ratio = (found[name] - first[name]) / (first[name] - start[name])
    assert float(ratio.std()) > 0.1  # the second step is no multiple of the first


def test_batches_are_poisson_at_the_batch_size_over_n(llama: Family) -> None:
    assert sampling_rate(25, 100) == 0.25 and sampling_rate(25, 10) == 1.0
    how = privately(1.0, batch_size=6)
    asked: list[tuple[int, float]] = []

    class Asked(Silent):
        def poisson_sample(self, count: int, rate: float) -> np.ndarray:
            asked.append((count, rate))
            return np.array([0])

    trained(llama, replace(how, batches=Asked()), steps=3, batch_size=6)
    assert asked == [(len(llama.examples), 6 / len(llama.examples))] * 3


# The model, before and after


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantised_base_trains(quantization: str, tmp_path: Path) -> None:
    made = family("llama", tmp_path, model__quantization=quantization)
    assert mixes_examples(made.model.model) == (quantization == "int8")
    found = trained(made, privately(0.5, BATCH)).tensors
    assert differs(found, step_by_hand(made, BATCH, 0.5, 4, made.names)) < 1e-5


def test_on_int8_no_example_is_computed_beside_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outlier of one example would change how the features of the others are rounded."""
    made = family("llama", tmp_path, model__quantization="int8")
    loss, sizes = made.task.loss, []

    def noting(model: nn.Module, batch: Batch) -> Tensor:
        sizes.append(len(batch["labels"]))
        return loss(model, batch)

    monkeypatch.setattr(made.task, "loss", noting)
    trained(made, privately(0.5, BATCH), micro_batch=4)
    assert sizes == [1] * 5


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules())


def attributes(model: nn.Module) -> list[set[str]]:
    return [set(vars(thing)) for thing in (*model.modules(), *model.parameters())]


@pytest.mark.parametrize("fails", [False, True])
def test_the_resident_model_is_left_as_it_was(
    fails: bool, llama: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama.model.model
    trained(llama, privately(0.5, BATCH))  # PEFT and torch note a few things in a first pass
    before = type(model), hooks(model), attributes(model), llama.model.frozen_digest()
    if fails:

        def broken(model: nn.Module, batch: Batch) -> Tensor:
            raise ZeroDivisionError

        monkeypatch.setattr(llama.task, "loss", broken)
        with pytest.raises(ZeroDivisionError):
            trained(llama, privately(0.5, BATCH))
    else:
        trained(llama, privately(0.5, BATCH, noise=1.0))
    assert before == (type(model), hooks(model), attributes(model), llama.model.frozen_digest())
    assert all(p.grad is None and p.requires_grad for p in llama.model.parameters.values())


def test_factors_that_get_no_gradient_are_found_under_the_noise(
    llama: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What other code trains for whole runs: noise moves the factors, and the data do not."""

    def unconnected(model: nn.Module, batch: Batch) -> Tensor:
        return torch.ones((), requires_grad=True)

    monkeypatch.setattr(llama.task, "loss", unconnected)
    with pytest.raises(RunError, match="no gradient reaches any LoRA factor"):
        trained(llama, privately(0.5, BATCH, noise=1.0))


def test_factors_follow_the_data(digits: Family) -> None:
    """With hardly any noise a few steps bring the loss down, by factors that all move."""
    batches = [list(range(k, k + 40)) for k in range(0, 400, 40)]
    how = privately(1.0, *batches, batch_size=40, noise=1e-3)
    start = digits.model.initial_adapter(0)
    found = trained(digits, how, start=start, steps=10, optimizer="adamw", lr=0.01)
    scored = [
        digits.model.evaluate(digits.task, adapter, digits.task.validation())["loss"]
        for adapter in (start, Adapter.from_tensors(found.tensors, digits.model.scaling))
    ]
    assert scored[1] < 0.9 * scored[0]
    begin = start.tensors()
    assert all(bool((t != begin[n]).any()) for n, t in found.tensors.items() if parse_factor(n))


def test_what_becomes_infinite_is_told_and_no_loss_is(llama: Family) -> None:
    assert trained(llama, privately(0.5, BATCH, noise=1.0)).loss == 0.0
    with pytest.raises(RunError, match="diverged in round 1: what was trained is not finite"):
        trained(llama, privately(0.5, [], noise=1e3), lr=1e38)


def test_dora_has_no_gradient_of_an_example(tmp_path: Path) -> None:
    made = family("llama", tmp_path, adapter__type="dora")
    with pytest.raises(PrivacyError, match="lora_magnitude_vector"):
        trained(made, privately(0.5, BATCH))
