"""The trainer against a plain PyTorch loop, and what it must never let happen."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from plain_loop import PlainLoop
from torch import Tensor, nn
from torch.nn import functional

from client import trainer
from client.trainer import Assignment, LocalResult, batch_indices
from fedgraft.adapter import Adapter, Tensors, parse_factor
from fedgraft.config import Config, TrainConfig
from fedgraft.errors import ModelError, RunError
from fedgraft.resident_model import ResidentModel
from fedgraft.seeds import stream, torch_seed
from fedgraft.tasks.digits import Digits
from fedgraft.tasks.task import Batch, Examples, Task
from strategies.local import Training

ROUNDS, STEPS, BATCH, LR = 3, 4, 16, 0.01
SETTINGS = TrainConfig(steps=STEPS, batch_size=BATCH, lr=LR, grad_clip=0.0)
ADAMW = partial(torch.optim.AdamW, lr=LR, weight_decay=0.0, fused=True)
SGD = partial(torch.optim.SGD, lr=LR, fused=True)


def work(round: int = 1, client: str = "0", factors: str = "AB", **settings: Any) -> Assignment:
    return Assignment(
        settings=SETTINGS.model_copy(update=settings),
        seed=0,
        round=round,
        rounds=ROUNDS,
        client=client,
        how=Training(factors=frozenset(factors)),
    )


def differs(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of any entry."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def train(
    model: ResidentModel,
    task: Task,
    examples: Examples,
    start: Tensors,
    work: Assignment,
    optimizer_state: Tensors | None = None,
) -> LocalResult:
    """Train from named tensors, which no rule has cut to a smaller rank."""
    adapter = Adapter.from_tensors(start, model.scaling)
    return trainer.train(model, task, examples, adapter, work, optimizer_state)


@pytest.fixture
def start(model: ResidentModel) -> Tensors:
    return model.initial_adapter(0).tensors()


def federated(
    model: ResidentModel, task: Task, start: Tensors, client: int = 0, **settings: Any
) -> Tensors:
    """Train three rounds, each from what the last one left, as a federation of one would."""
    tensors, state = dict(start), None
    for round in range(1, ROUNDS + 1):
        factors = settings.get("factors", "AB")
        rest = {name: value for name, value in settings.items() if name != "factors"}
        assignment = work(round, str(client), factors, **rest)
        trained = train(model, task, task.train(client), tensors, assignment, state)
        state = trained.optimizer or None
        tensors |= trained.tensors
    return tensors


def plain(task: Task, start: Tensors, optimizer: Any, client: int = 0, **options: Any) -> Tensors:
    loop = PlainLoop(task, task.config, optimizer, ROUNDS, STEPS, BATCH, LR, **options)
    tensors = dict(start)
    for round in range(1, ROUNDS + 1):
        tensors = loop.train(task.train(client), str(client), round, tensors)
    return tensors


# Against the plain loop. The sums are the same in both, so they agree to the bit. Where the loop
# takes another way to the same gradient (its own norm; autograd through the penalty), float32
# rounds at other places: 1e-7 of weights up to 1. Those cases take SGD, since AdamW divides small
# gradients by themselves and would blow the rounding up.
CASES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "adamw": ({}, ADAMW, {}),
    "adamw with weight decay": (
        {"weight_decay": 0.1},
        partial(torch.optim.AdamW, lr=LR, weight_decay=0.1, fused=True),
        {},
    ),
    "constant": ({"schedule": "constant"}, ADAMW, {"cosine": False}),
    "optimizer kept": ({"optimizer_state": "keep"}, ADAMW, {"keep": True}),
    "sgd": ({"optimizer": "sgd"}, SGD, {}),
    "sgd with momentum": (
        {"optimizer": "sgd", "momentum": 0.9},
        partial(SGD, momentum=0.9),
        {},
    ),
    "sgd with momentum kept": (
        {"optimizer": "sgd", "momentum": 0.9, "optimizer_state": "keep"},
        partial(SGD, momentum=0.9),
        {"keep": True},
    ),
    "b only": ({"factors": "B"}, ADAMW, {"factors": "B"}),
    "a only": ({"factors": "A"}, ADAMW, {"factors": "A"}),
    "clipped": ({"optimizer": "sgd", "grad_clip": 0.5}, SGD, {"clip": 0.5}),
    "proximal": ({"optimizer": "sgd", "proximal_mu": 3.0}, SGD, {"mu": 3.0}),
}
ROUNDED = {"clipped": 1e-6, "proximal": 1e-6}


@pytest.mark.parametrize("case", CASES)
def test_three_rounds_equal_a_plain_loop(
    case: str, model: ResidentModel, digits: Task, start: Tensors
):
    settings, optimizer, options = CASES[case]
    if options.get("factors") == "A":  # from B = 0 nothing would move
        start = {n: t if "lora_B" not in n else torch.full_like(t, 0.02) for n, t in start.items()}
    ours = federated(model, digits, start, **settings)
    theirs = plain(digits, start, optimizer, **options)
    assert differs(ours, theirs) <= ROUNDED.get(case, 0.0)
    assert differs(ours, start) > 0.001  # something was trained


def test_dropout_equals_a_plain_loop_with_the_same_seed(tiny: Config, start: Tensors):
    config = tiny.with_overrides({"adapter.dropout": 0.2})
    task = Digits(config)
    ours = train(ResidentModel(task, config), task, task.train(0), start, work(2)).tensors
    loop = PlainLoop(task, config, ADAMW, ROUNDS, STEPS, BATCH, LR)
    torch.manual_seed(torch_seed(0, "dropout", round=2, client="0"))
    assert differs(ours, loop.train(task.train(0), "0", 2, start)) == 0.0


def test_dropout_is_a_function_of_seed_round_and_client(tiny: Config, start: Tensors):
    config = tiny.with_overrides({"adapter.dropout": 0.2})
    task = Digits(config)
    model = ResidentModel(task, config)
    start = {name: tensor + 0.05 for name, tensor in start.items()}  # with B = 0 A's input is moot
    before = torch.get_rng_state()

    def loss(assignment: Assignment) -> float:
        # One step over all examples: their order, which client and round change too, is no matter.
        whole = replace(
            assignment,
            settings=assignment.settings.model_copy(update={"batch_size": 999, "steps": 1}),
        )
        return train(model, task, task.train(0), start, whole).loss

    first = loss(work())
    torch.rand(7)  # what others draw from the global generator does not matter
    assert loss(work()) == first
    others = [loss(work(round=2)), loss(work(client="1")), loss(replace(work(), seed=1))]
    assert len({round(value, 4) for value in [first, *others]}) == 4
    torch.set_rng_state(before)
    loss(work())
    assert torch.equal(torch.get_rng_state(), before)


# The pieces, by hand


def test_one_clipped_step_of_sgd_is_as_long_as_lr_times_the_clip(
    model: ResidentModel, digits: Task, start: Tensors
):
    assignment = work(optimizer="sgd", steps=1, grad_clip=0.01, schedule="constant")
    trained = train(model, digits, digits.train(0), start, assignment).tensors
    length = math.sqrt(sum(float((trained[n] - start[n]).square().sum()) for n in trained))
    assert length == pytest.approx(LR * 0.01, rel=1e-3)  # float32 differences of weights near 0.1


def test_a_heavy_proximal_term_keeps_the_adapter_near_its_start(
    model: ResidentModel, digits: Task, start: Tensors
):
    # lr * mu = 1: every SGD step first goes all the way back to the start, so that four steps end
    # as near to it as one step leads.
    def length(**settings: Any) -> float:
        assignment = work(optimizer="sgd", schedule="constant", **settings)
        trained = train(model, digits, digits.train(0), start, assignment).tensors
        return math.sqrt(sum(float((trained[n] - start[n]).square().sum()) for n in trained))

    one, free, held = length(steps=1), length(), length(proximal_mu=1 / LR)
    assert free > 2 * one and held < 1.5 * one


def test_micro_batches_add_up_to_the_batch(model: ResidentModel, digits: Task, start: Tensors):
    def trained(micro: int | None) -> LocalResult:
        assignment = work(optimizer="sgd", micro_batch=micro)
        return train(model, digits, digits.train(0), start, assignment)

    whole = trained(None)
    for micro in (16, 99):  # one part
        assert differs(trained(micro).tensors, whole.tensors) == 0.0
    for micro in (1, 5, 8):  # 16 = 5 + 5 + 5 + 1: a part weighs by its examples
        parts = trained(micro)
        # gradients summed in another order: float32's 1e-7, times lr 0.01 and a few of them
        assert differs(parts.tensors, whole.tensors) < 1e-7
        assert parts.loss == pytest.approx(whole.loss, rel=1e-6)


def test_the_loss_is_the_mean_over_steps(model: ResidentModel, digits: Task, start: Tensors):
    examples = digits.train(0)
    trained = train(model, digits, examples, start, work(steps=1))
    first = next(batch_indices(len(examples), BATCH, stream(0, "batches", round=1, client="0")))
    batch = examples.batch(first)
    with torch.no_grad():
        logits = digits.load_base()(pixel_values=batch["pixel_values"]).logits
    assert trained.loss == pytest.approx(float(functional.cross_entropy(logits, batch["labels"])))
    assert (trained.steps, trained.optimizer) == (1, {}) and trained.seconds > 0


def test_batches_go_through_all_examples_before_any_comes_again():
    batches = batch_indices(10, 4, np.random.default_rng(0))
    drawn = np.concatenate([next(batches) for _ in range(15)])  # six times ten
    for at in range(0, 60, 10):
        assert sorted(drawn[at : at + 10]) == list(range(10))
    few = batch_indices(3, 8, np.random.default_rng(0))
    assert [sorted(next(few)) for _ in range(3)] == [[0, 1, 2]] * 3


def test_epochs_are_counted_in_examples(model: ResidentModel, digits: Task, start: Tensors):
    examples = digits.train(0)  # 390 of 780
    assignment = work(steps=None, epochs=0.1, batch_size=10)
    assert len(examples) == 390
    assert train(model, digits, examples, start, assignment).steps == 4  # 3.9


# Nothing of one client is left for the next


def test_a_client_trains_the_same_alone_and_after_another(
    model: ResidentModel, digits: Task, start: Tensors
):
    base, frozen = model.base_hash, model.frozen_digest()
    alone = train(model, digits, digits.train(1), start, work(client="1"))
    train(model, digits, digits.train(0), start, work(client="0", lr=0.5, proximal_mu=0.1))
    train(model, digits, digits.train(0), start, work(client="0", factors="B"))
    after = train(model, digits, digits.train(1), start, work(client="1"))
    assert differs(alone.tensors, after.tensors) == 0.0 and alone.loss == after.loss
    other = train(model, digits, digits.train(0), start, work(client="0"))
    assert differs(alone.tensors, other.tensors) > 0.001
    assert (model.base_hash, model.frozen_digest()) == (base, frozen)
    assert all(p.grad is None and p.requires_grad for p in model.parameters.values())


def test_what_it_starts_from_is_not_written_to(model: ResidentModel, digits: Task, start: Tensors):
    before = {name: tensor.clone() for name, tensor in start.items()}
    settings = {"optimizer_state": "keep", "proximal_mu": 0.1}
    first = train(model, digits, digits.train(0), start, work(**settings))
    state = {name: tensor.clone() for name, tensor in first.optimizer.items()}
    tensors = {name: tensor.clone() for name, tensor in first.tensors.items()}
    train(model, digits, digits.train(0), first.tensors, work(2, **settings), first.optimizer)
    assert differs(start, before) == 0.0
    assert differs(first.optimizer, state) == 0.0 and differs(first.tensors, tensors) == 0.0


def test_training_b_alone_leaves_a_bit_identical(
    model: ResidentModel, digits: Task, start: Tensors
):
    trained = train(model, digits, digits.train(0), start, work(factors="B")).tensors
    assert not any("lora_A" in name for name in trained)
    assert {parse_factor(name) is None for name in trained} == {True, False}  # extras train too
    left = model.read()
    for name, tensor in start.items():
        assert torch.equal(left[name], tensor) == ("lora_A" in name)


class Watched(Digits):
    """The digits on a base with batch normalisation; notes which parameters want a gradient."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.wanted: set[str] = set()

    def load_base(self) -> nn.Module:
        base = super().load_base()
        base.add_module("norm", nn.BatchNorm1d(2))
        return base

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.wanted = {n for n, p in model.named_parameters() if p.requires_grad}
        model.get_submodule("base_model.model.norm")(torch.randn(8, 2))
        return super().loss(model, batch)


