"""Text that the resident model writes: greedy, in batches, with the adapter that it holds.

Used twice: answers to the rows of a split, scored (`evaluate.answers`), and what follows a handful
of prompts, for people to read (`evaluate.prompts`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgraft.adapter import Adapter
from fedgraft.answers import exact_match, rouge_l
from fedgraft.devices import with_smaller_batches
from fedgraft.errors import ConfigError
from fedgraft.resident_model import ResidentModel
from fedgraft.tasks.questions import Question, Writing
from fedgraft.tasks.task import Task

log = logging.getLogger(__name__)
_SCORES = {"exact_match": exact_match, "rouge_l": rouge_l}


def evaluate(
    model: ResidentModel,
    task: Task,
    adapter: Adapter,
    split: str,
    client: int | None = None,
) -> dict[str, float]:
    """Return the metrics of an adapter on a split, those of written answers included.

    A client's own evaluation writes answers only where `evaluate.metric` is their score.

    Args:
        model: the resident model.
        task: the task, for its data.
        adapter: what to evaluate.
        split: "validation" or "test".
        client: on whose examples; the whole split for None.
    """
    examples = (task.test if split == "test" else task.validation)(client)
    metrics = model.evaluate(task, adapter, examples)
    settings = task.config.evaluate
    if settings.answers is None:
        return metrics
    name = settings.answers.replace("-", "_")
    if client is not None and task.metric != name:
        return metrics
    questions = task.questions(split, client, settings.answer_samples)
    if not questions:
        raise ConfigError(
            f"evaluate.answers is {settings.answers!r}, and no {split} row has a prompt",
            "Write the response after something in task.template.",
        )
    answers = write(model, task, adapter, questions)
    score = _SCORES[name]
    scores = [score(a, q.reference or "") for a, q in zip(answers, questions, strict=True)]
    return metrics | {name: fmean(scores), "answers": float(len(scores))}


def write(
    model: ResidentModel, task: Task, adapter: Adapter, questions: Sequence[Question]
) -> list[str]:
    """Load an adapter and return what the model writes after each question, in their order.

    Greedy decoding, `evaluate.max-new-tokens` at most, up to the base's end of text; whatever else
    the base's own generation settings ask for (sampling, penalties) is left out. Questions of like
    length share a batch, padded on the left.

    Raises:
        ConfigError: the task's model writes no text, or the base takes too few tokens.
    """
    settings, writing = task.config.evaluate, task.writing()
    room = None
    if writing.positions is not None:
        room = writing.positions - settings.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"evaluate.max-new-tokens is {settings.max_new_tokens}, and the base takes "
                f"{writing.positions} tokens, the prompt included",
                f"Set it to less than {writing.positions}.",
            )
    prompts = [q.tokens if room is None else q.tokens[-room:] for q in questions]
    cut = sum(len(p) < len(q.tokens) for p, q in zip(prompts, questions, strict=True))
    if cut:
        log.warning(
            "%d of %d prompts are longer than %d tokens and lost their beginning",
            cut,
            len(prompts),
            room,
        )
    size = settings.batch_size or task.evaluation_batch
    order = sorted(range(len(prompts)), key=lambda k: -len(prompts[k]))

    def in_batches(size: int) -> list[str]:
        texts = [""] * len(prompts)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            ids, mask = _left_padded([prompts[k] for k in batch], writing.pad)
            written = base.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device)
            )
            for k, row in zip(batch, written[:, ids.shape[1] :].cpu(), strict=True):
                tokens = row[: _first(row, ends)]
                texts[k] = str(writing.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        return texts

    model.use_threads()
    model.take(adapter)
    model.model.eval()
    with torch.inference_mode(), _greedy(model, writing, settings.max_new_tokens) as (base, ends):
        return with_smaller_batches(size, model.device, in_batches)


@contextmanager
def _greedy(
    model: ResidentModel, writing: Writing, length: int
) -> Iterator[tuple[Any, frozenset[int]]]:
    """Lend the base, set to write greedily, and the ids that end its texts.

    `generate` fills what a call leaves open from the base's own generation settings, an instruct
    model's penalties and temperature among them; so the settings themselves are put aside.
    """
    from transformers import GenerationConfig

    base: Any = model.model.get_base_model()  # type: ignore[operator]  # with LoRA in its layers
    own = base.generation_config
    ends = {writing.tokenizer.eos_token_id}
    if own is not None:
        ends |= set(np.atleast_1d(own.eos_token_id).tolist())  # some have several
    ends.discard(None)
    base.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=length,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=writing.pad,
        eos_token_id=sorted(ends) or None,
    )
    try:
        yield base, frozenset(ends)
    finally:
        base.generation_config = own


def _left_padded(rows: Sequence[NDArray[np.int64]], filler: int) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, (n, longest) each: texts end where the model goes on."""
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), filler, dtype=np.int64)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = row
        mask[number, longest - len(row) :] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _first(row: Tensor, ends: frozenset[int]) -> int:
    """Return where a text ends: at the first of these ids, or with the row."""
    return next((k for k, token in enumerate(row.tolist()) if token in ends), len(row))
