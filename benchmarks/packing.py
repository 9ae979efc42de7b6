"""Measure packing: useful tokens a second of training, against padding to the longest row.

    python benchmarks/packing.py
    python benchmarks/packing.py --quick    # on a tiny random model and made-up rows, in seconds

FedGraft's own steps (client/batch_gradient.py) on stories260K and GSM8K, from ../shared, at
task.max-length 512: LoRA r=8 on all linear layers, AdamW, one thread. Both ways take the same
batches from the same adapter, one step of one after one of the other, so that both meet the same
machine; a useful token is one that the loss counts and no padding. A repeat is one pass over the
batches of each; the ratio is that of the best repeats, and the median of the repeats' ratios is
printed beside it.

Exits with status 1 where the losses a token differ by more than 1e-5 at the first step (later steps
start from adapters that differ in their last bits), or the ratio misses 1.3.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from client.batch_gradient import backward
from fedgraft.config import Config
from fedgraft.logs import hushed
from fedgraft.resident_model import ResidentModel
from fedgraft.seeds import stream
from fedgraft.tasks.causal_lm import CausalLM
from fedgraft.tasks.packed_attention import way_of
from fedgraft.tasks.sequences import Sequences

SHARED = Path(__file__).parents[1].parent / "shared"
TARGET = 1.3
SAME_LOSS = 1e-5
RATE = 3e-3


@dataclass(frozen=True)
class Result:
    """One batch size's measurement.

    Attributes:
        padded: useful tokens a second of each repeat.
        packed: the same, packed.
        losses: a token, of the first step, padded and packed.
        filled: share of the padded batches that is no padding.
    """

    padded: list[float]
    packed: list[float]
    losses: tuple[float, float]
    filled: float

    @property
    def ratio(self) -> float:
        return max(self.packed) / max(self.padded)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="of which the best counts")
    parser.add_argument("--steps", type=int, default=8, help="batches of a repeat")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16], help="rows of a batch")
    parser.add_argument("--loss", choices=["response", "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="check losses only, at tiny size")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    console = Console(width=110)
    with tempfile.TemporaryDirectory(prefix="fedgraft-benchmark-") as scratch, hushed():
        base, data, length = SHARED / "models/stories260K", SHARED / "data/gsm8k", 512
        if args.quick:
            base, data, length = *_tiny(Path(scratch)), 64
            args.repeats, args.steps, args.batch = 1, 2, [8]
        task = CausalLM(_config(base, data, length, args.loss))
        model = ResidentModel(task, task.config)
        console.print(_conditions(task), soft_wrap=True)
        results = {
            size: measure(task, model, size, args.steps, args.repeats) for size in args.batch
        }
        console.print(f"packed rows are scored {way_of(model.model)}")
    console.print(_table(results))
    console.print(f"load average {_load()} at the end")
    met = True
    for size, result in results.items():
        apart = abs(result.losses[0] - result.losses[1])
        verdicts = [(apart <= SAME_LOSS, f"losses a token apart by {apart:.1e}, at most 1e-05")]
        if not args.quick:
            ratio = f"{result.ratio:.2f} x the useful tokens a second, at least {TARGET}"
            verdicts.append((result.ratio >= TARGET, ratio))
        for good, text in verdicts:
            met &= good
            console.print(f"batch {size}: {text}: {'met' if good else 'MISSED'}")
    return 0 if met else 1


def measure(task: CausalLM, model: ResidentModel, size: int, steps: int, repeats: int) -> Result:
    """Train both ways, a step of one after a step of the other."""
    padded = task.train()
    assert isinstance(padded, Sequences)
    packed = replace(padded, packed_to=task.limit)
    rng = stream(0, "packing")
    batches = [rng.choice(len(padded), size, replace=False) for _ in range(steps)]
    trained = [task.count(padded.batch(indices)) for indices in batches]
    cells = [padded.batch(indices)["attention_mask"].float().mean() for indices in batches]
    start = model.initial_adapter(0)
    states = {way: start.tensors() for way in ("padded", "packed")}
    speeds: dict[str, list[float]] = {"padded": [], "packed": []}
    first: dict[str, float] = {}
    model.train_mode()
    for way, examples in (("padded", padded), ("packed", packed)):  # warm-up; probes the model
        model.take(start)
        first[way] = float(backward(model, task, examples, batches[0], size))
    for _ in range(repeats):
        seconds = {"padded": 0.0, "packed": 0.0}
        optimizers = {w: torch.optim.AdamW(model.parameters.values(), lr=RATE) for w in states}
        for indices in batches:
            for way, examples in (("padded", padded), ("packed", packed)):
                model.load(states[way])
                began = time.perf_counter()
                for parameter in model.parameters.values():
                    parameter.grad = None
                backward(model, task, examples, indices, size)
                optimizers[way].step()
                seconds[way] += time.perf_counter() - began
                states[way] = model.read()
        for way, taken in seconds.items():
            speeds[way].append(sum(trained) / taken)
    losses = (first["padded"], first["packed"])
    return Result(speeds["padded"], speeds["packed"], losses, float(np.mean(cells)))


def _table(results: dict[int, Result]) -> Table:
    table = Table(title="Useful tokens a second")
    for name in ("batch", "padded", "packed", "ratio", "median, range", "no padding", "loss"):
        table.add_column(name, justify="right")
    for size, found in results.items():
        ratios = [b / a for a, b in zip(found.padded, found.packed, strict=True)]
        table.add_row(
            str(size),
            f"{max(found.padded):.0f}",
            f"{max(found.packed):.0f}",
            f"{found.ratio:.2f}",
            f"{statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}",
            f"{found.filled:.0%}",
            f"{found.losses[0]:.5f}",
        )
    return table


def _config(base: Path, data: Path, length: int, loss: str) -> Config:
    return Config.from_dict(
        {
            "task.name": "causal-lm",
            "task.data": str(data),
            "task.max-length": length,
            "model.base": str(base),
            "model.device": "cpu",
            "train.loss": loss,
            "threads": 1,
        }
    )


def _tiny(folder: Path) -> tuple[Path, Path]:
    """Save a random Llama with a tokenizer of words, and rows of 2 to 40 of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["</s>", *"abcdefghijk"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    base = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=12,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(base).save_pretrained(folder)
    rng = stream(0, "rows")
    rows = [" ".join(rng.choice(list("abcdefghijk"), 2 + k)) for k in range(39)]
    lines = [json.dumps({"prompt": "a ", "completion": row}) for row in rows]
    (folder / "d.jsonl").write_text("\n".join(lines))
    return folder, folder / "d.jsonl"


def _conditions(task: CausalLM) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return (
        f"{date.today()}, {platform.platform()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, {packages}\n"
        f"{len(task.train())} rows of at most {task.limit} tokens, loss on "
        f"{task.config.train.loss}; one thread; load average {_load()} at the start"
    )


def _load() -> str:
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


if __name__ == "__main__":
    sys.exit(main())
