"""How a row becomes text, and where its response is in that: templates with placeholders.

`task.template` says it, "Question: {question}\\nAnswer: {answer}" say; its last placeholder is the
response. Without one, the columns found decide (`TEMPLATES`).
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from fedgraft.errors import ConfigError, DataError
from fedgraft.tasks.records import Columns

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
class Written:
    """One row as text.

    Attributes:
        text: what is tokenised.
        responses: where each response starts and ends in it, characters, ascending.
        opening: characters at its start that stay when a prompt has to be shortened.
    """

    text: str
    responses: list[tuple[int, int]]
    opening: int = 0


class Writer(Protocol):
    """Turns rows into text."""

    @property
    def source(self) -> str:
        """The template, as it is shown and as it tells encodings apart."""
        ...

    @property
    def whole(self) -> bool:
        """Whether the text brings the special tokens at its start and end itself."""
        ...

    @property
    def plain(self) -> bool:
        """Whether a row is one text without a prompt, which may be split into pieces."""
        ...

    def columns(self) -> Columns:
        """Return the columns that are read."""
        ...

    def write(self, row: Mapping[str, str]) -> Written:
        """Write one row of a table with these columns.

        Raises:
            DataError: the row cannot be written, with its line.
        """
        ...


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

    @property
    def whole(self) -> bool:
        """The tokenizer adds its special tokens."""
        return False

    @property
    def plain(self) -> bool:
        """Whether there is nothing but the response."""
        return self.source == f"{{{self.fields[0]}}}"

    def columns(self) -> Columns:
        """Return the response's column, which may not be blank, and the prompt's, which may."""
        *prompt, response = self.fields
        return Columns(text=(response,), blank=tuple(prompt))

    def write(self, row: Mapping[str, str]) -> Written:
        """Fill in a row; one with a blank `input` goes without that heading of Alpaca's."""
        if self.source == ALPACA_WITH_INPUT and not row["input"].strip():
            return Template.parse(ALPACA).write(row)
        text, number, opening, start, end = "", 0, 0, 0, 0
        for literal, name, _, _ in string.Formatter().parse(self.source):
            text += literal
            if name is not None:
                number += 1
                opening = len(text) if number == 1 else opening
                start, text = len(text), text + row[name]
                end = len(text)
        return Written(text, [(start, end)], opening)


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
