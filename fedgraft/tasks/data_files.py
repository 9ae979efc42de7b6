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
from pathlib import Path
from typing import Any

from fedgraft.errors import DataError
from fedgraft.tasks.records import Report, Row, Rows, broken, refuse


def read_rows(path: Path, headerless: Sequence[str] = (), report: Report = refuse) -> Rows:
    """Read one data file; its suffix says what it is.

    Args:
        path: a .csv, .tsv, .jsonl or .parquet file.
        headerless: the names of the columns of a CSV or TSV file without a header: accepted when
            the first line has exactly as many columns and none of these names.
        report: is given the error of each broken row, which is then left out; raises by default.

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
    rows = READERS[suffix](str(path), raw, headerless, report)
    if not rows:
        raise DataError(f"{path} holds no rows", "Fill it, or name another file in task.data.")
    return rows


def _decode(source: str, raw: bytes, report: Report) -> str:
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        pass
    for place, line in enumerate(raw.split(b"\n"), start=1):
        try:
            line.decode()
        except UnicodeDecodeError:
            report(broken(source, "line", place, "is not UTF-8 text"))
    return raw.decode(errors="replace")


def _read_csv(source: str, raw: bytes, headerless: Sequence[str], report: Report) -> Rows:
    return _delimited(source, raw, headerless, report, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _read_tsv(source: str, raw: bytes, headerless: Sequence[str], report: Report) -> Rows:
    return _delimited(source, raw, headerless, report, delimiter="\t", quoting=csv.QUOTE_NONE)


def _delimited(
    source: str, raw: bytes, headerless: Sequence[str], report: Report, **dialect: Any
) -> Rows:
    lines = _records(source, _decode(source, raw, report), dialect, report)
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
            complaint = f"has {count} where {len(columns)} are wanted"
            report(broken(source, "line", place, complaint))
            continue
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


def _records(
    source: str, text: str, dialect: dict[str, Any], report: Report
) -> Iterator[tuple[int, list[str]]]:
    """Yield each record with the line it starts on; blank lines are skipped.

    Nothing after a quote that never closes can be told apart: reading ends there.
    """
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a cell may hold a long document
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **dialect)
    while True:
        place = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            report(broken(source, "line", place, f"cannot be read: {error}"))
            return
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


def _read_jsonl(source: str, raw: bytes, headerless: Sequence[str], report: Report) -> Rows:
    rows: list[Row] = []
    places: list[int | str] = []
    columns: dict[str, None] = {}
    # Not splitlines(): JSON text may hold other line separators, U+2028 say, as they are.
    for place, line in enumerate(_decode(source, raw, report).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            complaint = f"is not valid JSON: {error.msg} (column {error.colno})"
            report(broken(source, "line", place, complaint))
            continue
        except RecursionError:
            report(broken(source, "line", place, "is nested too deeply"))
            continue
        if not isinstance(row, dict):
            report(broken(source, "line", place, "is not a JSON object in braces"))
            continue
        columns |= dict.fromkeys(row)
        rows.append(row)
        places.append(place)
    return Rows(source, "line", list(columns), rows, places)


def _read_parquet(source: str, raw: bytes, headerless: Sequence[str], report: Report) -> Rows:
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


READERS: dict[str, Callable[[str, bytes, Sequence[str], Report], Rows]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
