"""Tokens a second of a client's local training, beside a plain PEFT loop on the same batches.

    python benchmarks/training.py --base FOLDER --data FILE.jsonl
    python benchmarks/training.py --shape tinyllama-1.1b --batch 4 --length 512    # on a GPU
    python benchmarks/training.py --quick

The plain loop is what a PEFT tutorial does: the same base loaded by transformers, `get_peft_model`,
AdamW, the same padded batches made beforehand, clipping, and nothing else. The client collates its
batches itself, loads the adapter and reads it out. Both take turns on one machine, a few steps
each; the ratio is the median over turns. Losses must agree.

Exits with status 1 where the client reaches less than 0.95 of the plain loop's tokens a second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from base_memory import SHAPES, save
from torch import Tensor, nn

from client.trainer import Assignment, batch_indices, train
from fedgraft.config import Config
from fedgraft.logs import hushed
from fedgraft.resident_model import ResidentModel, load_task
from fedgraft.seeds import stream
from fedgraft.tasks.task import Batch, Task

TARGET = 0.95


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    failed = False
    print("| base | tokens a second, plain loop | client | ratio | range | loss |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        base, data = (args.base, args.data) if args.base else made(args, Path(folder))
        for kind in args.quantization:
            failed |= not compare(base, data, kind, args)
    return 1 if failed and not args.quick else 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", help="a model folder; random weights of --shape when left out")
    parser.add_argument("--data", help="with --base: rows of question and answer, or text")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--quantization", nargs="+", default=["none", "nf4"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a few steps, judging nothing")
    args = parser.parse_args(argv)
    if args.quick:
        args.batch, args.length, args.steps, args.turns = 2, 32, 2, 1
    return args


def made(args: argparse.Namespace, folder: Path) -> tuple[str, str]:
    """Save a base of random weights and rows of the wanted length."""
    save(SHAPES[args.shape], folder)
    words = ("one", "two", "three")
    texts = [" ".join(words[(n + k) % 3] for k in range(args.length)) for n in range(64)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(folder), str(folder / "rows.jsonl")


def compare(base: str, data: str, kind: str, args: argparse.Namespace) -> bool:
    config = Config().with_overrides(
        {
            "task.name": "causal-lm",
            "task.data": data,
            "task.max-length": args.length,
            "model.base": base,
            "model.quantization": kind,
            "model.dtype": args.dtype,
            "federation.clients": 1,
            "federation.rounds": args.turns + 1,
            "train.steps": args.steps,
            "train.batch-size": args.batch,
            "train.lr": 1e-3,
            "train.loss": "all",
            "train.schedule": "constant",
            "threads": 1,
        }
    )
    with hushed():
        task = load_task(config)
        model = ResidentModel(task, config)
        plain = PlainLoop(task, model, config)
    ratios, ours, theirs = [], [], []
    examples = task.train(0)
    start = model.initial_adapter(config.seed)
    worst = 0.0
    for turn in range(args.turns + 1):  # the first warms up
        batches = drawn(task, config, turn + 1)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        plain.load(start.tensors())
        seconds, loss = plain.run([model.to_device(batch) for batch in batches])
        work = Assignment(config.train, config.seed, turn + 1, config.federation.rounds, "0")
        wait(model)
        began = time.perf_counter()
        result = train(model, task, examples, start, work)
        own = time.perf_counter() - began
        worst = max(worst, abs(result.loss - loss) / loss)
        if turn:
            ratios.append(seconds / own)
            ours.append(tokens / own)
            theirs.append(tokens / seconds)
    ratio = statistics.median(ratios)
    print(
        f"| {kind}, {args.dtype}, {model.device} | {statistics.median(theirs):,.0f} | "
        f"{statistics.median(ours):,.0f} | {ratio:.3f} | {min(ratios):.3f} to {max(ratios):.3f} | "
        f"within {worst:.0e} |",
        flush=True,
    )
    return ratio >= TARGET and worst < 1e-3


def drawn(task: Task, config: Config, round: int) -> list[Batch]:
    """The batches that the client will draw in a round, collated beforehand."""
    examples = task.train(0)
    rng = stream(config.seed, "batches", round=round, client="0")
    indices = batch_indices(len(examples), config.train.batch_size, rng)
    return [examples.batch(next(indices)) for _ in range(config.train.steps or 5)]


def wait(model: ResidentModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


class PlainLoop:
    """A loop of plain PyTorch on a PEFT model that transformers and PEFT have made."""

    def __init__(self, task: Task, model: ResidentModel, config: Config) -> None:
        from peft import LoraConfig, get_peft_model

        self.resident = model
        base = (
            task.load_base().to(model.device)
            if config.model.quantization == "none"
            else (task.load_base())
        )
        lora: Any = LoraConfig(
            r=config.adapter.rank,
            lora_alpha=int(config.adapter.alpha),
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        self.model: nn.Module = get_peft_model(base, lora)
        self.parameters = {
            name.replace(".default", ""): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        self.settings = config.train

    def load(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def run(self, batches: list[Batch]) -> tuple[float, float]:
        """Train on the batches; return seconds and the mean loss."""
        parameters = list(self.parameters.values())
        self.model.train()
        wait(self.resident)
        began = time.perf_counter()
        optimizer = torch.optim.AdamW(parameters, lr=self.settings.lr, weight_decay=0.0, fused=True)
        losses = []
        for batch in batches:
            loss = self.model(**batch, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, self.settings.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        wait(self.resident)
        seconds = time.perf_counter() - began
        return seconds, float(torch.stack(losses).mean())


if __name__ == "__main__":
    sys.exit(main())
