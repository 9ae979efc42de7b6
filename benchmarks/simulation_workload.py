"""The work that benchmarks/simulation.py gives to all its rivals, and the plain PyTorch loop on it.

A tiny Llama with random weights, clients of different sizes with rows of synthetic tokens, and a
plan that says which rows make up every batch. Nothing here knows FedGraft, so that a rival with an
interpreter of its own can use it too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Plan = list[list[list[list[int]]]]
"""Rows of each batch: plan[round][client][step]."""
SPECIAL = ("[pad]", "[unk]", "<s>", "</s>")
END = SPECIAL.index("</s>")
TARGETS = ("q_proj", "v_proj")
SEED = 0


@dataclass(frozen=True)
class Size:
    """How much work; the defaults are the benchmark's, `TINY` is for its test."""

    clients: int = 20
    rounds: int = 5
    steps: int = 4  # a client and round
    batch: int = 4  # rows
    length: int = 32  # tokens a row
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 344
    vocabulary: int = 512
    rank: int = 8
    alpha: int = 16
    lr: float = 1e-3

    def rows(self, client: int) -> int:
        """How many training rows a client holds: different ones, so that the weights matter."""
        return self.steps * self.batch + 2 * client


@dataclass(frozen=True)
class Work:
    """All that a rival needs: how much, which rows when, and each client's token ids.

    Attributes:
        tokens: one tensor (rows, length) of int64 a client.
    """

    size: Size
    plan: Plan
    tokens: list[Tensor]

    @classmethod
    def read(cls, folder: Path) -> Work:
        """Read what `write` and `write_plan` left in a folder."""
        work = json.loads((folder / "work.json").read_text())
        return cls(Size(**work["size"]), work["plan"], read_tokens(folder))


TINY = Size(
    clients=3, rounds=2, steps=2, batch=2, length=8, hidden=16, layers=2, heads=2, mlp=24, rank=2
)


def write(folder: Path, size: Size) -> None:
    """Write base/ (model and tokenizer) and data/ (train, validation and test rows)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [f"w{number}" for number in range(len(SPECIAL), size.vocabulary)]
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[pad]", "unk_token": "[unk]", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "base")
    base = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.mlp,
        vocab_size=size.vocabulary,
        max_position_embeddings=2 * size.length,
        bos_token_id=2,
        eos_token_id=END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        LlamaForCausalLM(base).save_pretrained(folder / "base")
    rng = np.random.default_rng(SEED)
    (folder / "data").mkdir(parents=True)
    counts = {"train": size.rows, "validation": lambda _: size.batch, "test": lambda _: size.batch}
    for split, rows_of in counts.items():
        lines = [
            json.dumps({"client": f"{client:03d}", "text": " ".join(row)})
            for client in range(size.clients)
            for row in rng.choice(words, (rows_of(client), size.length - 1))
        ]
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def write_plan(folder: Path, size: Size, plan: Plan) -> None:
    """Write work.json."""
    (folder / "work.json").write_text(json.dumps({"size": asdict(size), "plan": plan}))


def read_tokens(folder: Path) -> list[Tensor]:
    """Return each client's training rows as token ids (rows, length), int64."""
    rows: dict[str, list[list[int]]] = {}
    for line in (folder / "data" / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = [int(word[1:]) for word in row["text"].split()] + [END]
        rows.setdefault(row["client"], []).append(ids)
    return [torch.tensor(rows[client]) for client in sorted(rows)]


def build_model(folder: Path, size: Size) -> nn.Module:
    """Load the base and attach a fresh adapter, the usual way."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    settings = LoraConfig(
        r=size.rank,
        lora_alpha=size.alpha,
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
    )
    model: nn.Module = get_peft_model(base, settings)
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters by the names that PEFT saves them under."""
    return {
        name.replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def mean_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of every next token of ids (rows, length)."""
    logits = model(input_ids=ids, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train_client(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    ids: Tensor,
    batches: Sequence[Sequence[int]],
    lr: float,
) -> None:
    """Take one optimizer step on each batch, with a fresh AdamW."""
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=0.0, fused=True)
    for rows in batches:
        optimizer.zero_grad()
        mean_loss(model, ids[rows]).backward()
        optimizer.step()


def plain_rounds(
    model: nn.Module, work: Work, start: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """FedAvg without any framework: load the adapter, train, read it out, average by examples."""
    parameters = trainable(model)
    current = dict(start)
    examples = sum(len(ids) for ids in work.tokens)
    model.train()
    for clients in work.plan:
        sums = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in current.items()}
        for ids, batches in zip(work.tokens, clients, strict=True):
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(current[name])
            train_client(model, parameters, ids, batches, work.size.lr)
            with torch.no_grad():
                for name, parameter in parameters.items():
                    sums[name].add_(parameter.double(), alpha=len(ids) / examples)
        current = {name: total.float() for name, total in sums.items()}
        yield current


@dataclass
class Stopwatch:
    """Seconds of wall clock, and of this process's processor, over all its laps."""

    seconds: float = 0.0
    processor: float = 0.0
    _began: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self._began[0]
        self.processor += time.process_time() - self._began[1]


class Beside:
    """The plain loop, a round at a time after each round of a rival, on a stopwatch of its own."""

    def __init__(self, model: nn.Module, work: Work, start: Mapping[str, Tensor]) -> None:
        self.watch = Stopwatch()
        self.adapter: dict[str, Tensor] = {}
        self._rounds = plain_rounds(model, work, start)

    def round(self) -> None:
        self.watch.start()
        self.adapter = next(self._rounds)
        self.watch.stop()
