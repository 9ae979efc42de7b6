"""Data files read into rows, with the place of each row, so that a broken one can be named.

CSV (quoted as spreadsheets write it), TSV (plain: a tab always separates, a quote is just a
quote), JSON lines (one object a line) and Parquet. Text is UTF-8, and blank lines are skipped.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgraft.errors import DataError

if TYPE_CHECKING:
    import datasets

Row = dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """Which columns a task reads, and what they must hold.

    Attributes:
        text: text or numbers, not blank.
        blank: text or numbers that may be blank or null, and then are "".
        label: text or whole numbers, kept as text: one of a few classes.
        other: anything, kept as text; None where a row has nothing there.
    """

    text: tuple[str, ...] = ()
    blank: tuple[str, ...] = ()
    label: str | None = None
    other: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rows:
    """The rows of one split as its file holds them.

    Attributes:
        source: the file, or the Hub's data set and split.
        unit: what `places` counts: "line" or "row".
        columns: the names found, in the order of the file.
        rows: the values of each row by column name.
        places: the line or row number of each row, from 1.
    """

    source: str
    unit: str
    columns: list[str]
    rows: list[Row]
    places: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def table(self, wanted: Columns) -> datasets.Dataset:
        """Check every row and keep the wanted columns, all of them text.

        Raises:
            DataError: a column that no row has (with those found), or a row whose value is
                missing, blank or of a wrong type (with its line).
        """
        import datasets

        required = (*wanted.text, *([wanted.label] if wanted.label else []))
        blank = [name for name in dict.fromkeys(wanted.blank) if name not in required]
        other = [name for name in wanted.other if name not in (*required, *blank)]
        for name in (*required, *blank, *other):
            if name not in self.columns:
                raise DataError(
                    f"{self.source} has no column {name!r}; it has {', '.join(self.columns)}",
                    "Name one of these in task.text-field, task.label-field, task.template or "
                    "federation.partition-column, or mend the file.",
                )
        made: dict[str, list[str | None]] = {}
        for name in (*required, *blank, *other):
            made[name] = []
        for row, place in zip(self.rows, self.places, strict=True):
            for name in required:
                text = self._text(row.get(name), name, place)
                if not text.strip():
                    raise self._broken(place, f"has nothing in column {name!r}")
                made[name].append(text.strip() if name == wanted.label else text)
            for name in blank:
                if name not in row:
                    raise self._broken(place, f"has no column {name!r}")
                made[name].append(self._text(row.get(name), name, place))
            for name in other:
                value = row.get(name)
                made[name].append(None if value in (None, "") else str(value))
        features = datasets.Features({name: datasets.Value("string") for name in made})
        return datasets.Dataset.from_dict(made, features=features)

    def _text(self, value: Any, name: str, place: int) -> str:
        if value is None:
            return ""
        if isinstance(value, (list, dict)):
            kind = "a list" if isinstance(value, list) else "an object"
            raise self._broken(place, f"holds {kind} in column {name!r}, where text is wanted")
        return str(value)

    def _broken(self, place: int, complaint: str) -> DataError:
        return broken(self.source, self.unit, place, complaint)


def broken(source: str, unit: str, place: int, complaint: str) -> DataError:
    """Return the error for one broken row."""
    return DataError(f"{source}, {unit} {place} {complaint}", f"Mend or delete that {unit}.")


def read_rows(path: Path, headerless: Sequence[str] = ()) -> Rows:
    """Read one data file; its suffix says what it is.

    Args:
        path: a .csv, .tsv, .jsonl or .parquet file.
        headerless: the names of the columns of a CSV or TSV file without a header: accepted when
            the first line has exactly as many columns and none of these names.

    Raises:
        DataError: no such file, another suffix, no rows, or a broken row, with its line.
    """
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise DataError(
            f"{path} is no data file: its suffix is {suffix!r}",
            f"Use one of {', '.join(READERS)}.",
        )
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}", "Check the path and its permissions."
        ) from None
    rows = READERS[suffix](str(path), raw, headerless)
    if not rows:
        raise DataError(f"{path} holds no rows", "Fill it, or name another file in task.data.")
    return rows


def _decode(source: str, raw: bytes) -> str:
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise broken(source, "line", line, "is not UTF-8 text") from None


def _read_csv(source: str, raw: bytes, headerless: Sequence[str]) -> Rows:
    return _delimited(source, raw, headerless, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _read_tsv(source: str, raw: bytes, headerless: Sequence[str]) -> Rows:
    return _delimited(source, raw, headerless, delimiter="\t", quoting=csv.QUOTE_NONE)


def _delimited(source: str, raw: bytes, headerless: Sequence[str], **dialect: Any) -> Rows:
    lines = _records(source, _decode(source, raw), dialect)
    first = next(lines, None)
    if first is None:
        return Rows(source, "line", [], [], [])
    place, columns = first
    records: list[tuple[int, list[str]]] = []
    bare = len(columns) == len(headerless) and not set(columns) & set(headerless)
    if bare:
        records.append((place, columns))
        header, columns = columns, list(headerless)
    for place, values in lines:
        if len(values) != len(columns):
            count = f"{len(values)} column{'s' if len(values) != 1 else ''}"
            raise broken(source, "line", place, f"has {count} where {len(columns)} are wanted")
        records.append((place, values))
    if bare:
        _refuse_header(source, header, [values[-1] for _, values in records])
    return Rows(
        source,
        "line",
        columns,
        [dict(zip(columns, values, strict=True)) for _, values in records],
        [place for place, _ in records],
    )


def _records(source: str, text: str, dialect: dict[str, Any]) -> Iterator[tuple[int, list[str]]]:
    """Yield each record with the line it starts on; blank lines are skipped."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **dialect)
    while True:
        place = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise broken(source, "line", place, f"cannot be read: {error}") from None
        if values:
            yield place, values


def _refuse_header(source: str, header: list[str], labels: list[str]) -> None:
    """Refuse a file taken to have no header whose first line looks like one all the same."""
    counts = Counter(labels)
    if counts.pop(labels[0]) == 1 and counts and min(counts.values()) > 1:
        names = ", ".join(header)
        raise DataError(
            f"{source}, line 1 looks like a header ({names}) and names none of the wanted columns",
            f"Set task.text-field to {header[0]} and task.label-field to {header[-1]}.",
        )


def _read_jsonl(source: str, raw: bytes, headerless: Sequence[str]) -> Rows:
    rows: list[Row] = []
    places: list[int] = []
    columns: dict[str, None] = {}
    # Not splitlines(): JSON text may hold other line separators, U+2028 say, as they are.
    for place, line in enumerate(_decode(source, raw).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise broken(
                source, "line", place, f"is not valid JSON: {error.msg} (column {error.colno})"
            ) from None
        if not isinstance(row, dict):
            raise broken(source, "line", place, "is not a JSON object in braces")
        columns |= dict.fromkeys(row)
        rows.append(row)
        places.append(place)
    return Rows(source, "line", list(columns), rows, places)


def _read_parquet(source: str, raw: bytes, headerless: Sequence[str]) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(io.BytesIO(raw))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{source} is no Parquet file: {str(error).splitlines()[0]}", "Write it anew."
        ) from None
    rows: list[Row] = table.to_pylist()
    return Rows(source, "row", list(table.column_names), rows, list(range(1, len(rows) + 1)))


READERS: dict[str, Callable[[str, bytes, Sequence[str]], Rows]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
