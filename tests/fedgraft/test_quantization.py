"""Quantised bases: what is quantised, who it is, and that training on it is plain training."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_bert, save_llama
from torch import nn
from torch.nn import functional

from fedgraft import quantization
from fedgraft.base import hash_base
from fedgraft.config import Config
from fedgraft.errors import ModelError
from fedgraft.resident_model import ResidentModel, load_task
from fedgraft.tasks.base_models import load_model, weight_files
from fedgraft.tasks.task import Task

KINDS = ("int8", "nf4")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), tie_word_embeddings=False)


def config(base: Path | None = None, **model: Any) -> Config:
    settings = {f"model.{key}": value for key, value in model.items()}
    if base is not None:
        settings |= {"model.base": str(base), "task.name": "causal-lm"}
    return Config().with_overrides({"model.device": "cpu", "threads": 1, **settings})


def digits(**model: Any) -> tuple[Task, ResidentModel]:
    chosen = config(**model)
    task = load_task(chosen)
    return task, ResidentModel(task, chosen)


def load(base: Path, **model: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return load_model(AutoModelForCausalLM, config(base, **model))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "none"),
        ({"quantization": "int8"}, "int8"),
        ({"quantization": "nf4"}, "nf4-double"),
        ({"quantization": "nf4", "double-quantization": False}, "nf4"),
    ],
)
def test_how_a_base_is_quantised_in_a_word(settings: dict[str, Any], words: str) -> None:
    assert quantization.describe(config(**settings).model) == words


def test_output_trained_and_small_layers_stay_as_they_are() -> None:
    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(8, 8)
            self.small = nn.Linear(7, 9)
            self.head = nn.Linear(8, 20)
            self.out = nn.Linear(8, 30)
            self.norm = nn.LayerNorm(8)

        def get_output_embeddings(self) -> nn.Module:
            return self.out

    assert quantization.unquantised_modules(Base(), ["head"]) == {
        "small": "has fewer than 64 weights",
        "head": "is trained whole",
        "out": "is the output layer",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_between_are_quantised_and_the_rest_named(
    kind: str, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="fedgraft"):
        model = load(llama, quantization=kind)
    names = set(quantization.quantised_modules(model))
    assert len(names) == 2 * 7
    assert all(name.startswith("model.layers.") for name in names)
    assert type(model.get_submodule("lm_head")) is nn.Linear
    assert "Not quantised: lm_head (is the output layer)." in caplog.text


def test_what_is_not_quantised_is_said_in_a_sentence() -> None:
    left = {f"layer.{k}": "has fewer than 64 weights" for k in range(5)} | {"head": "is trained"}
    assert quantization.left_as_they_are(left) == (
        "Not quantised: layer.0, layer.1, layer.2 and 2 more (has fewer than 64 weights); "
        "head (is trained)."
    )
    assert quantization.left_as_they_are({}) == ""


def test_an_encoders_head_is_not_quantised(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    settings = config(save_bert(tmp_path), quantization="nf4")
    model = load_model(AutoModelForSequenceClassification, settings, heads=("classifier",))
    assert type(model.get_submodule("classifier")) is nn.Linear
    assert "bert.pooler.dense" in quantization.quantised_modules(model)


def test_bytes_of_a_quantised_layer() -> None:
    """By hand: a nibble a weight, a float32 scale for 64 of them, and NF4's own 16 values."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    layer = Linear4bit(128, 32, bias=False, quant_type="nf4", compress_statistics=False)
    layer.weight = Params4bit(
        torch.randn(32, 128),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=False,
        module=layer,
    )
    layer.to("cpu")
    state = layer.weight.quant_state.as_dict(packed=True)
    words = state["quant_state.bitsandbytes__nf4"].numel()  # bitsandbytes' own note
    held = quantization.stored_bytes(nn.Sequential(layer))
    assert held == 32 * 128 // 2 + 4 * 32 * 128 // 64 + 4 * 16 + words


# Who it is


def test_the_identity_holds_source_and_settings_and_not_packed_bytes(llama: Path) -> None:
    plain = hash_base(load(llama))
    model = load(llama, quantization="nf4")
    before = hash_base(model, "nf4-double")
    assert hash_base(load(llama, quantization="nf4"), "nf4-double") == before
    assert len({plain, before, hash_base(model, "nf4"), hash_base(model, "int8")}) == 4

    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    with torch.no_grad():
        layer.weight.data += 1
        layer.weight.quant_state.absmax += 1
    assert hash_base(model, "nf4-double") == before

    with torch.no_grad():
        model.get_parameter("model.norm.weight").add_(1.0)  # stored as it is
    assert hash_base(model, "nf4-double") != before


