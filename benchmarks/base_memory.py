"""What a base takes in memory, quantised and not, and whether the estimate told so before.

    python benchmarks/base_memory.py                       # TinyLlama-1.1B's shape, 4 GB of disk
    python benchmarks/base_memory.py --shape llama-3.2-1b
    python benchmarks/base_memory.py --quick               # a tiny shape

Weights are random, in bfloat16, and are loaded as any base is. Bytes of weights, buffers and scales
are counted; beside them the estimate made from the structure alone. On a CUDA machine a step of
training is taken too (batch 1 x 512, activation checkpointing), its peak beside the estimate.

Exits with status 1 where NF4 takes more than 0.36 of bfloat16 at TinyLlama's shape, its quantised
layers more than 0.27, or an estimate is off by more than its tolerance: 1% of the base's bytes, 15%
of the peak on CUDA.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fedgraft.config import Config
from fedgraft.devices import peak_memory, pick_device
from fedgraft.logs import hushed
from fedgraft.memory_estimate import MemoryEstimate, estimate
from fedgraft.quantization import quantised_modules, stored_bytes
from fedgraft.resident_model import ResidentModel, load_task
from fedgraft.tasks.task import Task

SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": False,
    },
}
WHOLE, LAYERS = 0.36, 0.27  # of bfloat16's bytes, at TinyLlama's shape
TOLERANCE, PEAK_TOLERANCE = 0.01, 0.15
LENGTH = 512


@dataclass(frozen=True)
class Found:
    """Bytes of one base."""

    kind: str
    stored: int
    layers: int  # the linear layers between embeddings and output
    estimate: MemoryEstimate
    peak: int | None  # of a step of training, on CUDA


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tinyllama-1.1b")
    parser.add_argument("--quick", action="store_true", help="the tiny shape, judging nothing")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    shape = "tiny" if args.quick else args.shape
    with tempfile.TemporaryDirectory() as folder, hushed():
        path = save(SHAPES[shape], Path(folder))
        found = [measure(path, kind, args.device) for kind in ("none", "int8", "nf4")]
    show(shape, found)
    return 0 if args.quick or met(shape, found) else 1


def save(sizes: dict[str, Any], folder: Path) -> Path:
    """Save a random Llama of this shape in bfloat16, and a few rows to build the task from."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["[unk]", "</s>", "one", "two", "three"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[unk]", eos_token="</s>"
    ).save_pretrained(folder)
    base = LlamaConfig(**sizes, max_position_embeddings=2048, eos_token_id=1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(base, dtype=torch.bfloat16).save_pretrained(folder)
    rows = [json.dumps({"text": "one two three"})] * 20
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder


def measure(base: Path, kind: str, device: str) -> Found:
    config = Config().with_overrides(
        {
            "task.name": "causal-lm",
            "task.data": str(base / "rows.jsonl"),
            "task.max-length": LENGTH,
            "model.base": str(base),
            "model.dtype": "bfloat16",
            "model.quantization": kind,
            "model.device": device,
            "model.gradient-checkpointing": True,
            "train.batch-size": 1,
            "federation.clients": 1,
        }
    )
    task = load_task(config)
    told = estimate(task, config)
    assert told is not None
    model = ResidentModel(task, config)
    trained = sum(p.numel() * p.element_size() for p in model.parameters.values())
    return Found(
        kind,
        stored_bytes(model.model) - trained,
        layers_bytes(model.model),
        told,
        peak_of_a_step(model, task) if pick_device(device).type == "cuda" else None,
    )


def layers_bytes(model: nn.Module) -> int:
    """The bytes of the blocks' linear layers, scales included, factors left out."""
    packed = quantised_modules(model)
    if packed:
        return sum(stored_bytes(nn.Sequential(layer)) for layer in packed.values())
    return sum(
        p.numel() * p.element_size()
        for name, p in model.named_parameters()
        if "base_layer" in name and p.ndim == 2
    )


def peak_of_a_step(model: ResidentModel, task: Task) -> int:
    batch = model.to_device(task.largest_batch(1))
    parameters = list(model.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    model.train_mode()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        loss = task.loss(model.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return peak_memory(model.device)


def show(shape: str, found: list[Found]) -> None:
    table = Table(title=f"{shape}, bfloat16, random weights")
    for column in ("base", "MB", "of bf16", "layers of bf16", "told", "peak told", "peak, MB"):
        table.add_column(column, justify="right")
    plain = found[0]
    for one in found:
        table.add_row(
            one.kind,
            f"{one.stored / 1e6:,.1f}",
            f"{one.stored / plain.stored:.3f}",
            f"{one.layers / plain.layers:.3f}",
            f"{one.estimate.base / one.stored:.4f}",
            f"{one.estimate.total / 1e6:,.0f}",
            "not measured on a GPU yet" if one.peak is None else f"{one.peak / 1e6:,.0f}",
        )
    Console(width=120).print(table)


def met(shape: str, found: list[Found]) -> bool:
    plain, _, nf4 = found
    good = all(abs(one.estimate.base / one.stored - 1.0) <= TOLERANCE for one in found)
    if shape == "tinyllama-1.1b":
        good &= nf4.stored <= WHOLE * plain.stored and nf4.layers <= LAYERS * plain.layers
    for one in found:
        if one.peak is not None:
            good &= abs(one.estimate.total / one.peak - 1.0) <= PEAK_TOLERANCE
    print(f"targets: {'met' if good else 'MISSED'}")
    return good


if __name__ == "__main__":
    sys.exit(main())
