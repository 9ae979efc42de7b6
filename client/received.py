"""The final adapter of a run, kept on the client as a PEFT folder.

The server is not trusted: tensors must be finite numbers under PEFT's names for an adapter, and of
PEFT's settings only those are kept that say what an adapter is.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import torch

from fedgraft.adapter import PREFIX, Tensors, from_arrays
from fedgraft.adapter_folder import CARD, SETTINGS, WEIGHTS
from fedgraft.errors import UpdateError
from fedgraft.files import write_tensors, write_text
from fedgraft.messages import FinalAdapter

_LINEAGE = re.compile(r"[0-9a-f]{32}")
_TENSOR = re.compile(re.escape(PREFIX) + r"[\w.\-]{1,300}")
_LONGEST_CARD = 1 << 20
_KEPT = (
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern"),
    *("layers_to_transform", "layers_pattern", "init_lora_weights", "peft_version"),
)
"""Settings without the power to name code that PEFT would import."""


def keep(final: FinalAdapter, folder: Path) -> Path:
    """Write a run's final adapter and return its folder; a later one of the run replaces it.

    Args:
        final: what the server sent.
        folder: where this client keeps such adapters.

    Raises:
        UpdateError: it is no adapter.
        RunError: the disk is full.
    """
    settings, tensors = _settings(final.settings), _tensors(final)
    # A lineage comes from outside; a digest is a safe name, whatever it holds.
    safe = bool(_LINEAGE.fullmatch(final.lineage))
    name = final.lineage if safe else hashlib.sha256(final.lineage.encode()).hexdigest()[:32]
    path = folder / name
    write_tensors(path / WEIGHTS, tensors)
    write_text(path / SETTINGS, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    write_text(path / CARD, final.card[:_LONGEST_CARD])
    return path


def _settings(text: str) -> dict[str, object]:
    try:
        read = json.loads(text)
    except ValueError as error:
        raise UpdateError(f"the final adapter's settings are no JSON: {error}") from None
    if not isinstance(read, dict) or read.get("peft_type") != "LORA":
        raise UpdateError("the final adapter's settings are not those of a LoRA adapter")
    return {key: read[key] for key in _KEPT if key in read}


def _tensors(final: FinalAdapter) -> Tensors:
    tensors = from_arrays(final.arrays)
    for name, tensor in tensors.items():
        if not _TENSOR.fullmatch(name):
            raise UpdateError(f"the final adapter holds {name[:100]!r}, which PEFT has no name for")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise UpdateError(f"the final adapter's {name!r} holds no finite numbers")
    if not tensors:
        raise UpdateError("the final adapter is empty")
    return tensors
