"""Write adapters as PEFT loads them, with a card, and merged models."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fedgraft.adapter import PREFIX, Adapter, LoraLayer, pad_rank
from fedgraft.adapter_folder import CARD, SETTINGS, WEIGHTS
from fedgraft.errors import ConfigError, ModelError
from fedgraft.files import disk_errors, read_tensors, write_bytes, write_tensors, write_text
from fedgraft.logs import hushed
from fedgraft.resident_model import ResidentModel, load_task
from fedgraft.run_directory import RunDirectory


def write_adapter(folder: Path, adapter: Adapter, model: ResidentModel, card: str) -> None:
    """Write an adapter folder that `PeftModel.from_pretrained` loads on a clean base.

    Raises:
        RunError: the disk is full.
    """
    whole = with_residual_joined(adapter)
    write_tensors(folder / WEIGHTS, whole.tensors())
    settings = json.dumps(_settings(model, whole), indent=2, sort_keys=True)
    write_text(folder / SETTINGS, settings + "\n")
    write_text(folder / CARD, card)


def with_residual_joined(adapter: Adapter) -> Adapter:
    """Return an adapter of a larger rank and no residual that computes the same.

    Each layer is [B, B_res], [A; A_res]. Where all layers had one rank and one scaling they are
    padded with zeros to one rank again; else each has its own.
    """
    if not adapter.residual:
        return adapter
    ranks = {
        name: layer.rank + (adapter.residual[name].rank if name in adapter.residual else 0)
        for name, layer in adapter.layers.items()
    }
    if _is_uniform(adapter):
        ranks = dict.fromkeys(ranks, max(ranks.values()))
    joined: dict[str, LoraLayer] = {}
    for name, layer in adapter.layers.items():
        A, B = layer.A, layer.B
        if (more := adapter.residual.get(name)) is not None:
            A = torch.cat([A, more.A])
            B = torch.cat([B, more.B * (more.scaling / layer.scaling)], dim=1)
        rank = ranks[name]
        joined[name] = LoraLayer(pad_rank(A, rank, 0), pad_rank(B, rank, 1), layer.scaling)
    return Adapter(joined, adapter.extras)


def _is_uniform(adapter: Adapter) -> bool:
    """Whether one rank and one scaling serve all layers."""
    return len({(layer.rank, layer.scaling) for layer in adapter.layers.values()}) <= 1


def _settings(model: ResidentModel, adapter: Adapter) -> dict[str, Any]:
    """Return PEFT's own config of the adapter; its sets are sorted so that equal runs write
    equal files.

    PEFT divides alpha by the rank that the file has (its root, for rsLoRA), so a rank that a
    residual has raised raises alpha, too: the scaling stays. Layers that differ have both by name,
    and where none do the patterns that the run was given go.
    """
    settings = model.peft_config() | {"inference_mode": True}
    ranks = {name: layer.rank for name, layer in adapter.layers.items()}
    if ranks != model.ranks:
        power = 0.5 if settings["use_rslora"] else 1.0
        alphas = {n: layer.scaling * layer.rank**power for n, layer in adapter.layers.items()}
        uniform = _is_uniform(adapter)
        settings["r"] = max(ranks.values())
        settings["lora_alpha"] = max(alphas.values())
        settings["rank_pattern"] = {} if uniform else {_only(n): r for n, r in ranks.items()}
        settings["alpha_pattern"] = {} if uniform else {_only(n): a for n, a in alphas.items()}
    return {key: sorted(v) if isinstance(v, set) else v for key, v in settings.items()}


def _only(layer: str) -> str:
    """Return the key of PEFT's patterns that matches this layer alone."""
    return f"^{re.escape(layer.removeprefix(PREFIX))}"


