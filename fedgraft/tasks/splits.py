"""Where a task's data is, and its three splits: given as files, or cut from the training rows.

`task.data` names one file, a folder (`fedgraft.tasks.folders`), or a Hub dataset: `owner/name`, or
`owner/name:subset` for one of several. A split that is not given is cut from the training rows by a
fixed stream, the same for every run and every seed: `evaluate.fraction` of them for validation, as
many again for test.
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
from fedgraft.tasks import messages
from fedgraft.tasks.data_files import READERS, read_rows
from fedgraft.tasks.folders import NAMES, read_folder
from fedgraft.tasks.hub import local_path, reason
from fedgraft.tasks.records import Report, Rows, refuse

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "validation", "test")


def load_rows(
    config: Config, headerless: Sequence[str] = (), report: Report = refuse
) -> dict[str, Rows]:
    """Read the splits that `task.data` brings: "train", and any of "validation" and "test".

    Args:
        config: its `task` group.
        headerless: as for `read_rows`.
        report: as for `read_rows`.

    Raises:
        ConfigError: `task.data` is not set.
        DataError: nothing is there, it holds no training file, or `read_rows` refuses a file.
    """
    data = data_source(config)
    path = Path(data).expanduser() if Path(data).suffix in READERS else local_path(data)
    if path is None:
        return _hub_rows(data)
    if path.is_dir():
        federation = config.federation
        by_file = federation.partition == "natural" and federation.partition_column is None
        return read_folder(path, config.task.text_field, headerless, report, by_file=by_file)
    return {"train": read_rows(existing(path), headerless, report)}


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
        if isinstance(feature, (datasets.Value, datasets.ClassLabel)) or name in messages.COLUMNS
    ]
    rows = table.select_columns(plain).to_list()
    return Rows(source, "row", plain, rows, list(range(1, len(rows) + 1)))