def test_only_what_trains_gets_a_gradient_and_no_statistics_are_gathered(
    tiny: Config, start: Tensors
):
    task = Watched(tiny)
    model = ResidentModel(task, tiny)
    frozen = model.frozen_digest()
    train(model, task, task.train(0), start, work(factors="B"))
    assert len(task.wanted) == 12 + 2 and not any("lora_A" in name for name in task.wanted)
    assert model.frozen_digest() == frozen
    train(model, task, task.train(0), start, work())
    assert len(task.wanted) == 24 + 2


# What ends a client's work


class Cut(Digits):
    """The digits with a loss that the factors have no part in."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        head = next(p for n, p in model.named_parameters() if "classifier" in n and p.requires_grad)
        return head.square().sum()


class Broken(Digits):
    """The digits with a loss that is infinite from the second batch on."""

    calls = 0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.calls += 1
        return super().loss(model, batch) * (1.0 if self.calls == 1 else float("inf"))


def test_a_loss_without_the_factors_is_found_after_the_first_step(
    model: ResidentModel, tiny: Config, start: Tensors
):
    task = Cut(tiny)
    with pytest.raises(RunError, match="no LoRA factor moved after the first step") as e:
        train(model, task, task.train(0), start, work())
    assert "adapter.targets" in e.value.remedy
    with pytest.raises(RunError, match="of round 3"):
        train(model, task, task.train(0), start, work(round=3))


def test_an_optimizer_on_stale_tensors_is_found(
    model: ResidentModel, digits: Task, start: Tensors, monkeypatch: pytest.MonkeyPatch
):
    # What moving a model after PEFT was attached does: losses and gradients look as ever.
    def stale(parameters: Mapping[str, nn.Parameter], *_: Any) -> Any:
        copies = [copy.deepcopy(parameter) for parameter in parameters.values()]
        return torch.optim.SGD([{"params": copies, "multiplier": 1.0}], lr=0.1)

    monkeypatch.setattr("client.trainer.make_optimizer", stale)
    with pytest.raises(RunError, match="no LoRA factor moved"):
        train(model, digits, digits.train(0), start, work())


def test_a_step_too_small_for_float32_late_in_the_run_is_no_failure(
    model: ResidentModel, digits: Task, start: Tensors
):
    start = {name: tensor + 0.1 for name, tensor in start.items()}
    tiny_step = work(round=3, optimizer="sgd", lr=1e-12)
    trained = train(model, digits, digits.train(0), start, tiny_step).tensors
    assert differs(trained, start) == 0.0


def test_a_loss_that_is_not_finite_is_an_error_with_a_remedy(
    model: ResidentModel, tiny: Config, start: Tensors
):
    task = Broken(tiny)
    with pytest.raises(RunError, match="diverged in round 1: the loss is nan") as error:
        train(model, task, task.train(0), start, work())
    assert "Lower train.lr (now 0.01)" in error.value.remedy
    healthy = Digits(tiny)  # the next client finds the model as ever
    assert math.isfinite(train(model, healthy, healthy.train(1), start, work(client="1")).loss)


def test_a_missing_tensor_is_refused_since_anothers_would_be_left(
    model: ResidentModel, digits: Task, start: Tensors
):
    name = next(n for n in start if parse_factor(n) is None)
    part = {n: t for n, t in start.items() if n != name}
    with pytest.raises(RunError, match=f"to train from lacks {name}"):
        train(model, digits, digits.train(0), part, work())
    with pytest.raises(ModelError, match="has shape"):
        train(model, digits, digits.train(0), start | {name: torch.zeros(1)}, work())


def test_a_client_without_examples_says_so(model: ResidentModel, digits: Task, start: Tensors):
    class Nothing:
        def __len__(self) -> int:
            return 0

        def batch(self, indices: np.ndarray) -> Batch:
            raise AssertionError

    with pytest.raises(RunError, match="client 0 has no training examples"):
        train(model, digits, Nothing(), start, work())


def test_a_client_with_fewer_examples_than_a_batch_trains_on_all(
    model: ResidentModel, digits: Task, start: Tensors
):
    class Three:
        def __len__(self) -> int:
            return 3

        def batch(self, indices: np.ndarray) -> Batch:
            assert sorted(indices) == [0, 1, 2]
            return digits.train(0).batch(indices)

    assert train(model, digits, Three(), start, work()).steps == STEPS
