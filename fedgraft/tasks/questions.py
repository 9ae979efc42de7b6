"""Questions to a language model: a row up to its response, or a prompt as it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedgraft.tasks.templates import Written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """What a model is to go on from.

    Attributes:
        prompt: as text.
        tokens: the same as token ids, (length,), one at least.
        reference: the response that the data have, where there is one.
    """

    prompt: str
    tokens: NDArray[np.int64]
    reference: str | None = None


@dataclass(frozen=True)
class Writing:
    """What text is written with.

    Attributes:
        tokenizer: the base's.
        pad: the id that fills up on the left; the attention mask hides it.
        positions: how many tokens the base takes, prompt and continuation together; None for any.
    """

    tokenizer: PreTrainedTokenizerBase
    pad: int
    positions: int | None = None


def as_it_stands(
    prompt: str, tokenizer: PreTrainedTokenizerBase, text: str | None = None
) -> Question:
    """Return a prompt as a question.

    Args:
        prompt: what is shown.
        tokenizer: puts its special tokens in front of the prompt.
        text: what is tokenised instead, where a chat template has written it, with special tokens.
    """
    coded = tokenizer(prompt) if text is None else tokenizer(text, add_special_tokens=False)
    ids = np.array(coded["input_ids"], dtype=np.int64)
    return Question(prompt, ids if text is not None else _open_ended(ids, tokenizer))


def from_rows(
    written: Sequence[Written], tokenizer: PreTrainedTokenizerBase, *, whole: bool = False
) -> list[Question]:
    """Return rows that are written out as questions: each goes up to its last response.

    The tokens are those that the row has in training, up to the first that touches the response:
    a prompt tokenised by itself may end in others. A row that starts with its response asks
    nothing and is left out.

    Args:
        written: of each row its text, and where its responses are in it.
        tokenizer: one that knows which characters a token stands for.
        whole: the texts bring their special tokens themselves.
    """
    if not written:
        return []
    coded = tokenizer(
        [row.text for row in written], return_offsets_mapping=True, add_special_tokens=not whole
    )
    questions = []
    for number, row in enumerate(written):
        text, (start, end) = row.text, row.responses[-1]
        spans = coded["offset_mapping"][number]
        first = next((k for k, (a, b) in enumerate(spans) if a < end and b > start), len(spans))
        ids = np.array(coded["input_ids"][number][:first], dtype=np.int64)
        if first == len(spans):
            ids = _open_ended(ids, tokenizer)
        if len(ids) and start:
            questions.append(Question(text[:start], ids, text[start:end]))
    return questions


def _open_ended(ids: NDArray[np.int64], tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """Take away the end-of-text that some tokenizers put after every text."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
