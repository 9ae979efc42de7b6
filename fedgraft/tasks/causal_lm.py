"""The causal-lm task: next-token prediction on rows written out as text.

Rows are conversations, written by the tokenizer's chat template (`fedgraft.tasks.chat`), or filled
into `task.template` (`fedgraft.tasks.templates`). The loss counts the response and the end-of-text
token after it (`train.loss = "response"`) or every token ("all"); a loss is a mean over tokens, in
nats.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor, nn
from torch.nn import functional

from fedgraft.config import Config
from fedgraft.errors import DataError, ModelError
from fedgraft.tasks import encoding, messages
from fedgraft.tasks.base_models import load_config, load_model, load_tokenizer, structure_of
from fedgraft.tasks.chat import ChatWriter
from fedgraft.tasks.packed_attention import packed_scores, way_of
from fedgraft.tasks.packing import IGNORED
from fedgraft.tasks.questions import Question, Writing, as_it_stands, from_rows
from fedgraft.tasks.records import PLACE, Report, refuse
from fedgraft.tasks.rows import Encoded, RowsTask
from fedgraft.tasks.sequences import (
    FlatRows,
    Sequences,
    blank_batch,
    pad_id,
    token_limit,
    tokenizer_identity,
)
from fedgraft.tasks.splits import load_rows
from fedgraft.tasks.task import Batch, Direction
from fedgraft.tasks.templates import Template, Writer, default_template
from fedgraft.tasks.token_store import Arrays, kept

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
_EVALUATION_BATCH = 16


class CausalLM(RowsTask):
    """Rows of `task.data` written out as text; see the module.

    What is longer than `task.max-length` tokens is made to fit as `fedgraft.tasks.encoding` says,
    and the log says how often. A row without a token for the loss is left out.

    Attributes:
        fits: what became of the rows of each split that has been encoded.
    """

    name: ClassVar[str] = "causal-lm"
    metric = "loss"
    direction: Direction = "min"
    peft_task_type: ClassVar[str | None] = "CAUSAL_LM"
    packs: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        # The logits of a large vocabulary fill the memory: no more than training's, which has been
        # estimated.
        micro = config.train.micro_batch or config.train.batch_size
        self.evaluation_batch = min(_EVALUATION_BATCH, micro)
        chosen = config.task.template
        self._template = Template.parse(chosen) if chosen is not None else None
        self._chat_column: str | None = None
        self.fits: dict[str, encoding.Fit] = {}

    def load_base(self) -> nn.Module:
        """Load the base; raises as `load_model` does, and where rows cannot be packed for it."""
        from transformers import AutoModelForCausalLM

        model = load_model(AutoModelForCausalLM, self.config)
        if self.config.train.packing:
            way_of(model)  # refused here and not in the first step
        return model

    def structure(self) -> nn.Module:
        """Return the base's modules without weights; raises as `structure_of` does."""
        from transformers import AutoModelForCausalLM

        return structure_of(AutoModelForCausalLM, self.config)

    def largest_batch(self, size: int) -> Batch:
        """Return rows of as many tokens as are kept of any."""
        return blank_batch((size, self.limit), (size, self.limit))

    def read(self, report: Report = refuse) -> Mapping[str, datasets.Dataset]:
        """Read the columns that are written out; raises as `load_rows`, `Rows.table` do."""
        found = load_rows(self.config, report=report)
        self._choose(found["train"].columns)
        named = self.config.federation.partition_column
        wanted = replace(self.plain_writer().columns(), digest=self.remembered)
        return {
            name: rows.table(
                replace(wanted, other=() if named is None or name == "test" else (named,)), report
            )
            for name, rows in found.items()
        }

    def _choose(self, columns: list[str]) -> None:
        """Decide how rows are written: `task.template`, a chat, or a default template."""
        if self._template is not None:
            return
        self._chat_column = next((name for name in messages.COLUMNS if name in columns), None)
        if self._chat_column is None:
            self._template = default_template(columns, self.config.task.text_field)

    @cached_property
    def writer(self) -> Writer:
        """What makes a row a text; known once the data have been read."""
        if self._chat_column is not None:
            return ChatWriter(self._chat_column, self._tokenizer)
        return self.plain_writer()

    def plain_writer(self) -> Writer:
        """Return what makes a row a text where no base is at hand; see `writer`."""
        if self._chat_column is not None:
            return ChatWriter(self._chat_column, None)
        assert self._template is not None  # the table was read
        return self._template

    def encode(self, table: datasets.Dataset, split: str) -> Encoded:
        """Tokenise every row once, on this machine if the tokens are kept.

        Raises:
            DataError: no row leaves a token for the loss.
            ModelError: a tokenizer that cannot say which characters a token stands for.
        """
        arrays = self.tokens(table)
        fit = self.fits[split] = encoding.Fit.of(arrays)
        rows = arrays["row"]
        if not len(rows):
            raise DataError(
                f"none of the {len(table)} {split} rows has a token for the loss within "
                f"{self.limit} tokens",
                "Raise task.max-length, shorten the prompts, or set train.loss to all.",
            )
        if told := fit.told(self.limit):
            log.warning("%s: %s", split, told)
        same = np.array_equal(rows, np.arange(len(table)))
        return Encoded(table if same else table.select(rows), self.examples(arrays))

    def examples(self, arrays: Arrays) -> Sequences:
        """Return what `tokens` made as examples."""
        tokens = FlatRows(arrays["tokens"], arrays["offsets"])
        counted = None if self.config.train.loss == "all" else arrays["response"]
        return Sequences(
            tokens,
            replace(tokens, counted=counted),
            pad_id(self._tokenizer),
            self.limit if self.config.train.packing else None,
        )

    def tokens(self, table: datasets.Dataset, report: Report = refuse) -> Arrays:
        """Return what `encoding.encode` makes of a table, from disk where it is kept there.

        Where broken rows are reported and left out, nothing is kept: a run must not miss them.
        """
        columns = [name for name in self.writer.columns().required() if name != PLACE]
        columns = [*self.writer.columns().blank, *columns]
        loss = self.config.train.loss
        size = sum(table.data.column(name).nbytes for name in columns)

        def identity() -> Iterator[str]:
            yield from (encoding.VERSION, self.writer.source, str(self.limit), loss)
            yield from tokenizer_identity(self._tokenizer)
            for name in columns:
                yield from (name, str(len(table)))
                yield from table[name]

        def build() -> Arrays:
            return encoding.encode(table, self.writer, self._tokenizer, self.limit, loss, report)

        return kept(size, identity, build) if report is refuse else build()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy (nats) summed over the tokens that `count` counts."""
        logits, targets = _predictions(model, batch)
        return functional.cross_entropy(logits, targets, reduction="sum")

    def count(self, batch: Batch) -> int:
        """Return how many tokens are predicted: labelled, and not the first of their row."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def measure(self, model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
        """Return loss (nats a token), perplexity (its exponential), accuracy (share of tokens)."""
        right = seen = 0
        loss = 0.0
        for batch in batches:
            logits, targets = _predictions(model, batch)
            loss += float(functional.cross_entropy(logits, targets, reduction="sum"))
            right += int((logits.argmax(-1) == targets).sum())
            seen += len(targets)
        mean = loss / seen
        perplexity = math.exp(min(mean, _LARGEST_EXPONENT))
        return {"loss": mean, "perplexity": perplexity, "accuracy": right / seen}

    def metrics(self) -> Mapping[str, Direction]:
        """Return what `evaluate.metric` may name; a score of answers only where they are asked."""
        measured: dict[str, Direction] = {"loss": "min", "perplexity": "min", "accuracy": "max"}
        if self.config.evaluate.answers is not None:
            measured[self.config.evaluate.answers.replace("-", "_")] = "max"
        return measured

    def questions(self, split: str, client: int | None, limit: int) -> Sequence[Question]:
        """Return a split's first rows up to their responses; see `Task.questions`."""
        table = self.table(split, client)
        rows = table.select(range(min(limit, len(table))))
        writer = self.writer
        return from_rows([writer.write(row) for row in rows], self._tokenizer, whole=writer.whole)

    def asked(self, prompt: str) -> Question:
        """Return a prompt as a question: a user's, where the rows are conversations.

        Raises:
            DataError: the chat template refuses it.
        """
        self.tables  # noqa: B018 # which say how rows are written
        writer = self.writer
        text = writer.ask(prompt) if isinstance(writer, ChatWriter) else None
        return as_it_stands(prompt, self._tokenizer, text)

    def writing(self) -> Writing:
        """Return the tokenizer, and what the base takes."""
        positions = getattr(
            load_config(self.config).get_text_config(), "max_position_embeddings", None
        )
        return Writing(self._tokenizer, pad_id(self._tokenizer), positions)

    def preparation(self) -> tuple[Any, ...]:
        """Return the base's tokenizer."""
        return (self._tokenizer,)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(self.config)
        if not tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer of model.base {self.config.model.base!r} cannot say which "
                "characters a token stands for",
                "Choose a base with a tokenizer.json.",
            )
        return tokenizer

    @cached_property
    def limit(self) -> int:
        """Tokens that an example may have."""
        return token_limit(self.config, load_config(self.config), self._tokenizer)


_LARGEST_EXPONENT = 700.0  # exp(710) is too large for a float


def _predictions(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the scores (tokens, vocabulary), in float32, and the ids (tokens,) they should hit.

    Only the labelled positions are kept, and before the conversion: with a large vocabulary the
    scores of a whole batch are the largest tensor of all.
    """
    if "position_ids" in batch:
        scores, labels = packed_scores(model, batch)
    else:
        output = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        )
        scores, labels = output.logits, batch["labels"]
    logits, targets = scores[:, :-1], labels[:, 1:]
    counted = targets != IGNORED
    if counted.all():  # a selection takes longer, and its gradient a scatter
        return logits.flatten(0, 1).float(), targets.flatten()
    return logits[counted].float(), targets[counted]
