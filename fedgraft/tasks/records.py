"""Rows as files and Hub datasets hold them, checked column by column into a table of texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from fedgraft.errors import DataError
from fedgraft.tasks.messages import read_messages

if TYPE_CHECKING:
    import datasets

Row = dict[str, Any]
Report = Callable[[DataError], None]
"""What is told of a broken row: raises, or notes it and lets the row be left out."""

SITE = "site (folder or file)"
"""The column with the sub-folder or file that a row comes from, where those are the sites."""
PLACE = "(place)"
"""The column that says where each chat record stands, for what only its template can refuse."""
DIGEST = "(digest)"
"""The column with the SHA-256 of each whole row as its file holds it."""


def refuse(error: DataError) -> NoReturn:
    """Raise what is reported: the first broken row ends the reading."""
    raise error


@dataclass(frozen=True)
class Columns:
    """Which columns a task reads, and what they must hold.

    Attributes:
        text: text or numbers, not blank.
        blank: text or numbers that may be blank or null, and then are "".
        label: text or whole numbers, kept as text: one of a few classes.
        chat: a list of messages, kept as the JSON of `read_messages`.
        other: anything, kept as text; None where a row has nothing there.
        digest: whether `DIGEST` is kept, of all columns that the row has.
    """

    text: tuple[str, ...] = ()
    blank: tuple[str, ...] = ()
    label: str | None = None
    chat: str | None = None
    other: tuple[str, ...] = ()
    digest: bool = False

    def required(self) -> tuple[str, ...]:
        """Return those in which every row must have something."""
        named = (name for name in (self.label, self.chat) if name is not None)
        return (*self.text, *named)


@dataclass(frozen=True)
class Rows:
    """The rows of one split as its file holds them.

    Attributes:
        source: the file or folder, or the Hub's data set and split.
        unit: what `places` counts: "line", "row" or "file".
        columns: the names found, in the order of the file.
        rows: the values of each row by column name.
        places: the line or row number of each row, from 1; in a folder, with the file's name.
    """

    source: str
    unit: str
    columns: list[str]
    rows: list[Row]
    places: Sequence[int | str]

    def __len__(self) -> int:
        return len(self.rows)

    def table(self, wanted: Columns, report: Report = refuse) -> datasets.Dataset:
        """Check every row and keep the wanted columns, all of them text, and `SITE`.

        Args:
            wanted: the columns.
            report: is given the error of each broken row, which is then left out.

        Raises:
            DataError: a column that no row has (with those found), or a row whose value is
                missing, blank or of a wrong type (with its line).
        """
        import datasets

        required = wanted.required()
        blank = [name for name in dict.fromkeys(wanted.blank) if name not in required]
        sites = (SITE,) if SITE in self.columns else ()
        other = [n for n in (*wanted.other, *sites) if n not in (*required, *blank)]
        for name in (*required, *blank, *other):
            if name not in self.columns:
                raise DataError(
                    f"{self.source} has no column {name!r}; it has {', '.join(self.columns)}",
                    "Name one of these in task.text-field, task.label-field, task.template or "
                    "federation.partition-column, or mend the file.",
                )
        names = [*required, *blank, *other, *([PLACE] if wanted.chat else [])]
        names += [DIGEST] if wanted.digest else []
        made: dict[str, list[str | None]] = {name: [] for name in names}
        for row, place in zip(self.rows, self.places, strict=True):
            try:
                checked = self._check(row, place, wanted, blank, other)
            except DataError as error:
                report(error)
                continue
            for name, value in checked.items():
                made[name].append(value)
        features = datasets.Features({name: datasets.Value("string") for name in made})
        return datasets.Dataset.from_dict(made, features=features)

    def _check(
        self,
        row: Mapping[str, Any],
        place: int | str,
        wanted: Columns,
        blank: Sequence[str],
        other: Sequence[str],
    ) -> dict[str, str | None]:
        """Return one row's values as the table keeps them."""
        checked: dict[str, str | None] = {}
        for name in wanted.required():
            if name == wanted.chat:
                checked[name] = self._messages(row.get(name), name, place)
                checked[PLACE] = f"{self.source}, {self.unit} {place}"
                continue
            text = self._text(row.get(name), name, place)
            if not text.strip():
                raise self._broken(place, f"has nothing in column {name!r}")
            checked[name] = text.strip() if name == wanted.label else text
        for name in blank:
            if name not in row:
                raise self._broken(place, f"has no column {name!r}")
            checked[name] = self._text(row.get(name), name, place)
        for name in other:
            value = row.get(name)
            checked[name] = None if value in (None, "") else str(value)
        if wanted.digest:
            checked[DIGEST] = _digest(row)
        for name, kept in checked.items():
            try:
                (kept or "").encode()
            except UnicodeEncodeError:
                raise self._broken(place, f"holds half a character in column {name!r}") from None
        return checked

    def _messages(self, value: Any, name: str, place: int | str) -> str:
        try:
            return json.dumps(read_messages(value), ensure_ascii=False)
        except ValueError as error:
            raise self._broken(place, f"{error} in column {name!r}") from None

    def _text(self, value: Any, name: str, place: int | str) -> str:
        if value is None:
            return ""
        if isinstance(value, (list, dict)):
            kind = "a list" if isinstance(value, list) else "an object"
            raise self._broken(place, f"holds {kind} in column {name!r}, where text is wanted")
        return str(value)

    def _broken(self, place: int | str, complaint: str) -> DataError:
        return broken(self.source, self.unit, place, complaint)


def broken(source: str, unit: str, place: int | str, complaint: str) -> DataError:
    """Return the error for one broken row."""
    return DataError(f"{source}, {unit} {place} {complaint}", f"Mend or delete that {unit}.")


def _digest(row: Mapping[str, Any]) -> str:
    """Return a row's SHA-256, the same in any order of its columns and wherever its file lies."""
    whole = {name: value for name, value in row.items() if name != SITE}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()
