"""What training will take, against what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_llama
from torch import Tensor
from torch.nn import functional

from client.per_example import PerExampleGradients
from fedgraft.config import Config
from fedgraft.memory_estimate import MemoryEstimate, _Watch, advice, estimate
from fedgraft.quantization import stored_bytes
from fedgraft.resident_model import ResidentModel, load_task

ROWS, LENGTH = 6, 48
COMBINATIONS: list[dict[str, Any]] = [
    {},
    {"model.gradient-checkpointing": True},
    {"model.dtype": "bfloat16"},
    {"model.quantization": "int8"},
    {"model.quantization": "nf4"},
    {"model.quantization": "nf4", "model.double-quantization": False},
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    return save_llama(folder, num_key_value_heads=1, tie_word_embeddings=False)


def config(base: Path, **settings: Any) -> Config:
    fixed = {
        "task.name": "causal-lm",
        "task.max-length": LENGTH,
        "model.base": str(base),
        "model.device": "cpu",
        "train.batch-size": ROWS,
        "threads": 1,
    }
    return Config().with_overrides(fixed | settings)


def kept(model: ResidentModel) -> int:
    """The bytes that autograd keeps of a padded batch of the largest shape."""
    weights = (*model.model.parameters(), *model.model.buffers())
    own = {tensor.untyped_storage()._cdata for tensor in weights}
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    ids = torch.full((ROWS, LENGTH), 5)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    model.train_mode()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("settings", COMBINATIONS, ids=lambda s: " ".join(map(str, s.values())))
def test_the_estimate_is_what_is_taken(llama: Path, settings: dict[str, Any]) -> None:
    chosen = config(llama, **settings)
    task = load_task(chosen)
    found = estimate(task, chosen)
    assert found is not None
    model = ResidentModel(task, chosen)
    trained = sum(parameter.numel() for parameter in model.parameters.values())
    held = stored_bytes(model.model) - 4 * trained
    assert found.base == pytest.approx(held, rel=0.01, abs=64)
    assert found.adapter == trained * (4 + 4 + 8)
    assert found.activations == pytest.approx(kept(model), rel=0.02)
    assert found.sequence == f"{ROWS} x {LENGTH} tokens"


def test_fewer_examples_and_fewer_activations_take_less(llama: Path) -> None:
    def total(**settings: Any) -> int:
        chosen = config(llama, **settings)
        found = estimate(load_task(chosen), chosen)
        assert found is not None
        return found.activations + found.workspace

    whole = total()
    assert total(**{"train.micro-batch": 2}) < whole / 2
    assert total(**{"model.gradient-checkpointing": True}) < whole


@pytest.mark.parametrize("settings", [{}, {"adapter.rank": 2}, {"model.dtype": "bfloat16"}])
def test_private_training_keeps_every_examples_gradient(
    llama: Path, settings: dict[str, Any]
) -> None:
    """Beside the forward pass: gradients by outputs, and after it inputs and own gradients."""
    plain = config(llama, **settings)
    private = plain.with_overrides(
        {"privacy.mode": "example", "privacy.noise-multiplier": 1.0, "train.micro-batch": ROWS}
    )
    task = load_task(private)
    before, found = estimate(task, plain), estimate(task, private)
    assert before is not None and found is not None
    model = ResidentModel(task, private)
    watched = PerExampleGradients(model.model, model.parameters)
    ids = torch.full((ROWS, LENGTH), 5)
    with watched.watching():
        logits = model.model(input_ids=ids, use_cache=False).logits.float()
        functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        uses = [use for layer in watched._layers for use in layer.uses]
        inputs = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x, _ in uses}
        outputs = sum(g.numel() * g.element_size() for _, g in uses)
    trained = sum(parameter.numel() for parameter in model.parameters.values())
    after = sum(inputs.values()) + 4 * ROWS * trained  # no layer is large enough for a ghost
    assert found.activations == max(before.activations, after) + outputs
    assert found.adapter == trained * (4 + 4 + 8 + 8)
    eight = estimate(task, private.with_overrides({"model.quantization": "int8"}))
    assert eight is not None and eight.sequence == f"1 x {LENGTH} tokens"


def test_the_smaller_of_gradients_and_gram_matrices_is_counted() -> None:
    """By hand: three vectors of 4 numbers into 50; then three texts of 11 such vectors."""
    layer = torch.nn.Linear(4, 50, bias=False)
    with _Watch(layer) as watch:
        layer(torch.zeros(3, 4))  # an example's gradient is 200 numbers, its two matrices 2
    assert (watch.inputs, watch.outputs) == (4 * 12, 4 * 150)
    assert watch.gradients == 8 * (12 + 150 + 2 * 3)
    with _Watch(layer) as watch:
        layer(torch.zeros(3, 11, 4))  # the matrices are 242
    assert watch.gradients == 4 * 3 * 200


def test_it_says_where_memory_goes_and_what_would_help(llama: Path) -> None:
    tight = MemoryEstimate(
        parameters=7_000_000_000,
        base=13_500_000_000,
        adapter=640_000_000,
        activations=900_000_000,
        workspace=300_000_000,
        free=8_000_000_000,
        where="cuda",
        sequence="4 x 512 tokens",
    )
    assert not tight.fits
    assert str(tight) == (
        "Training will take about 15.3 GB of the 8.0 GB free on cuda: base 13.5 GB, adapter and "
        "optimizer 0.6 GB, activations 1.2 GB (4 x 512 tokens)."
    )
    words = advice(tight, config(llama))
    for key in ("quantization=nf4", "dtype=bfloat16", "gradient-checkpointing", "micro-batch=3"):
        assert key in words
    settled = {"model.quantization": "nf4", "model.dtype": "bfloat16", "train.batch-size": 1}
    assert advice(tight, config(llama, **settled)) == (
        "That is more than is free. Set model.gradient-checkpointing=true, task.max-length=24, or "
        "choose a smaller base."
    )


def test_advice_where_nothing_is_left_to_set(llama: Path) -> None:
    tight = MemoryEstimate(9, 8, 4, 2, 2, 1, "mps", "1 examples")
    tried = {
        "model.dtype": "bfloat16",
        "model.gradient-checkpointing": True,
        "train.batch-size": 1,
    }
    assert advice(tight, config(llama, **tried)) == (
        "That is more than is free. Choose a smaller base."
    )


def test_a_task_without_structure_has_no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(Config())
    monkeypatch.setattr(task, "structure", lambda: None)
    assert estimate(task, Config()) is None
