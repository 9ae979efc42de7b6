"""Folders of data: a file for each split, a file for each client, or documents.

- `train`, and where there are any `validation` and `test`, all of one suffix.
- Where `federation.partition` is natural and no column is named: a file for each client, named as
  the client is, beside the optional validation and test files.
- Text files (.txt, .md) alone: a document each; sub-folders are sites. Documents in folders named
  train, validation and test are those splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedgraft.errors import DataError
from fedgraft.tasks.data_files import READERS, read_rows
from fedgraft.tasks.records import SITE, Report, Row, Rows, broken

NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
"""What files, folders and Hub splits of each split may be called."""
DOCUMENTS = (".txt", ".md")


def read_folder(
    folder: Path, text_field: str, headerless: Sequence[str], report: Report, *, by_file: bool
) -> dict[str, Rows]:
    """Read the splits in a folder.

    Args:
        folder: as the module says.
        text_field: the column that a document's text goes to.
        headerless: as for `read_rows`.
        report: as for `read_rows`.
        by_file: whether files may be the clients.

    Raises:
        DataError: no training data, files of several suffixes, or `read_rows` refuses one.
    """
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and f.suffix.lower() in READERS]
    if not files and (documents := _documents(folder)):
        return _read_documents(folder, documents, text_field, report)
    found = _splits(files)
    rows = {}
    if "train" not in found:
        sites = [file for file in files if file not in found.values()]
        if not by_file or not sites:
            raise _no_training_file(folder, sites)
        _check_suffixes([*sites, *found.values()])
        rows["train"] = _joined(folder, [read_rows(f, headerless, report) for f in sites], sites)
    else:
        _check_suffixes([found["train"], *found.values()])
    rows |= {name: read_rows(file, headerless, report) for name, file in found.items()}
    return {name: rows[name] for name in NAMES if name in rows}


def _splits(files: Sequence[Path]) -> dict[str, Path]:
    """Tell by their names which files are splits."""
    found: dict[str, Path] = {}
    for path in files:
        for name, aliases in NAMES.items():
            if path.stem.lower() not in aliases:
                continue
            if name in found:
                raise DataError(
                    f"{found[name]} and {path} both hold the {name} split", "Move one of them away."
                )
            found[name] = path
    return found


def _check_suffixes(files: Sequence[Path]) -> None:
    first = files[0]
    for path in files:
        if path.suffix != first.suffix:
            raise DataError(
                f"{path} is not a {first.suffix} file like {first}",
                "Write all of them in one format.",
            )


def _no_training_file(folder: Path, sites: Sequence[Path]) -> DataError:
    suffixes = ", ".join(READERS)
    if sites:
        remedy = (
            f"Name one of its files train, or set federation.partition to natural to take "
            f"{sites[0].name} and the others for one client each."
        )
    else:
        remedy = (
            f"Name one of its files train, with one of the suffixes {suffixes}; validation and "
            "test beside it are optional."
        )
    return DataError(f"folder {folder} holds no training file", remedy)


def _joined(folder: Path, parts: Sequence[Rows], files: Sequence[Path]) -> Rows:
    """Lay the rows of several files together, each with its file's stem as its site."""
    rows: list[Row] = []
    places: list[int | str] = []
    for part, file in zip(parts, files, strict=True):
        rows += [row | {SITE: file.stem} for row in part.rows]
        places += [f"{place} of {file.name}" for place in part.places]
    columns = dict.fromkeys(name for part in parts for name in part.columns)
    return Rows(str(folder), parts[0].unit, [*columns, SITE], rows, places)


def _documents(folder: Path) -> list[Path]:
    """Return the text files below a folder, sorted; hidden ones are none."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in DOCUMENTS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _read_documents(
    folder: Path, documents: Sequence[Path], text_field: str, report: Report
) -> dict[str, Rows]:
    split_of = {alias: name for name, aliases in NAMES.items() for alias in aliases}
    roots = {path.relative_to(folder).parts[0].lower() for path in documents}
    divided = "train" in roots and roots <= set(split_of)
    found: dict[str, list[tuple[Path, tuple[str, ...]]]] = {}
    for path in documents:
        *parents, _ = path.relative_to(folder).parts
        split = split_of[parents.pop(0).lower()] if divided else "train"
        found.setdefault(split, []).append((path, tuple(parents)))
    return {split: _documents_of(folder, held, text_field, report) for split, held in found.items()}


def _documents_of(
    folder: Path,
    documents: Sequence[tuple[Path, tuple[str, ...]]],
    text_field: str,
    report: Report,
) -> Rows:
    """Read one split's documents; where none is in a sub-folder, there are no sites."""
    sited = any(parents for _, parents in documents)
    rows: list[Row] = []
    places: list[int | str] = []
    for path, parents in documents:
        name = str(path.relative_to(folder))
        if sited and not parents:
            report(broken(str(folder), "file", name, "lies beside the sub-folders, in none"))
            continue
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            report(broken(str(folder), "file", name, "is not UTF-8 text"))
            continue
        except OSError as error:
            report(broken(str(folder), "file", name, f"cannot be read: {error.strerror}"))
            continue
        rows.append({text_field: text} | ({SITE: parents[0]} if sited else {}))
        places.append(name)
    return Rows(str(folder), "file", [text_field, *([SITE] if sited else [])], rows, places)
