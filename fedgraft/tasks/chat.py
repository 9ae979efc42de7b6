"""Chat records written by the tokenizer's own template, every turn of the assistant a response.

A template that marks what the assistant says (`{% generation %}`) is taken at its word. For any
other, a turn is found by writing the conversation up to it and up to its end; what follows the
words, the end-of-turn token, belongs to it. Templates that write a turn otherwise once others
follow it (Qwen3's, say) are asked a second way: the words are exchanged for a mark, and what
changes is the turn. Neither guess goes unverified.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any

from fedgraft.errors import DataError
from fedgraft.tasks.messages import Message
from fedgraft.tasks.records import PLACE, Columns
from fedgraft.tasks.templates import Written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DEFAULT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'].capitalize() }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For a tokenizer without a template: `User: ...` and `Assistant: ...` with its end-of-text token.

Plain words, since a tokenizer that was made for no chat has no tokens for ChatML's marks.
"""
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FORMATS = ("%d %b %Y", "%Y-%m-%d", "%B %d, %Y", "%d %B %Y", "%d/%m/%Y", "%A, %B %d, %Y")
_DAY = {form: date(2024, 7, 26).strftime(form) for form in _FORMATS}
"""The day that templates which print one are told, the one that Llama 3's fall back to."""
_CLOCK = (
    f"{{%- macro strftime_now(form) -%}}{{{{ {_DAY}.get(form, '26 Jul 2024') }}}}{{%- endmacro -%}}"
)
"""Goes before a template that asks what day it is: tomorrow, on a resume, or on another client the
clock's own answer would write other tokens."""
_MARKS = ("\ue000\ue001", "\ue002\ue003")  # private characters: nobody's words begin with them


class ChatWriter:
    """Writes the records of one column.

    Args:
        column: a table's column with the JSON of `messages.read_messages`.
        tokenizer: brings the template and names the special tokens; None writes by `DEFAULT`
            without special tokens.

    Attributes:
        own: whether the template is the tokenizer's own.
        based: whether there is a tokenizer.
    """

    whole = True
    plain = False

    def __init__(self, column: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.column = column
        self._tokenizer = tokenizer
        own = tokenizer is not None and tokenizer.chat_template is not None
        self.own, self.based = own, tokenizer is not None
        self.source: str = tokenizer.get_chat_template() if tokenizer and own else DEFAULT
        if "strftime_now" in self.source:
            self.source = _CLOCK + self.source
        self._marked = bool(_MARKED.search(self.source))
        if tokenizer is not None and not own:
            log.warning(
                "the tokenizer has no chat template: conversations are written as "
                "'User: ...' and 'Assistant: ...'"
            )

    def columns(self) -> Columns:
        """Return the one column."""
        return Columns(chat=self.column)

    def write(self, row: Mapping[str, str]) -> Written:
        """Write one conversation.

        Raises:
            DataError: the template refuses it, or does not show where the assistant speaks.
        """
        messages: list[Message] = json.loads(row[self.column])
        try:
            text, responses = self._find(messages)
        except _RefusedError as error:
            place = row.get(PLACE) or "a conversation"
            raise DataError(
                f"{place} cannot be written by the chat template: {error}",
                "Mend or delete it, or choose a base with another chat template.",
            ) from None
        first = next((m["content"] for m in messages if m["role"] == "user"), "").strip()
        return Written(text, responses, opening=max(0, text.find(first)) if first else 0)

    def ask(self, prompt: str) -> str:
        """Return a user's words as a conversation that the assistant is to go on with.

        Raises:
            DataError: the template refuses it.
        """
        try:
            return self._render([{"role": "user", "content": prompt}], prompt=True)[0]
        except _RefusedError as error:
            raise DataError(
                f"the prompt {prompt!r} cannot be written by the chat template: {error}",
                "Change evaluate.prompts, or choose a base with another chat template.",
            ) from None

    def _find(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        if self._marked:
            text, spans = self._render(messages, marked=True)
            if spans and all(end <= len(text) for _, end in spans):
                return text, spans
        text, _ = self._render(messages)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                span = self._grown(text, messages, number) or self._exchanged(
                    text, messages, number
                )
                if span is None or (spans and span[0] < spans[-1][1]):
                    raise _RefusedError(f"it does not show where message {number + 1} stands")
                spans.append(span)
        return text, spans

    def _grown(self, text: str, messages: Sequence[Message], number: int) -> tuple[int, int] | None:
        """Find a turn as what is new once it has been said."""
        try:
            before, _ = self._render(messages[:number], prompt=True)
            after = self._render(messages[: number + 1])[0].rstrip()
        except _RefusedError:
            return None
        # The mark of the assistant's turn may end in a space that its words take the place of.
        before = before if after.startswith(before) else before.rstrip()
        if not before or not text.startswith(after) or not after.startswith(before):
            return None
        words = messages[number]["content"].strip()
        grown = len(after) > len(before) and words in after[len(before) :]
        return (len(before), len(after)) if grown else None

    def _exchanged(
        self, text: str, messages: Sequence[Message], number: int
    ) -> tuple[int, int] | None:
        """Find a turn as what changes with its words, and its end as what follows it at the end."""
        words = messages[number]["content"].strip()
        found = self._difference(text, messages, number)
        if found is None or text[found[0] : found[1]] not in words:
            return None
        start, end = found
        try:
            said = messages[: number + 1]
            until, _ = self._render(said)
            last = self._difference(until, said, number)
        except _RefusedError:
            return None
        closing = until[last[1] :].rstrip() if last else ""
        return start, end + (len(closing) if text.startswith(closing, end) else 0)

    def _difference(
        self, text: str, messages: Sequence[Message], number: int
    ) -> tuple[int, int] | None:
        """Return where `text` differs from the same with other words in one message."""
        spans = []
        for mark in _MARKS:
            changed = [*messages]
            changed[number] = {"role": messages[number]["role"], "content": mark}
            other, _ = self._render(changed)
            start = _alike(text, other)
            end = len(text) - (len(other) - start - len(mark))
            if end < start or other != text[:start] + mark + text[end:]:
                return None
            spans.append((start, end))
        return spans[0] if spans[0] == spans[1] else None

    def _render(
        self, messages: Sequence[Message], *, prompt: bool = False, marked: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text and, where asked for, what the template marks as generated."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        special: dict[str, Any] = (
            {} if self._tokenizer is None else self._tokenizer.special_tokens_map
        )
        try:
            made: Any = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=self.source,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marked,
                **special,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise _RefusedError(str(error).splitlines()[0] if str(error) else repr(error)) from None
        texts, spans = made
        return texts[0], [(start, end) for start, end in spans[0]] if marked else []


def _alike(one: str, other: str) -> int:
    """Return how many characters two texts have in common from the start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


class _RefusedError(Exception):
    """A conversation that the template cannot write; says why."""