def test_another_source_is_another_base(llama: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path, tie_word_embeddings=False)
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] += 1e-4  # which quantisation may not even show
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    hashes = {hash_base(load(base, quantization="nf4"), "nf4") for base in (llama, other)}
    assert len(hashes) == 2


def test_how_a_base_lies_on_disk_is_not_who_it_is(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sharded = save_llama(tmp_path, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(llama)
    (sharded / "model.safetensors").unlink()
    model.save_pretrained(sharded, max_shard_size="4KB")
    files = weight_files(config(sharded))
    assert len(files) > 1
    one = weight_files(config(llama))
    assert quantization.digest_files(files) == quantization.digest_files(one)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"no tensors here")
    with pytest.raises(ModelError, match="cannot be read"):
        quantization.digest_files([path])


# What it computes


def dense(model: nn.Module) -> nn.Module:
    """The same model with every quantised layer decoded into an ordinary one."""
    from peft.utils.integrations import dequantize_module_weight

    made = copy.deepcopy(model)
    for name in quantization.quantised_modules(model):
        quantised: Any = model.get_submodule(name)
        layer = nn.Linear(quantised.in_features, quantised.out_features, quantised.bias is not None)
        with torch.no_grad():
            layer.weight.copy_(dequantize_module_weight(quantised))
            if quantised.bias is not None:
                layer.bias.copy_(quantised.bias)
        parent, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(parent), leaf, layer)
    return made


def test_four_bits_compute_what_they_decode_to_trained_or_evaluated(llama: Path) -> None:
    model = load(llama, quantization="nf4")
    ids = torch.arange(4, 24)[None]
    expected = dense(model)(input_ids=ids).logits
    source = load(llama)(input_ids=ids).logits
    assert not torch.allclose(expected, source, atol=1e-2)  # it is quantised indeed
    for _ in range(2):
        with torch.inference_mode():
            evaluated = model.eval()(input_ids=ids).logits
        trained = model.train()(input_ids=ids).logits
        assert torch.allclose(evaluated, expected, atol=1e-5)
        assert torch.allclose(trained, expected, atol=1e-5)


def test_weights_are_not_repacked_where_the_cpu_could(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.nn import modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    model = load(llama, quantization="nf4")
    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.support_avx512bf16_for_cpu is False
    with torch.inference_mode():
        model.eval()(input_ids=torch.arange(4, 24)[None])
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_adapter_are_those_of_the_decoded_base(kind: str) -> None:
    task, model = digits(quantization=kind)
    model.take(model.initial_adapter(0))
    with torch.no_grad():
        for parameter in model.parameters.values():
            parameter.add_(0.01 * torch.randn_like(parameter))
    batch = task.train(0).batch(torch.arange(8).numpy())
    model.model.train()
    plain = decoded_peft(model.model)
    gradients = []
    for net in (model.model, plain):
        logits = net(pixel_values=batch["pixel_values"]).logits
        functional.cross_entropy(logits, batch["labels"]).backward()
        gradients.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    ours, theirs = gradients
    assert ours.keys() == theirs.keys()
    assert len(ours) > 20
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-4, atol=1e-6), name


def decoded_peft(model: nn.Module) -> nn.Module:
    """A PEFT model whose quantised base layers are decoded; the factors stay."""
    from peft.utils.integrations import dequantize_module_weight

    made = copy.deepcopy(model)
    for name, quantised in quantization.quantised_modules(model).items():
        layer: Any = quantised
        weight = dequantize_module_weight(layer).detach().clone()
        bias = None if layer.bias is None else layer.bias.detach().clone()
        made.get_submodule(name).forward = (  # type: ignore[method-assign]
            lambda x, weight=weight, bias=bias: functional.linear(x, weight.to(x.dtype), bias)
        )
    return made


def test_the_whole_base_on_a_quantised_digits_federation_is_left_as_it_was() -> None:
    task, model = digits(quantization="nf4")
    before = model.frozen_digest()
    model.evaluate(task, model.initial_adapter(0), task.validation())
    model.train_mode()
    batch = task.train(0).batch(torch.arange(4).numpy())
    task.loss(model.model, batch).backward()
    assert model.frozen_digest() == before


# What is refused


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot do on mps"):
        quantization.check_device(config(quantization="nf4").model, torch.device("mps"))
    quantization.check_device(config().model, torch.device("mps"))


def test_a_base_of_which_nothing_can_be_quantised_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = config(quantization="nf4")
    task = load_task(chosen)
    monkeypatch.setattr(task, "load_base", lambda: nn.Sequential(nn.Conv2d(1, 2, 3)))
    with pytest.raises(ModelError, match="no linear layer that can be quantised"):
        ResidentModel(task, chosen)
