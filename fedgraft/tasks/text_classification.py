"""The text-classification task: one label a text, with any sequence classifier of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from fedgraft.tasks.base_models import load_tokenizer
from fedgraft.tasks.classification import Classification
from fedgraft.tasks.records import Columns, Report, Rows, refuse
from fedgraft.tasks.rows import Encoded
from fedgraft.tasks.sequences import (
    FlatRows,
    Sequences,
    blank_batch,
    pad_id,
    token_limit,
    tokenizer_identity,
)
from fedgraft.tasks.splits import load_rows
from fedgraft.tasks.task import Batch
from fedgraft.tasks.token_store import Arrays, kept

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


class TextClassification(Classification):
    """Texts in `task.text-field`, labels in `task.label-field`, of the data `task.data`.

    A CSV or TSV file of two columns without a header holds text and label, in that order. Texts
    longer than `task.max-length` tokens lose their end.
    """

    name: ClassVar[str] = "text-classification"
    peft_task_type: ClassVar[str | None] = "SEQ_CLS"

    @property
    def label_column(self) -> str:
        """`task.label-field`."""
        return self.config.task.label_field

    @staticmethod
    def auto_class() -> Any:
        """Return AutoModelForSequenceClassification."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def read(self, report: Report = refuse) -> Mapping[str, datasets.Dataset]:
        """Read texts and labels; raises as `load_rows`, `Rows.table` do."""
        task, column = self.config.task, self.config.federation.partition_column
        found = load_rows(self.config, (task.text_field, task.label_field), report)
        dealt = () if column is None else (column,)
        return {
            name: rows.table(
                Columns(
                    text=(task.text_field,),
                    label=task.label_field,
                    other=() if name == "test" else dealt,
                    digest=self.remembered,
                ),
                report,
            )
            for name, rows in found.items()
            if name == "train" or not _hidden(rows, task.label_field)
        }

    def encode(self, table: datasets.Dataset, split: str) -> Encoded:
        """Tokenise every text once, on this machine if the tokens are kept.

        Raises:
            DataError: a label that no training row has.
        """
        texts = table[self.config.task.text_field]

        def identity() -> Iterator[str]:
            yield from ("text-classification 1", str(self.limit))
            yield from tokenizer_identity(self._tokenizer)
            yield from texts

        def build() -> Arrays:
            tokens = self._tokenizer(
                list(texts),
                truncation=True,
                max_length=self.limit,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
            rows = FlatRows.of(tokens, len(self._tokenizer))
            return {"tokens": rows.values, "offsets": rows.offsets}

        slow = not self._tokenizer.is_fast  # has no one text that tells it from others
        size = 0 if slow else table.data.column(self.config.task.text_field).nbytes
        arrays = kept(size, identity, build)
        rows = FlatRows(arrays["tokens"], arrays["offsets"])
        return Encoded(table, Sequences(rows, self.targets(table, split), pad_id(self._tokenizer)))

    def load_base(self) -> nn.Module:
        """Load the base; a decoder without a padding token learns which one the batches use."""
        model = super().load_base()
        settings: Any = model.config
        if settings.pad_token_id is None:
            settings.pad_token_id = pad_id(self._tokenizer)
        return model

    def largest_batch(self, size: int) -> Batch:
        """Return texts of as many tokens as are kept of any."""
        return blank_batch((size, self.limit), (size,))

    def preparation(self) -> tuple[Any, ...]:
        """Return the base's tokenizer."""
        return (self._tokenizer,)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.config)

    @cached_property
    def limit(self) -> int:
        """Tokens of a text that are kept."""
        return token_limit(self.config, self.base_config, self._tokenizer)


def _hidden(rows: Rows, label: str) -> bool:
    """Whether a split's labels are withheld: all of them -1, as in GLUE's test splits."""
    return all(str(row.get(label)) == "-1" for row in rows.rows)
