"""The causal-lm task: next-token prediction on rows written out by a template.

`task.template` says how a row becomes text, "Question: {question}\\nAnswer: {answer}" say; its
last placeholder is the response. Without one, the columns found decide (`TEMPLATES`). The loss
counts the response and the end-of-text token after it (`train.loss = "response"`) or every token
("all"); a loss is a mean over tokens, in nats.
"""

from __future__ import annotations

import logging
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor, nn
from torch.nn import functional

from fedgraft.config import Config
from fedgraft.errors import ConfigError, DataError, ModelError
from fedgraft.tasks.base_models import load_config, load_model, load_tokenizer, structure_of
from fedgraft.tasks.data_files import Columns
from fedgraft.tasks.questions import Question, Writing, from_rows
from fedgraft.tasks.rows import Encoded, RowsTask
from fedgraft.tasks.sequences import IGNORED, Sequences, Tokens, blank_batch, pad_id, token_limit
from fedgraft.tasks.splits import load_rows
from fedgraft.tasks.task import Batch, Direction

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ALPACA = "### Instruction:\n{instruction}\n\n### Response:\n{output}"
ALPACA_WITH_INPUT = (
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
)
TEMPLATES = (
    ALPACA_WITH_INPUT,
    ALPACA,
    "{prompt}{completion}",
    "Question: {question}\nAnswer: {answer}",
)
"""The default templates: the first whose columns are all there; after them `task.text-field` alone.

Alpaca's (Taori et al. 2023) without its preamble, a prompt continued by its completion as it
stands, and question and answer. A row with a blank `input` is written without that heading.
"""


@dataclass(frozen=True)
class Template:
    """A text with placeholders, and how a row fills it.

    Attributes:
        source: the text, with the placeholders in braces; double braces are braces.
        fields: the columns it names, in order; the last is the response.
    """

    source: str
    fields: tuple[str, ...]

    @classmethod
    def parse(cls, source: str) -> Template:
        """Read a template.

        Raises:
            ConfigError: unbalanced braces, no placeholder, or one that is no plain column name.
        """
        try:
            parts = list(string.Formatter().parse(source))
        except ValueError as error:
            raise ConfigError(
                f"task.template {source!r} cannot be read: {error}",
                "Write placeholders as {column}; write {{ and }} for braces in the text.",
            ) from None
        fields = [name for _, name, _, _ in parts if name is not None]
        plain = all(not spec and not conversion for _, _, spec, conversion in parts)
        if not fields or not all(fields) or not plain:
            raise ConfigError(
                f"task.template {source!r} has no plain placeholders",
                "Name columns in braces, like 'Question: {question}\\nAnswer: {answer}'.",
            )
        return cls(source, tuple(name for name in fields if name is not None))

    def fill(self, row: Mapping[str, str]) -> tuple[str, int, int]:
        """Return the text, and where the response starts and ends in it (characters)."""
        text, number, start, end = "", 0, 0, 0
        for literal, name, _, _ in string.Formatter().parse(self.source):
            text += literal
            if name is not None:
                number += 1
                start, text = len(text), text + row[name]
                end = len(text)
        return text, start, end


def default_template(columns: list[str], text_field: str) -> Template:
    """Choose a template by the columns found.

    Raises:
        DataError: no default fits them.
    """
    for source in (*TEMPLATES, f"{{{text_field}}}"):
        template = Template.parse(source)
        if set(template.fields) <= set(columns):
            return template
    raise DataError(
        f"no default template fits the columns {', '.join(columns)}",
        "Set task.template, like 'Question: {question}\\nAnswer: {answer}'.",
    )


