"""Token sequences of different lengths: truncated to what the base takes, padded batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgraft.config import Config
from fedgraft.tasks.task import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Tokens = NDArray[np.int64]
IGNORED = -100
"""The label of a token that no loss counts (torch's and transformers' convention)."""


@dataclass(frozen=True)
class Sequences:
    """Examples of token ids, padded on the right to the longest of their batch.

    Attributes:
        tokens: token ids, (length,) each.
        labels: one class for all (n,), or one label a token, (length,) each.
        pad: the id that fills up; the attention mask hides it.
    """

    tokens: Sequence[Tokens]
    labels: Tokens | Sequence[Tokens]
    pad: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The examples' lengths in tokens, (n,)."""
        return np.array([len(row) for row in self.tokens], dtype=np.int64)

    def batch(self, indices: np.ndarray) -> Batch:
        """Collate: input_ids and attention_mask (n, longest), labels (n,) or (n, longest)."""
        tokens = [self.tokens[index] for index in indices]
        ones = [np.ones_like(row) for row in tokens]
        if isinstance(self.labels, np.ndarray):
            labels = torch.from_numpy(self.labels[indices])
        else:
            labels = _padded([self.labels[index] for index in indices], IGNORED)
        return {
            "input_ids": _padded(tokens, self.pad),
            "attention_mask": _padded(ones, 0),
            "labels": labels,
        }


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


def _padded(rows: Sequence[Tokens], filler: int) -> Tensor:
    padded = np.full((len(rows), max(len(row) for row in rows)), filler, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return torch.from_numpy(padded)
