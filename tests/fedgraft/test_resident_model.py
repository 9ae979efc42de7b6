"""The resident model: frozen weights that never change, and adapters swapped in place."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.trainer import Assignment, train
from fedgraft.adapter import Adapter, LoraLayer, natural_order, parse_factor
from fedgraft.base import hash_base
from fedgraft.config import Config
from fedgraft.devices import pick_device
from fedgraft.errors import ConfigError, ModelError
from fedgraft.initialisation import derive_A
from fedgraft.resident_model import (
    SMALL_MODEL,
    ResidentModel,
    default_threads,
    load_task,
    resident_model,
    resident_task,
)
from fedgraft.tasks.task import Batch, Examples, Task, TensorExamples


class Net(nn.Module):
    """A linear layer behind batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.norm(x)))
        return out


class Tiny(Task):
    """A task whose base has something to remember."""

    name: ClassVar[str] = "tiny"
    metric = "loss"
    direction: Literal["max", "min"] = "min"
    extras = ("head",)
    evaluation_batch = 4

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.default_targets = ["body"]

    def load_base(self) -> nn.Module:
        base = Net()
        with torch.no_grad():
            for number, parameter in enumerate(base.parameters()):
                parameter.fill_(0.1 * (number + 1))
        return base

    def train(self, client: int | None = None) -> Examples:
        return TensorExamples({"x": torch.arange(30.0).reshape(10, 3)})

    validation = train

    def test(self) -> Examples:
        return self.train()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(batch["x"]).square().sum()
        return loss

    def count(self, batch: Batch) -> int:
        return len(batch["x"])

    def measure(self, model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
        self.seen = [len(batch["x"]) for batch in batches]
        return {"loss": float(model.training)}


CONFIG = Config().with_overrides({"model.device": "cpu", "adapter.rank": 2, "adapter.alpha": 3.0})


@pytest.fixture
def small() -> ResidentModel:
    return ResidentModel(Tiny(CONFIG), CONFIG)


# Loading and reading


def test_what_is_loaded_is_read(small: ResidentModel):
    tensors = {
        name: torch.full(parameter.shape, float(k))
        for k, (name, parameter) in enumerate(small.parameters.items())
    }
    frozen = small.frozen_digest()
    small.load(tensors)
    assert all(torch.equal(small.read()[name], tensors[name]) for name in tensors)
    assert small.adapter().digest() == Adapter.from_tensors(tensors, 1.5).digest()
    assert small.adapter().scalings == {"base_model.model.body": 1.5}
    assert small.frozen_digest() == frozen
    assert list(small.parameters) == sorted(small.parameters, key=natural_order)


def test_what_is_read_is_a_copy(small: ResidentModel):
    before = small.read()
    for tensor in small.read().values():
        tensor.add_(1.0)
    assert all(torch.equal(small.read()[name], before[name]) for name in before)


def test_a_tensor_that_does_not_fit_is_refused(small: ResidentModel):
    name = "base_model.model.body.lora_A.weight"
    with pytest.raises(ModelError, match=rf"{name}' has shape \(4, 3\); this model's is \(2, 3\)"):
        small.load({name: torch.zeros(4, 3)})
    with pytest.raises(ModelError, match=r"'other' has shape \(1,\); this model's is None"):
        small.load({"other": torch.zeros(1)})


def test_the_initial_adapter_changes_nothing(model: ResidentModel, digits: Task):
    pixels = digits.test().batch(np.arange(8))["pixel_values"]
    adapter = model.initial_adapter(3)
    model.load({n: t + 1.0 for n, t in adapter.tensors().items()})  # somebody trained before
    model.load(model.initial_adapter(3).tensors())
    model.model.eval()
    with torch.no_grad():
        ours = model.model(pixel_values=pixels).logits
        base = digits.load_base()(pixel_values=pixels).logits
    assert torch.equal(ours, base)
    assert not any(layer.B.any() for layer in adapter.layers.values())
    assert model.initial_adapter(3).digest() == adapter.digest()
    assert model.initial_adapter(4).digest() != adapter.digest()


def test_a_is_derived_from_seed_and_layer_alone(model: ResidentModel):
    derived = model.derived_A(7)
    assert len(derived) == 12
    for name, tensor in derived.items():
        bound = tensor.shape[1] ** -0.5
        assert tensor.dtype == torch.float32 and tensor.abs().max() <= bound
        assert tensor.std() == pytest.approx(bound / 3**0.5, rel=0.15)  # of a uniform, 512 draws
        assert torch.equal(tensor, model.initial_adapter(7).tensors()[name])
    two = list(derived.values())[:2]
    assert not torch.equal(*two)
    # A smaller rank takes the first rows of a larger one's.
    assert torch.equal(derive_A("q", (2, 64), 7), derive_A("q", (8, 64), 7)[:2])
    # Portable: frozen numbers, from the snippet in test_seeds.py divided by sqrt(4).
    frozen = [0.10660630, -0.07929953, -0.31428484]
    assert derive_A("q", (2, 4), 7)[0, :3].tolist() == pytest.approx(frozen, abs=1e-8)


# The base's identity


def test_the_hash_is_of_names_dtypes_shapes_and_bytes():
    class One(nn.Module):
        def __init__(self, values: Tensor) -> None:
            super().__init__()
            self.w = nn.Parameter(values, requires_grad=False)

    values = torch.tensor([1.0, -2.0])
    text = b"quantization=none" + b"\x1fw\x1ftorch.float32\x1f(2,)\x1f" + values.numpy().tobytes()
    assert hash_base(One(values)) == hashlib.sha256(text).hexdigest()
    others = [values.bfloat16(), values.reshape(2, 1), torch.tensor([1.0, 2.0]), values[:1]]
    hashes = {hash_base(One(other)) for other in others} | {hash_base(One(values))}
    assert len(hashes) == 5
    assert hash_base(One(values), "nf4") not in hashes


def test_the_hash_is_the_bases_and_not_the_adapters(model: ResidentModel, digits: Task):
    assert model.base_hash == hash_base(digits.load_base())
    narrow = digits.config.with_overrides({"adapter.rank": 2, "seed": 9})
    assert ResidentModel(digits, narrow).base_hash == model.base_hash


# Modes


def test_training_leaves_batch_normalisation_as_the_base_has_it(small: ResidentModel):
    frozen = small.frozen_digest()
    small.train_mode()
    small.model(torch.randn(8, 3)).sum().backward()
    assert small.model.training
    assert small.frozen_digest() == frozen
    small.model.train()
    small.model(torch.randn(8, 3))
    assert small.frozen_digest() != frozen  # the digest would have seen it


def test_an_evaluation_is_in_eval_mode_and_without_gradients(small: ResidentModel):
    small.train_mode()
    task = Tiny(CONFIG)
    measured = small.evaluate(task, small.initial_adapter(0), task.test())
    assert measured == {"loss": 0.0, "examples": 10.0}  # model.training was False
    assert task.seen == [4, 4, 2]
    small.model(torch.ones(2, 3)).sum().backward()  # and afterwards it trains as before
    assert all(p.grad is not None for p in small.parameters.values())


def test_an_evaluation_takes_the_batch_size_of_the_config(small: ResidentModel):
    task = Tiny(CONFIG.with_overrides({"evaluate.batch-size": 7}))
    small.evaluate(task, small.initial_adapter(0), task.test())
    assert task.seen == [7, 3]


def test_an_evaluation_does_not_depend_on_the_batch_size(model: ResidentModel, digits: Task):
    few = resident_task(digits.config.with_overrides({"evaluate.batch-size": 50}))
    adapter = model.initial_adapter(0)
    one = model.evaluate(digits, adapter, digits.validation())
    other = model.evaluate(few, adapter, digits.validation())
    assert one["accuracy"] == other["accuracy"]
    # sums of 360 float32 losses, cut at other places
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_a_batch_stays_where_it_is_on_a_cpu(small: ResidentModel):
    batch = {"x": torch.zeros(2)}
    assert small.to_device(batch) is batch


# Resources


def test_threads(small: ResidentModel):
    assert default_threads(SMALL_MODEL - 1) == 1 and default_threads(SMALL_MODEL) >= 1
    assert small.threads == 1
    two = ResidentModel(Tiny(CONFIG), CONFIG.with_overrides({"threads": 2}))
    two.use_threads()
    assert torch.get_num_threads() == 2
    small.use_threads()
    assert torch.get_num_threads() == 1


def test_devices():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("banana", "cuda:99"):
        with pytest.raises(ModelError, match=f"model.device '{name}' cannot be used here"):
            pick_device(name)


def test_one_model_is_kept_and_shared_by_configs_that_differ_elsewhere(tiny: Config, digits: Task):
    first = resident_model(digits, tiny)
    same = {"seed": 5, "train.lr": 0.1, "strategy.name": "ffa-lora", "federation.rounds": 99}
    changed = tiny.with_overrides(same)
    assert resident_model(resident_task(changed), changed) is first
    for key, value in {"adapter.rank": 4, "adapter.alpha": 1.0, "adapter.dropout": 0.1}.items():
        other = tiny.with_overrides({key: value})
        assert resident_model(digits, other) is not first
    assert resident_model(digits, tiny) is not first  # it was let go


def test_a_new_run_does_not_start_from_the_last_ones_head(model: ResidentModel):
    first = model.initial_adapter(0)
    model.load({name: tensor + 1.0 for name, tensor in first.tensors().items()})
    assert model.initial_adapter(0).digest() == first.digest()


def test_one_task_serves_equal_configs(tiny: Config):
    assert resident_task(tiny) is resident_task(tiny.with_overrides({"strategy.name": "lora-fair"}))
    assert resident_task(tiny) is not resident_task(tiny.with_overrides({"seed": 1}))
    with pytest.raises(ConfigError, match=r"task\.name is 'digit'.*\n?.*"):
        load_task(tiny.with_overrides({"task.name": "digit"}))


# Targets


def test_targets_that_match_nothing_are_refused_with_candidates(digits: Task):
    config = digits.config.with_overrides({"adapter.targets": ["query"]})
    with pytest.raises(ModelError, match=r"adapter\.targets is \['query'\]") as caught:
        ResidentModel(digits, config)
    assert "here: fc1, fc2, k_proj, o_proj, q_proj, v_proj;" in caught.value.remedy


@pytest.mark.parametrize("wrong", ["nope", "proj", "classifier", "layers.9.fc1"])
def test_every_target_must_match_a_module(wrong: str, digits: Task):
    """Whole names, and ends of dotted ones: PEFT's own matching. A head is trained whole anyway."""
    config = digits.config.with_overrides({"adapter.targets": ["q_proj", wrong, "fc1"]})
    with pytest.raises(ModelError, match=f"no module of the base matches '{wrong}'") as caught:
        ResidentModel(digits, config)
    assert "q_proj" in caught.value.remedy


def test_a_target_may_name_one_layer(digits: Task):
    name = next(n for n, _ in digits.load_base().named_modules() if n.endswith("q_proj"))
    for entry in (name, name.split(".", 1)[1]):
        config = digits.config.with_overrides({"adapter.targets": [entry]})
        factors = [n for n in ResidentModel(digits, config).parameters if "lora_A" in n]
        assert factors == [f"base_model.model.{name}.lora_A.weight"]


@pytest.mark.parametrize("targets", [["q_proj", "fc1"], "all-linear"])
def test_a_rank_above_the_smallest_layers_is_refused_before_it_is_allocated(
    targets: object, digits: Task
):
    """A change of a 64 x 64 weight has rank 64 at most, and may have that."""
    config = digits.config.with_overrides({"adapter.targets": targets, "adapter.rank": 64})
    parameters = ResidentModel(digits, config).parameters
    assert {min(p.shape) for n, p in parameters.items() if "lora" in n} == {64}
    for rank in (65, 10**12):  # of which even one factor would fit no memory
        with pytest.raises(ConfigError, match=r"q_proj is 64 x 64: a change of it") as caught:
            ResidentModel(digits, config.with_overrides({"adapter.rank": rank}))
        assert "Set adapter.rank to at most 64" in caught.value.remedy


def test_targets_and_rank_of_the_config_are_used(digits: Task):
    config = digits.config.with_overrides({"adapter.targets": ["q_proj"], "adapter.rank": 3})
    shapes = {n: tuple(p.shape) for n, p in ResidentModel(digits, config).parameters.items()}
    factors = {n: s for n, s in shapes.items() if "lora" in n}
    assert len(factors) == 4 and set(factors.values()) == {(3, 64), (64, 3)}


def test_rslora_scales_by_the_root(digits: Task):
    config = digits.config.with_overrides({"adapter.type": "rslora", "adapter.rank": 4})
    model = ResidentModel(digits, config)
    assert set(model.scaling.values()) == {8.0}
    # and PEFT computes with the same scaling
    scalings = {m.scaling["default"] for m in model.model.modules() if hasattr(m, "lora_A")}
    assert scalings == {8.0}


def test_a_residual_is_what_has_joined_the_base(digits: Task, model: ResidentModel):
    """The same logits as with W0 + scaling B A written into the base's own weights."""
    adapter = model.initial_adapter(0)
    tensors = {n: t + 0.01 if parse_factor(n) else t for n, t in adapter.tensors().items()}
    adapter = Adapter.from_tensors(tensors, model.scaling)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    residual = {
        name: LoraLayer(normal(3, layer.A.shape[1]), normal(len(layer.B), 3), 0.5)
        for name, layer in list(adapter.layers.items())[::2]
    }
    batch = digits.validation().batch(np.arange(32))
    before = model.frozen_digest()

    def logits() -> Tensor:
        with torch.inference_mode():
            return model.model.eval()(pixel_values=batch["pixel_values"]).logits

    model.take(adapter)
    without = logits()
    model.take(replace(adapter, residual=residual))
    ours = logits()
    assert model.frozen_digest() == before
    model.take(adapter)  # the next adapter has none, and none is left
    assert torch.equal(logits(), without) and not torch.allclose(ours, without)
    weights = {name: model.lora_module(name).base_layer.weight for name in residual}
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                weight += residual[name].product()
        torch.testing.assert_close(ours, logits(), rtol=1e-4, atol=1e-4)
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept[name])


def test_a_smaller_rank_is_trained_as_a_model_of_that_rank_trains(tiny: Config, digits: Task):
    """Padded with zeros in a model of rank 8, or alone in one of rank 4: the same steps."""
    narrow = tiny.with_overrides({"adapter.rank": 4})
    small = ResidentModel(digits, narrow)
    start = small.initial_adapter(0)
    work = Assignment(tiny.train, seed=0, round=1, rounds=3, client="0")
    alone = train(small, digits, digits.train(0), start, work)
    large = ResidentModel(digits, tiny)
    padded = train(large, digits, digits.train(0), start, work)
    assert set(small.scaling.values()) == {4.0} and set(large.scaling.values()) == {2.0}
    for name, tensor in alone.tensors.items():
        assert padded.tensors[name].shape == tensor.shape
        # products of another inner size are summed in another order
        torch.testing.assert_close(padded.tensors[name], tensor, rtol=1e-3, atol=1e-5)
    rest = {name: parameter.detach() for name, parameter in large.parameters.items()}
    assert all(not t[4:].any() for n, t in rest.items() if n.endswith("lora_A.weight"))
    assert all(not t[:, 4:].any() for n, t in rest.items() if n.endswith("lora_B.weight"))