def read_adapter(folder: Path, model: ResidentModel) -> Adapter:
    """Read an adapter folder to start from.

    Raises:
        ConfigError: it is no adapter folder, or its tensors do not fit the model.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise ConfigError(
            f"adapter.from is {str(folder)!r}, which has no {WEIGHTS}",
            "Name a folder that PEFT or FedGraft wrote.",
        )
    settings = _read_settings(folder / SETTINGS)
    own = (settings.get("lora_alpha", 0), settings.get("r", 1), bool(settings.get("use_rslora")))
    ours = model.peft_config()
    for key, name in (
        ("use_dora", "adapter.type"),
        ("rank_pattern", "adapter.rank-pattern"),
        ("alpha_pattern", "adapter.alpha-pattern"),
    ):
        if settings and (settings.get(key) or None) != (ours.get(key) or None):
            raise ConfigError(
                f"adapter.from was trained with {key} {settings.get(key)}; this run has "
                f"{ours.get(key)}",
                f"Set {name} to the adapter's own.",
            )
    if settings and own != (ours["lora_alpha"], ours["r"], bool(ours["use_rslora"])):
        raise ConfigError(
            f"adapter.from was trained with alpha {own[0]}, rank {own[1]}, rsLoRA {own[2]}; this "
            f"run has {ours['lora_alpha']}, {ours['r']}, {bool(ours['use_rslora'])}",
            "Set adapter.alpha, adapter.rank and adapter.type to the adapter's own.",
        )
    tensors, _ = read_tensors(path)
    wanted = {name: tuple(p.shape) for name, p in model.parameters.items()}
    for name in sorted(wanted.keys() | tensors.keys()):
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != wanted.get(name):
            raise ConfigError(
                f"adapter.from holds {name!r} of shape {found}; this run's is {wanted.get(name)}",
                "Set adapter.rank and adapter.targets to the adapter's own "
                f"(see {folder / SETTINGS}).",
            )
    return Adapter.from_tensors({n: t.float() for n, t in tensors.items()}, model.scaling)


def _read_settings(path: Path) -> dict[str, Any]:
    """Read adapter_config.json; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        settings: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}", "Copy the adapter again.") from None
    return settings


def export_adapter(directory: RunDirectory, to: Path) -> None:
    """Copy a run's adapter folder.

    Raises:
        ConfigError: the run has no adapter yet, or the target is not empty.
        RunError: the disk is full or refuses the write; nothing is left in the target.
    """
    _check_target(directory, to)
    with _whole(to):
        for path in sorted(directory.adapter.iterdir()):
            write_bytes(to / path.name, path.read_bytes())


def export_merged(directory: RunDirectory, to: Path, dtype: str = "float32") -> None:
    """Write the base with the adapter merged into it, as an ordinary model folder.

    The sum W + s B A is taken in float32 of the base as it was published: a run on a quantised
    base, or one in half precision, is merged into the weights that were quantised or rounded for
    it. What prepares the base's inputs (a tokenizer, an image processor) goes with it.

    Args:
        directory: a run that has finished.
        to: a new folder.
        dtype: what the sum is rounded to in the end: "float32" (not at all), "bfloat16" or
            "float16".

    Raises:
        ConfigError: the run has no adapter yet, or the target is not empty.
        ModelError: the base cannot be loaded, or has no `save_pretrained`.
        RunError: the disk is full or refuses the write; nothing is left in the target.
    """
    from peft import PeftModel

    _check_target(directory, to)
    with hushed():
        whole = {
            "model.quantization": "none",
            "model.dtype": "float32",
            "model.attention": None,  # which this machine may not have, and a sum does not need
            "train.packing": False,
        }
        task = load_task(directory.config().with_overrides(whole))
        adapter = str(directory.adapter)
        merged: Any = PeftModel.from_pretrained(task.load_base(), adapter).merge_and_unload()
        if not hasattr(merged, "save_pretrained"):
            raise ModelError(f"a {type(merged).__name__} cannot be saved as a model folder")
        if dtype != "float32":
            merged = merged.to(getattr(torch, dtype))
        with _whole(to):
            for part in (merged, *task.preparation()):
                part.save_pretrained(to)


@contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """Write a new folder inside the block; where that fails, none of it is left.

    Raises:
        RunError: the disk is full or refuses the write.
    """
    there = folder.exists()
    try:
        with disk_errors(folder):
            try:
                yield
            except SafetensorError as error:  # wraps the operating system's
                code = re.search(r"os error (\d+)", str(error))
                raise OSError(int(code[1]) if code else errno.EIO, str(error)) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if there:
            folder.mkdir(exist_ok=True)
        raise


def _check_target(directory: RunDirectory, to: Path) -> None:
    if not (directory.adapter / WEIGHTS).is_file():
        raise ConfigError(
            f"{directory.path} has no adapter yet",
            f"Let it finish: {directory.resume_command()}.",
        )
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to} exists and is not an empty folder", "Choose another --to.")
