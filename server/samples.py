"""A handful of fixed prompts, continued after each evaluation and kept in samples.jsonl."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fedgraft.adapter import Adapter
from fedgraft.errors import ConfigError
from fedgraft.generation import write
from fedgraft.resident_model import ResidentModel
from fedgraft.run_directory import RunDirectory
from fedgraft.tasks.questions import Question
from fedgraft.tasks.task import Task

log = logging.getLogger(__name__)
SHOWN = 3
"""Rows of the validation split that are shown where answers are scored and no prompts are set."""


class Samples:
    """What one run's global adapter writes, round by round.

    Args:
        task: gives the prompts and their data.
        model: writes.
        directory: keeps what was written.
        personal: the rule leaves a part of the adapter on clients; nothing is written then, since
            the server's part alone is nobody's model.

    Raises:
        ConfigError: prompts are set for a task whose model writes no text.
    """

    def __init__(
        self, task: Task, model: ResidentModel, directory: RunDirectory, *, personal: bool
    ) -> None:
        self._task, self._model, self._directory = task, model, directory
        self.questions = fixed_prompts(task)
        if personal and self.questions:
            log.info("no samples: parts of the adapter are the clients' own")
            self.questions = ()

    def write(self, round: int, adapter: Adapter) -> None:
        """Write on from every prompt with this round's adapter, and keep it.

        Raises:
            RunError: the disk is full or refuses the write.
        """
        if not self.questions:
            return
        texts = write(self._model, self._task, adapter, self.questions)
        self._directory.append_samples(
            {"round": round, "prompt": q.prompt, "reference": q.reference, "text": text}
            for q, text in zip(self.questions, texts, strict=True)
        )


def fixed_prompts(task: Task) -> Sequence[Question]:
    """Return `evaluate.prompts`; unset, a few validation rows where answers are scored, or none.

    Raises:
        ConfigError: prompts are set for a task whose model writes no text, or one is empty.
    """
    settings = task.config.evaluate
    if settings.prompts is not None:
        asked = [task.asked(prompt) for prompt in settings.prompts]
        for question in asked:
            if not len(question.tokens):
                raise ConfigError(
                    f"evaluate.prompts holds {question.prompt!r}, which has no token",
                    "Write a word at least: this base's texts start with nothing of their own.",
                )
        return asked
    return task.questions("validation", None, SHOWN) if settings.answers is not None else ()
