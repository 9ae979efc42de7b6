"""Where factors start: the numbers of PEFT's data-free initialisations, and what undoes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedgraft.adapter import parse_factor
from fedgraft.errors import ModelError
from fedgraft.initialisation import dense_weight, derive_A, olora, orthogonal, pissa
from fedgraft.resident_model import ResidentModel
from fedgraft.tasks.task import Task


def weight(d_out: int, d_in: int) -> Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0))


def test_gaussian_has_a_standard_deviation_of_one_over_the_rank():
    A = derive_A("layer", (8, 4096), 3, "gaussian")
    assert float(A.std()) == pytest.approx(1 / 8, rel=0.01) and abs(float(A.mean())) < 1e-2
    assert torch.equal(A, derive_A("layer", (8, 4096), 3, "gaussian"))
    assert not torch.equal(A, derive_A("layer", (8, 4096), 4, "gaussian"))
    assert not torch.equal(A, derive_A("other", (8, 4096), 3, "gaussian"))


def test_orthogonal_factors_lie_in_halves_that_are_orthogonal():
    A, B = orthogonal("layer", 6, d_out=10, d_in=7, seed=0)
    assert A.shape == (6, 7) and B.shape == (10, 6)
    assert float((B @ A).abs().max()) < 1e-7 < float(B.norm() * A.norm())
    assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == 3  # half of the rank each
    again = orthogonal("layer", 6, d_out=10, d_in=7, seed=0)
    assert torch.equal(A, again[0]) and torch.equal(B, again[1])


@pytest.mark.parametrize(("d_out", "d_in"), [(9, 5), (5, 9), (6, 6)])
def test_pissa_is_the_leading_part_of_the_svd_in_equal_parts(d_out: int, d_in: int):
    W, s = weight(d_out, d_in), 2.0
    A, B = pissa(W, 3, s)
    U, S, V = torch.linalg.svd(W.double(), full_matrices=False)
    torch.testing.assert_close((s * B @ A).double(), (U[:, :3] * S[:3]) @ V[:3], atol=1e-5, rtol=0)
    share = torch.diag(S[:3] / s).float()  # sqrt(S / s) on both sides
    torch.testing.assert_close(A @ A.T, share, atol=1e-5, rtol=0)
    torch.testing.assert_close(B.T @ B, share, atol=1e-5, rtol=0)


def test_pissa_by_hand():
    """diag(8, 2) at scaling 2: the leading direction is e_1, sqrt(8 / 2) = 2 on both sides."""
    A, B = pissa(torch.diag(torch.tensor([8.0, 2.0])), 1, 2.0)
    assert A.abs().tolist() == [[2.0, 0.0]] and (B @ A).tolist() == [[4.0, 0.0], [0.0, 0.0]]


def test_pissa_of_a_weight_of_a_smaller_rank_is_finite():
    W = torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 4.0))
    A, B = pissa(W, 2, 1.0)
    torch.testing.assert_close(B @ A, W)
    assert not A[1].any() and not B[:, 1].any()


@pytest.mark.parametrize(("d_out", "d_in"), [(9, 5), (5, 9)])
def test_olora_is_the_beginning_of_the_qr_decomposition(d_out: int, d_in: int):
    W = weight(d_out, d_in)
    A, B = olora(W, 3)
    Q, R = torch.linalg.qr(W.double())
    torch.testing.assert_close((B @ A).double(), Q[:, :3] @ R[:3], atol=1e-5, rtol=0)
    torch.testing.assert_close(B.T @ B, torch.eye(3), atol=1e-6, rtol=0)
    assert float(A[:, :3].tril(-1).abs().max()) < 1e-6  # R is upper triangular


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "olora"])
def test_round_0_is_the_base_and_the_factors_are_pefts(init: str, digits: Task):
    """The same products as PEFT's own initialisation; what it takes out of the base stays there."""
    from peft import LoraConfig, get_peft_model

    config = digits.config.with_overrides({"adapter.init": init, "adapter.targets": ["fc1"]})
    model = ResidentModel(digits, config)
    start = model.initial_adapter(0)
    batch = digits.test().batch(np.arange(16))["pixel_values"]
    base = digits.load_base()
    before = model.frozen_digest()
    model.take(start)
    with torch.inference_mode():
        ours, plain = model.model.eval()(pixel_values=batch).logits, base(pixel_values=batch).logits
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    assert model.frozen_digest() == before
    assert bool(start.residual) == (init in ("pissa", "olora"))
    assert any(layer.B.any() for layer in start.layers.values()) == (init != "gaussian")
    if not start.residual:
        return
    kind: Any = init
    theirs = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=16, target_modules=["fc1"], init_lora_weights=kind)
    )
    for name, layer in start.layers.items():
        module = theirs.get_submodule(name)
        product = 2.0 * module.lora_B["default"].weight @ module.lora_A["default"].weight
        torch.testing.assert_close(layer.product(), product.detach(), atol=1e-4, rtol=1e-4)
        taken = -layer.product()
        torch.testing.assert_close(start.residual[name].product(), taken, atol=1e-6, rtol=1e-6)


def test_a_layer_that_is_not_linear_is_named():
    class Wrapped(nn.Module):
        def get_base_layer(self) -> nn.Module:
            return nn.Embedding(3, 2)

    with pytest.raises(ModelError, match="needs linear layers, and emb is a Embedding"):
        dense_weight(Wrapped(), "emb")


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.12), ("int8", 0.02)])
def test_a_quantised_weight_is_dequantised_and_stays(kind: str, error: float):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from peft import LoraConfig, get_peft_model

    W = weight(64, 64)
    if kind == "nf4":
        layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=W.dtype)
        layer.weight = bnb.nn.Params4bit(W.clone(), requires_grad=False, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(W.clone(), requires_grad=False, has_fp16_weights=False)
    model = get_peft_model(nn.ModuleDict({"q": layer.to("cpu")}), LoraConfig(target_modules=["q"]))
    module, x = model.get_submodule("base_model.model.q"), torch.ones(2, 64)
    with torch.inference_mode():
        before = module(x)
    for _ in range(2):  # also after a forward pass, which moves INT8's scales
        found = dense_weight(module, "q")
        assert found.shape == (64, 64) and found.dtype == torch.float32
        assert 0.0 < float((found - W).norm() / W.norm()) < error  # the quantisation's own rounding
        with torch.inference_mode():
            assert torch.equal(module(x), before)


def test_doras_magnitudes_are_the_norms_of_the_bases_rows(digits: Task):
    model = ResidentModel(digits, digits.config.with_overrides({"adapter.type": "dora"}))
    start = model.initial_adapter(0)
    weights = digits.load_base().state_dict()
    found = [name for name in start.extras if name.endswith(".lora_magnitude_vector")]
    assert len(found) == len(start.layers) == 12
    for name in found:
        W = weights[
            name.removeprefix("base_model.model.").replace("lora_magnitude_vector", "weight")
        ]
        torch.testing.assert_close(start.extras[name], W.norm(dim=1), rtol=1e-6, atol=0)
    # and twice the magnitude is twice the layer, whatever the direction
    layer = next(iter(start.layers))
    module, x = model.lora_module(layer), torch.ones(1, 64)
    model.take(start)
    with torch.inference_mode():
        bias = module.base_layer.bias  # type: ignore[union-attr]
        once = module(x) - bias
        doubled = {
            f"{layer}.lora_magnitude_vector": 2.0 * start.extras[f"{layer}.lora_magnitude_vector"]
        }
        model.take(start.with_tensors(doubled))
        torch.testing.assert_close(module(x) - bias, 2.0 * once)
    assert all(parse_factor(name) is None for name in found)
