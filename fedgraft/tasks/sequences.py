"""Token sequences of different lengths in flat arrays, padded or packed batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgraft.config import Config
from fedgraft.tasks.packing import IGNORED, Tokens, packed
from fedgraft.tasks.task import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class TokenRows(Protocol):
    """Rows of token ids or labels, (length,) each, by number."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, (rows,)."""
        ...

    def __getitem__(self, index: int, /) -> Tokens: ...

    def __iter__(self) -> Iterator[Tokens]: ...


@dataclass(frozen=True)
class FlatRows:
    """Rows that lie end to end in one array, which may be a file mapped into memory.

    Attributes:
        values: token ids of all rows, of any integer type.
        offsets: where each row begins, and the end of the last, (rows + 1,).
        counted: which values are labels, for rows of labels; the others become `IGNORED`.
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64]
    counted: NDArray[np.bool_] | None = None

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], vocabulary: int) -> FlatRows:
        """Lay rows of ids below `vocabulary` end to end."""
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        flat = (token for row in rows for token in row)
        return cls(np.fromiter(flat, id_type(vocabulary), int(offsets[-1])), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Values of each row, (rows,)."""
        return np.diff(self.offsets)

    def __getitem__(self, index: int, /) -> Tokens:
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        row = np.array(self.values[at], np.int64)
        if self.counted is not None:
            row[~self.counted[at]] = IGNORED
        return row

    def __iter__(self) -> Iterator[Tokens]:
        return (self[index] for index in range(len(self)))


def id_type(vocabulary: int) -> type[np.uint16] | type[np.int32]:
    """Return the smallest type that holds every token id."""
    return np.uint16 if vocabulary <= 1 << 16 else np.int32


@dataclass(frozen=True)
class Sequences:
    """Examples of token ids, padded on the right to the longest of their batch, or packed.

    Attributes:
        tokens: token ids, (length,) each.
        labels: one class for all (n,), or one label a token, (length,) each.
        pad: the id that fills up; the attention mask hides it.
        packed_to: tokens of a packed sequence (`packing.packed`, which needs a label a token);
            None pads.
    """

    tokens: TokenRows
    labels: NDArray[np.int64] | TokenRows
    pad: int
    packed_to: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The examples' lengths in tokens, (n,)."""
        return self.tokens.lengths

    def batch(self, indices: np.ndarray) -> Batch:
        """Collate: input_ids and attention_mask (n, longest), labels (n,) or (n, longest)."""
        tokens = [self.tokens[int(index)] for index in indices]
        if isinstance(self.labels, np.ndarray):
            return _hidden_padding(tokens, self.pad) | {
                "labels": torch.from_numpy(self.labels[indices])
            }
        labels = [self.labels[int(index)] for index in indices]
        if self.packed_to is not None:
            return packed(tokens, labels, self.pad, self.packed_to)
        return _hidden_padding(tokens, self.pad) | {"labels": _padded(labels, IGNORED)}


def blank_batch(tokens: tuple[int, int], labels: tuple[int, ...]) -> Batch:
    """Return a batch of these shapes with nothing in it."""
    ids = torch.zeros(tokens, dtype=torch.int64)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.zeros(labels, dtype=torch.int64),
    }


def token_limit(config: Config, base: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens of a row are kept: `task.max-length`, or what the base takes."""
    wanted = config.task.max_length
    positions = getattr(base.get_text_config(), "max_position_embeddings", None) or wanted
    limit = min(wanted, int(positions), int(tokenizer.model_max_length))
    if limit < wanted:
        log.warning("task.max-length is %d, and the base takes %d tokens", wanted, limit)
    return limit


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with: the tokenizer's own, else its end-of-text id, else 0.

    Any id does: the attention mask hides it and no loss counts it.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield what a fast tokenizer's work depends on."""
    import tokenizers

    fast: Any = tokenizer
    fast.backend_tokenizer.no_truncation()  # left from the last call, and set anew by the next
    fast.backend_tokenizer.no_padding()
    yield tokenizers.__version__
    yield fast.backend_tokenizer.to_str()
    yield repr(sorted(tokenizer.special_tokens_map.items(), key=str))


def _hidden_padding(tokens: Sequence[Tokens], pad: int) -> Batch:
    return {
        "input_ids": _padded(tokens, pad),
        "attention_mask": _padded([np.ones_like(row) for row in tokens], 0),
    }


def _padded(rows: Sequence[Tokens], filler: int) -> Tensor:
    made = np.full((len(rows), max(len(row) for row in rows)), filler, dtype=np.int64)
    for number, row in enumerate(rows):
        made[number, : len(row)] = row
    return torch.from_numpy(made)
