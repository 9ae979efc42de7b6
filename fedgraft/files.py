"""Files that are whole or not there: written to a temporary name, synced, then renamed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgraft.errors import DiskFullError, RunError

if TYPE_CHECKING:  # processes that only write small files stay free of torch
    import torch

    from fedgraft.adapter import Tensors

METADATA_KEY = "fedgraft"
_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error that says what to do.

    Raises:
        DiskFullError: there is no space left.
        RunError: the file could not be written; what stood there before is untouched.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(
                f"the disk is full: {path} could not be written",
                "Free some space and continue; everything written before is intact.",
            ) from error
        raise RunError(f"{path} could not be written: {error.strerror or error}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: after a crash it holds the old content or the new, never half.

    Raises:
        RunError: the disk is full or refuses the write.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def remove_debris(folder: Path) -> None:
    """Remove what processes that were killed left half written anywhere below a folder.

    Nobody else may be writing there. What is another user's stays.
    """
    for debris in folder.rglob(".*.tmp"):
        with suppress(OSError):
            debris.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; some file systems cannot, and there it is not needed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, content: str) -> None:
    """Write a text file atomically, as `write_bytes` does."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically; NaN is refused since it is not JSON."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Tensors, notes: Mapping[str, Any] | None = None) -> None:
    """Write named tensors, and a little JSON in the same file's header, atomically."""
    from safetensors.torch import save

    # Cloned: safetensors refuses tensors that share memory, as a frozen factor and its copy do.
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # One key only: safetensors writes several in an order that changes from call to call.
    metadata = {"format": "pt"}
    if notes is not None:
        metadata = {METADATA_KEY: json.dumps(notes, sort_keys=True, allow_nan=False)}
    write_bytes(path, save(whole, metadata=metadata))


def read_tensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises:
        RunError: the file is missing, cut short or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            # cloned into aligned memory: where a matrix lies may decide its products' last bits
            tensors: dict[str, torch.Tensor] = {
                name: file.get_tensor(name).clone()
                for name in file.keys()  # noqa: SIM118
            }
            notes = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    return tensors, notes
