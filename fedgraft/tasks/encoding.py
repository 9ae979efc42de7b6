"""Rows of text as flat arrays of tokens, each row within the limit and with its response marked.

A row that is too long loses the beginning of its prompt, after the template's own opening words,
and keeps its response. A response that does not fit even alone loses its end, and its prompt keeps
its last tokens in up to half of the limit. In a conversation the first response counts as the one
to keep; later turns lose their end. Where every token counts alike (`train.loss = "all"`), a row
just loses its end. A text without a prompt is split into consecutive pieces, each beginning with
the last token of the one before, so that every token is predicted once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedgraft.errors import DataError
from fedgraft.tasks.records import Report, refuse
from fedgraft.tasks.sequences import id_type
from fedgraft.tasks.templates import Writer, Written
from fedgraft.tasks.token_store import Arrays

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = "2"
"""Of what `encode` makes of the same rows; a change of it needs another number."""
_CHUNK = 1000  # rows tokenised in one call


@dataclass(frozen=True)
class Fit:
    """What became of a split's rows.

    Attributes:
        rows: how many there were.
        longest: tokens of the longest before anything was cut.
        cut: rows that lost something, wherever.
        prompts_cut: rows whose prompt lost its beginning.
        responses_cut: rows whose response lost its end.
        split: texts that were split into pieces.
        pieces: into how many altogether.
        left_out: rows without a token for the loss.
    """

    rows: int = 0
    longest: int = 0
    cut: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0
    split: int = 0
    pieces: int = 0
    left_out: int = 0

    @classmethod
    def of(cls, arrays: Arrays) -> Fit:
        """Read it from what `encode` returned."""
        return cls(*map(int, arrays["fit"]))

    def told(self, limit: int) -> str:
        """Say what was cut; "" where nothing was."""
        parts = []
        if self.cut:
            parts.append(
                f"{self.cut} of {self.rows} rows are longer than {limit} tokens and were cut: "
                f"{self.prompts_cut} lost the beginning of their prompt, {self.responses_cut} the "
                "end of their response"
            )
        if self.split:
            parts.append(
                f"{self.split} of {self.rows} texts are longer than {limit} tokens and were split "
                f"into {self.pieces} pieces"
            )
        if self.left_out:
            parts.append(f"{self.left_out} had no token for the loss and were left out")
        return "; ".join(parts)


def encode(
    rows: Iterable[Mapping[str, str]],
    writer: Writer,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    loss: str,
    report: Report = refuse,
) -> Arrays:
    """Write out and tokenise rows.

    Args:
        rows: with the writer's columns.
        writer: makes each a text.
        tokenizer: a fast one, that tells which characters a token stands for.
        limit: tokens that an example may have.
        loss: "response" or "all"; decides which rows have nothing to learn and are left out.
        report: is given the error of each row that the writer refuses, which is then left out.

    Returns:
        For the examples: `tokens` and `response` (whether each is part of one), flat; `offsets`,
        where each begins, and the end; `row`, which row each is of. For the rows: `lengths`,
        tokens before anything was cut. `fit`: the numbers of `Fit`.
    """
    kind = id_type(len(tokenizer))
    tokens: list[NDArray[np.generic]] = []
    response: list[NDArray[np.bool_]] = []
    row_of: list[int] = []
    lengths: list[int] = []
    fit = {field.name: 0 for field in fields(Fit)}
    for number, (ids, answers, places) in enumerate(_tokenised(rows, writer, tokenizer, report)):
        lengths.append(len(ids))
        fit["rows"] += 1
        fit["longest"] = max(fit["longest"], len(ids))
        parts = list(_fitted(ids, answers, places, limit, writer.plain, loss, fit))
        useful = [at for at in parts if _counts(answers[at], loss)]
        for at in useful:
            tokens.append(ids[at].astype(kind))
            response.append(answers[at])
            row_of.append(number)
        fit["left_out"] += not useful
    sizes = [len(piece) for piece in tokens]
    return {
        "tokens": np.concatenate(tokens) if tokens else np.zeros(0, kind),
        "response": np.concatenate(response) if response else np.zeros(0, bool),
        "offsets": np.cumsum([0, *sizes], dtype=np.int64),
        "row": np.array(row_of, np.int64),
        "lengths": np.array(lengths, np.int32),
        "fit": np.array(list(fit.values()), np.int64),
    }


def kept_parts(length: int, first: int, end: int, opening: int, limit: int) -> tuple[int, int, int]:
    """Say what stays of a row: the tokens before a, and those from b to c.

    Args:
        length: tokens of the row.
        first: where its first response begins.
        end: where that ends.
        opening: tokens at the start to keep if they fit, a quarter of the limit at most.
        limit: tokens that may stay.
    """
    if length <= limit:
        return 0, 0, length
    opening = min(opening, first, limit // 4)
    if end - first <= limit:
        opening = min(opening, limit - (end - first))
        removed = max(0, end - limit)
    else:
        removed = max(0, first - limit // 2)
    begin = opening + removed
    return opening, begin, min(length, begin + limit - opening)


def _tokenised(
    rows: Iterable[Mapping[str, str]],
    writer: Writer,
    tokenizer: PreTrainedTokenizerBase,
    report: Report,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_], tuple[int, int, int]]]:
    """Yield each row's ids, which of them are a response's, and (first, end, opening) in tokens."""
    end_of_text = tokenizer.eos_token_id
    for chunk in _chunks(rows):
        written: list[Written] = []
        for row in chunk:
            try:
                written.append(writer.write(row))
            except DataError as error:
                report(error)
                written.append(Written("", []))
        coded = tokenizer(
            [one.text for one in written],
            add_special_tokens=not writer.whole,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for one, found, spans in zip(
            written, coded["input_ids"], coded["offset_mapping"], strict=True
        ):
            ids = np.array(found, np.int64)
            starts, ends = np.array(spans, np.int64).reshape(-1, 2).T
            answers = np.zeros(len(ids), bool)
            for start, end in one.responses:
                answers |= (starts < end) & (ends > start)
            opening = int((ends > one.opening).argmax()) if (ends > one.opening).any() else 0
            # The end-of-text token follows the one response, if the text does not bring its own.
            if not writer.whole and end_of_text is not None and one.responses:
                if len(ids) and ids[-1] == end_of_text:
                    ids, answers = ids[:-1], answers[:-1]
                ids, answers = np.append(ids, end_of_text), np.append(answers, True)
            first = int(answers.argmax())
            end = len(ids)
            if len(one.responses) > 1:
                end = int(np.flatnonzero(starts < one.responses[0][1])[-1]) + 1
            yield ids, answers, (first, end, opening)


def _fitted(
    ids: NDArray[np.int64],
    answers: NDArray[np.bool_],
    places: tuple[int, int, int],
    limit: int,
    plain: bool,
    loss: str,
    fit: dict[str, int],
) -> Iterator[NDArray[np.int64]]:
    """Yield the positions of each example that a row becomes, and count what was cut."""
    positions = np.arange(len(ids))
    if len(ids) <= limit:
        yield positions
    elif plain and limit > 1:
        starts = range(0, len(ids) - 1, limit - 1)
        fit["split"] += 1
        fit["pieces"] += len(starts)
        yield from (positions[start : start + limit] for start in starts)
    else:
        a, b, c = (0, 0, limit) if loss == "all" else kept_parts(len(ids), *places, limit)
        fit["cut"] += 1
        fit["prompts_cut"] += b > a
        fit["responses_cut"] += bool(answers[c:].any())
        yield np.concatenate([positions[:a], positions[b:c]])


def _counts(answers: NDArray[np.bool_], loss: str) -> bool:
    """Whether an example has a token to predict: the first of all is given."""
    return len(answers) > 1 if loss == "all" else bool(answers[1:].any())


def _chunks(rows: Iterable[Mapping[str, str]]) -> Iterator[list[Mapping[str, str]]]:
    walked = iter(rows)
    while chunk := list(itertools.islice(walked, _CHUNK)):
        yield chunk
