"""Where a task's data is, and its three splits: given as files, or cut from the training rows.

`task.data` names one file, a folder of files (train, and where there are any validation and
test), or a Hub dataset: `owner/name`, or `owner/name:subset` for one of several. A split that is
not given is cut from the training rows by a fixed stream, the same for every run and every seed:
`evaluate.fraction` of them for validation, as many again for test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedgraft.config import Config
from fedgraft.errors import ConfigError, DataError
from fedgraft.seeds import stream
from fedgraft.tasks.data_files import READERS, Rows, read_rows
from fedgraft.tasks.hub import local_path, reason

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "validation", "test")
NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
"""What files, folders and Hub splits of each split may be called."""


def load_rows(config: Config, headerless: Sequence[str] = ()) -> dict[str, Rows]:
    """Read the splits that `task.data` brings: "train", and any of "validation" and "test".

    Args:
        config: its `task` group.
        headerless: as for `read_rows`.

    Raises:
        ConfigError: `task.data` is not set.
        DataError: nothing is there, it holds no training file, or `read_rows` refuses a file.
    """
    data = data_source(config)
    path = Path(data).expanduser() if Path(data).suffix in READERS else local_path(data)
    if path is None:
        return _hub_rows(data)
    if path.is_dir():
        return {name: read_rows(file, headerless) for name, file in _files(path).items()}
    return {"train": read_rows(existing(path), headerless)}


def data_source(config: Config) -> str:
    """Return `task.data`.

    Raises:
        ConfigError: it is not set.
    """
    if config.task.data is None:
        raise ConfigError(
            f"task {config.task.name} needs data, and task.data is not set",
            "Set task.data to a file, a folder or a Hub dataset id.",
        )
    return config.task.data


def existing(path: Path) -> Path:
    """Return a path that exists.

    Raises:
        DataError: it does not.
    """
    if not path.exists():
        raise DataError(
            f"task.data is {str(path)!r}, and nothing is there",
            "Check the path, or name a Hub dataset such as owner/name.",
        )
    return path


def cut(
    sizes: Mapping[str, int], fraction: float, samples: int | None, looks: int | None = None
) -> dict[str, tuple[str, NDArray[np.int64]]]:
    """Say which rows make up each split.

    Args:
        sizes: how many rows each given split has; "train" is always given.
        fraction: the share of the training rows that makes up a split which is not given.
        samples: how many training rows to keep at most; the rest are left unused.
        looks: how many rows of validation, and of test, to keep at most.

    Returns:
        For each of "train", "validation" and "test" the name of the given split it comes from and
        the positions there, ascending.

    Raises:
        DataError: cutting would leave no row to train on.
    """
    total = sizes["train"]
    absent = [name for name in SPLITS if name not in sizes]
    share = max(1, round(fraction * total))
    if len(absent) * share >= total:
        raise DataError(
            f"the {total} training rows are too few to cut {' and '.join(absent)} from them",
            "Bring more rows, or validation and test files of their own.",
        )
    order = stream(0, "splits").permutation(total)
    made: dict[str, tuple[str, NDArray[np.int64]]] = {}
    for number, name in enumerate(absent):
        made[name] = ("train", np.sort(order[number * share : (number + 1) * share]))
    left = order[len(absent) * share :][:samples]
    made["train"] = ("train", np.sort(left))
    for name in sizes:
        if name != "train":
            made[name] = (name, np.arange(sizes[name]))
    for name in ("validation", "test"):
        source, rows = made[name]
        if looks is not None and len(rows) > looks:
            some = stream(0, "looks", client=name).permutation(len(rows))[:looks]
            made[name] = (source, rows[np.sort(some)])
    return {name: made[name] for name in SPLITS}


def _files(folder: Path) -> dict[str, Path]:
    """Find the splits' files in a folder, all of one suffix."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in READERS or not path.is_file():
            continue
        for name, aliases in NAMES.items():
            if path.stem.lower() not in aliases:
                continue
            if name in found:
                raise DataError(
                    f"{found[name]} and {path} both hold the {name} split", "Move one of them away."
                )
            found[name] = path
    if "train" not in found:
        suffixes = ", ".join(READERS)
        raise DataError(
            f"folder {folder} holds no training file",
            f"Name one of its files train, with one of the suffixes {suffixes}; "
            "validation and test beside it are optional.",
        )
    suffix = found["train"].suffix
    for path in found.values():
        if path.suffix != suffix:
            raise DataError(
                f"{path} is not a {suffix} file like {found['train']}",
                "Write all splits in one format.",
            )
    return found


def _hub_rows(data: str) -> dict[str, Rows]:
    """Download (or read from the cache) a Hub dataset's splits."""
    import datasets

    name, _, subset = data.partition(":")
    try:
        loaded = datasets.load_dataset(name, subset or None)
    except Exception as error:  # the builders raise whatever their formats' readers raise
        if isinstance(error, MemoryError):
            raise
        why, remedy = reason(error)
        raise DataError(
            f"task.data {data!r} is no local path, and as a Hub dataset it cannot be loaded: {why}",
            remedy or "Name a subset as owner/name:subset, or a local file.",
        ) from error
    found: dict[str, Rows] = {}
    for split, aliases in NAMES.items():
        held = next((alias for alias in aliases if alias in loaded), None)
        if held is not None:
            found[split] = _table_rows(f"{data}, split {held}", loaded[held])
    if "train" not in found:
        raise DataError(
            f"dataset {data!r} has no split named train; it has {', '.join(map(str, loaded))}",
            "Choose another dataset, or save one of its splits as a local file.",
        )
    return found


def _table_rows(source: str, table: datasets.Dataset) -> Rows:
    import datasets

    plain = [
        name
        for name, feature in table.features.items()
        if isinstance(feature, (datasets.Value, datasets.ClassLabel))
    ]
    rows = table.select_columns(plain).to_list()
    return Rows(source, "row", plain, rows, list(range(1, len(rows) + 1)))
