"""Quantised bases: 8-bit and 4-bit linear layers by bitsandbytes, on the CPU and on CUDA.

INT8 is LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), NF4 is QLoRA's 4-bit NormalFloat, by
default with its block scales quantised again (Dettmers et al. 2023, arXiv:2305.14314). Output
layers, layers that train whole and layers smaller than one block stay as they are.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedgraft.adapter import natural_order
from fedgraft.config import ModelConfig
from fedgraft.errors import ModelError

BLOCK = 64
"""Weights that share a scale in NF4; a layer with fewer is not worth one, and some fail."""
_SOURCE = "_fedgraft_source_digest"
_LIBRARY = "bitsandbytes"


def describe(settings: ModelConfig) -> str:
    """Say how a base is quantised, as its identity holds it: none, int8, nf4 or nf4-double."""
    if settings.quantization == "nf4" and settings.double_quantization:
        return "nf4-double"
    return settings.quantization


def check_device(settings: ModelConfig, device: torch.device) -> None:
    """Refuse a device that bitsandbytes has no kernels for.

    Raises:
        ModelError: the base is to be quantised, and the device is neither a CPU nor a CUDA GPU.
    """
    if settings.quantization != "none" and device.type not in ("cpu", "cuda"):
        raise ModelError(
            f"model.quantization is {settings.quantization!r}, which bitsandbytes cannot do on "
            f"{device.type}",
            'Set model.quantization to "none", or model.device to "cpu" or "cuda".',
        )


def loading_options(
    settings: ModelConfig, device: torch.device, left: Iterable[str]
) -> dict[str, Any]:
    """Return what makes transformers' `from_pretrained` quantise while it loads.

    Weights are quantised one by one as they are read, so that the whole base never lies in memory.

    Args:
        settings: `model.quantization` other than "none", and its options.
        device: where the layers are to be.
        left: names of modules that stay as they are.
    """
    from transformers import BitsAndBytesConfig

    how: dict[str, Any] = {"load_in_8bit": True}
    if settings.quantization == "nf4":
        how = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": settings.double_quantization,
            "bnb_4bit_compute_dtype": getattr(torch, settings.dtype),
        }
    made: Any = BitsAndBytesConfig
    return {
        "quantization_config": made(**how, llm_int8_skip_modules=list(left)),
        "device_map": {"": device},
    }


def unquantised_modules(model: nn.Module, trained: Iterable[str]) -> dict[str, str]:
    """Return the linear layers of a base that quantisation leaves as they are, and why, by name.

    Args:
        model: the base's structure; it may be without weights.
        trained: modules that are trained whole.
    """
    whole = tuple(f".{name}." for name in trained)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if any(part in f".{name}." for part in whole):
            left[name] = "is trained whole"
        elif module is output:
            left[name] = "is the output layer"
        elif module.in_features * module.out_features < BLOCK:
            left[name] = f"has fewer than {BLOCK} weights"
    return left


def quantised_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the quantised layers of a model by name, in stable order; none without any."""
    if not any(type(module).__module__.startswith(_LIBRARY) for module in model.modules()):
        return {}
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    kinds = (Linear4bit, Linear8bitLt)
    found = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: found[name] for name in sorted(found, key=natural_order)}


def mixes_examples(model: nn.Module) -> bool:
    """Whether what a quantised layer makes of one example depends on the others in its batch.

    LLM.int8() computes a feature in half precision if it is large in any row, and those of others
    are rows, too.
    """
    states = (getattr(module, "state", None) for module in quantised_modules(model).values())
    return any(getattr(state, "threshold", 0.0) > 0.0 for state in states)


def keep_weights_as_stored(model: nn.Module) -> None:
    """Stop 4-bit layers from rewriting their weights when they are first evaluated on a CPU.

    On CPUs with bfloat16 instructions bitsandbytes repacks a layer in place, for widths that are a
    multiple of 32 only, and rounds its scales: it computes something else from then on than on
    other machines, and gives no gradients.
    """
    # Which would tell at every product in 8 bits that it is computed in half precision.
    logging.getLogger(f"{_LIBRARY}.autograd._functions").setLevel(logging.ERROR)
    for module in quantised_modules(model).values():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 # typed as a module


def remember_source(model: nn.Module, digest: str) -> None:
    """Note on a quantised model what it was made of (`digest_files`)."""
    setattr(model, _SOURCE, digest)


def source_of(model: nn.Module) -> str | None:
    """Return what `remember_source` noted; None for a model that is not quantised."""
    digest: str | None = getattr(model, _SOURCE, None)
    return digest


def digest_files(files: Iterable[Path]) -> str:
    """Return a SHA-256 over the tensors of safetensors files, as they are stored, by name.

    How they are spread over files changes nothing.

    Raises:
        ModelError: a file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    where: dict[str, Path] = {}
    total = hashlib.sha256()
    try:
        for path in files:
            with safe_open(path, framework="pt") as file:
                where |= dict.fromkeys(file.keys(), path)
        for name in sorted(where):
            with safe_open(where[name], framework="pt") as file:
                hash_tensor(total, name, file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"a base's weights cannot be read: {error}", "Download it again."
        ) from None
    return total.hexdigest()


def hash_tensor(total: Any, name: str, tensor: Tensor) -> None:
    """Add a tensor's name, type, shape and bytes to a hash."""
    total.update(f"\x1f{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1f".encode())
    total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def left_as_they_are(left: Mapping[str, str]) -> str:
    """Say in a sentence which layers are not quantised, and why; at most three names a reason."""
    by_reason: dict[str, list[str]] = {}
    for name, why in left.items():
        by_reason.setdefault(why, []).append(name)
    parts = []
    for why, names in by_reason.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        parts.append(f"{', '.join(names[:3])}{more} ({why})")
    return f"Not quantised: {'; '.join(parts)}." if parts else ""


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights and buffers, with the scales of quantised ones."""
    total = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    for module in quantised_modules(model).values():
        total += sum(t.numel() * t.element_size() for t in _scales(module))
    return total


def _scales(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors beside a quantised layer's weight that it is decoded with."""
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        yield from (t for t in state.as_dict(packed=True).values() if isinstance(t, Tensor))
    scale = getattr(weight, "SCB", None)
    if scale is None and hasattr(module, "state"):
        scale = getattr(module.state, "SCB", None)
    if scale is not None:
        yield scale
