"""Tokenised rows on disk: written once, then mapped into every process that asks for the same.

An entry is a folder of .npy files named by a hash of all that its content depends on. It is
written under a temporary name and renamed, checked when it is opened (sizes and checksums), and
built anew where it is broken. Nothing depends on it: where it cannot be written, the arrays stay in
memory.

Tokens are the user's texts, as good as plain. The folder (0700; files 0600) is
`~/.cache/fedgraft/tokens`, below XDG_CACHE_HOME where that is set; the environment variable
FEDGRAFT_TOKEN_CACHE names another one, or switches it off ("off"). Entries that nobody has opened
for 30 days are deleted when a new one is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]
"""Named one-dimensional arrays."""

VARIABLE = "FEDGRAFT_TOKEN_CACHE"
SMALLEST = 1 << 20
"""Bytes of text below which nothing is kept: tokenising them takes a fraction of a second."""
KEPT_DAYS = 30
_CONTENTS = "contents.json"
_ENTRY = re.compile(r"[0-9a-f]{64}|[0-9a-f]{64}\.[\w-]+\.tmp")


def cache_folder() -> Path | None:
    """Return where entries are kept; None where that is switched off."""
    chosen = os.environ.get(VARIABLE, "")
    if chosen.lower() in ("off", "none", "0"):
        return None
    base = os.environ.get("XDG_CACHE_HOME", "") or "~/.cache"
    try:
        return Path(chosen or f"{base}/fedgraft/tokens").expanduser()
    except RuntimeError:  # a user without a home
        return None


def key_of(parts: Iterable[str]) -> str:
    """Return the hash of texts in this order, each with its length: the name of an entry."""
    total = hashlib.sha256()
    for part in parts:
        raw = part.encode(errors="surrogatepass")
        total.update(len(raw).to_bytes(8, "little"))
        total.update(raw)
    return total.hexdigest()


def kept(size: int, identity: Callable[[], Iterable[str]], build: Callable[[], Arrays]) -> Arrays:
    """Return the arrays of an entry, mapped from disk; built first where there is no whole entry.

    Args:
        size: bytes of text; less than `SMALLEST` is built in memory every time.
        identity: yields all that the arrays depend on.
        build: makes the arrays.
    """
    folder = cache_folder()
    if folder is None or size < SMALLEST:
        return build()
    key = key_of(identity())
    entry = folder / key
    found = _open(entry)
    if found is not None:
        with contextlib.suppress(OSError):
            os.utime(entry)
        return found
    arrays = build()
    try:
        _write(folder, key, arrays)
    except OSError as error:
        log.warning("tokens are kept in memory: %s cannot be written: %s", folder, error.strerror)
        return arrays
    mapped = _open(entry)
    return arrays if mapped is None else mapped


def _open(entry: Path) -> Arrays | None:
    """Map an entry; None where it is not there or not whole."""
    try:
        if not entry.is_dir():
            return None
        contents: dict[str, int] = json.loads((entry / _CONTENTS).read_bytes())
        if not contents:
            raise ValueError("it names no array")
        arrays: Arrays = {}
        for name, checksum in contents.items():
            path = entry / f"{name}.npy"
            try:
                arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
            except ValueError:  # an empty array cannot be mapped; a broken one cannot be read
                arrays[name] = np.load(path, allow_pickle=False)
            if _checksum(arrays[name]) != checksum:
                raise ValueError(f"{path.name} is damaged")
    except (OSError, ValueError, EOFError, AttributeError) as error:
        log.warning("the tokens kept in %s are made anew: %s", entry, error)
        return None
    return arrays


def _write(folder: Path, key: str, arrays: Arrays) -> None:
    """Write an entry beside its place and put it there; an older one makes way."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f"{key}.", suffix=".tmp", dir=folder))  # of mode 0700
    try:
        for name, array in arrays.items():
            with _private(made / f"{name}.npy") as descriptor, os.fdopen(descriptor, "wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        contents = {name: _checksum(array) for name, array in arrays.items()}
        with _private(made / _CONTENTS) as descriptor, os.fdopen(descriptor, "w") as file:
            json.dump(contents, file)
        try:
            made.rename(folder / key)
        except OSError:  # a broken one stands there, or another process was as fast
            if _open(folder / key) is None:
                shutil.rmtree(folder / key)
                made.rename(folder / key)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    _forget_old(folder)


@contextlib.contextmanager
def _private(path: Path) -> Iterator[int]:
    """Create a file that only its owner may read."""
    yield os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def _checksum(array: NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(array).data)


def _forget_old(folder: Path) -> None:
    """Delete what nobody has opened for a long time, half-written entries included."""
    oldest = time.time() - KEPT_DAYS * 86400
    with contextlib.suppress(OSError):
        for entry in folder.iterdir():
            if _ENTRY.fullmatch(entry.name) and entry.stat().st_mtime < oldest:
                shutil.rmtree(entry, ignore_errors=True)