class CausalLM(RowsTask):
    """Rows of `task.data` written out by `task.template`; see the module.

    Rows longer than `task.max-length` tokens lose their end. Where that leaves no token for the
    loss, the row is left out, and the log says how many were.
    """

    name: ClassVar[str] = "causal-lm"
    metric = "loss"
    direction: Direction = "min"
    evaluation_batch = 16  # the logits of a large vocabulary are what fills the memory
    peft_task_type: ClassVar[str | None] = "CAUSAL_LM"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        chosen = config.task.template
        self._template = Template.parse(chosen) if chosen is not None else None

    @property
    def label_column(self) -> str | None:
        """`federation.partition-column`: a topic, say, since texts have no labels of their own."""
        return self.config.federation.partition_column

    def load_base(self) -> nn.Module:
        """Load the base; raises as `load_model` does."""
        from transformers import AutoModelForCausalLM

        return load_model(AutoModelForCausalLM, self.config)

    def structure(self) -> nn.Module:
        """Return the base's modules without weights; raises as `structure_of` does."""
        from transformers import AutoModelForCausalLM

        return structure_of(AutoModelForCausalLM, self.config)

    def largest_batch(self, size: int) -> Batch:
        """Return rows of as many tokens as are kept of any."""
        return blank_batch((size, self._limit), (size, self._limit))

    def read(self) -> Mapping[str, datasets.Dataset]:
        """Read the template's columns; raises as `load_rows`, `Rows.table` do."""
        found = load_rows(self.config)
        if self._template is None:
            columns = found["train"].columns
            self._template = default_template(columns, self.config.task.text_field)
        *prompt, response = self._template.fields
        named = self.config.federation.partition_column
        return {
            name: rows.table(
                Columns(
                    text=(response,),
                    blank=tuple(prompt),
                    other=() if named is None or name == "test" else (named,),
                )
            )
            for name, rows in found.items()
        }

    def encode(self, table: datasets.Dataset, split: str) -> Encoded:
        """Tokenise every row once.

        Raises:
            DataError: no row leaves a token for the loss.
            ModelError: a tokenizer that cannot say which characters a token stands for.
        """
        tokenizer = self._tokenizer
        limit = self._limit
        written = [self._write(row) for row in table]
        coded = tokenizer([text for text, _, _ in written], return_offsets_mapping=True)
        tokens: list[Tokens] = []
        labels: list[Tokens] = []
        kept: list[int] = []
        cut = 0
        for number, (_, start, end) in enumerate(written):
            ids, spans = coded["input_ids"][number], coded["offset_mapping"][number]
            row = np.array(ids, dtype=np.int64)
            answers = np.array([first < end and last > start for first, last in spans], dtype=bool)
            if tokenizer.eos_token_id is not None:
                if len(row) and row[-1] == tokenizer.eos_token_id:
                    row, answers = row[:-1], answers[:-1]
                row = np.append(row, tokenizer.eos_token_id)
                answers = np.append(answers, True)
            cut += len(row) > limit
            row, answers = row[:limit], answers[:limit]
            target = row if self.config.train.loss == "all" else np.where(answers, row, IGNORED)
            if (target[1:] != IGNORED).any():
                tokens.append(row)
                labels.append(target)
                kept.append(number)
        if not kept:
            raise DataError(
                f"none of the {len(table)} {split} rows has a token for the loss within "
                f"{limit} tokens",
                "Raise task.max-length, shorten the prompts, or set train.loss to all.",
            )
        left_out = len(table) - len(kept)
        if cut or left_out:
            log.warning(
                "%s: %d of %d rows are longer than %d tokens and were cut; %d had no token left "
                "for the loss and were left out",
                split,
                cut,
                len(table),
                limit,
                left_out,
            )
        used = table.select(kept) if left_out else table
        return Encoded(used, Sequences(tokens, labels, pad_id(tokenizer)))

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

    def _write(self, row: Mapping[str, str]) -> tuple[str, int, int]:
        assert self._template is not None  # the table was read
        template = self._template
        if template.source == ALPACA_WITH_INPUT and not row["input"].strip():
            template = Template.parse(ALPACA)
        return template.fill(row)

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
        return from_rows([self._write(row) for row in rows], self._tokenizer)

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
    def _limit(self) -> int:
        return token_limit(self.config, load_config(self.config), self._tokenizer)


_LARGEST_EXPONENT = 700.0  # exp(710) is too large for a float


def _predictions(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the scores (tokens, vocabulary), in float32, and the ids (tokens,) they should hit.

    Only the labelled positions are kept, and before the conversion: with a large vocabulary the
    scores of a whole batch are the largest tensor of all.
    """
    output = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    )
    logits, targets = output.logits[:, :-1], batch["labels"][:, 1:]
    counted = targets != IGNORED
    if counted.all():  # a selection takes longer, and its gradient a scatter
        return logits.flatten(0, 1).float(), targets.flatten()
    return logits[counted].float(), targets[counted]
