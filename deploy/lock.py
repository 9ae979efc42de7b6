"""A lock that a process holds for as long as it lives, with its id in it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedgraft.errors import ConfigError
from fedgraft.files import disk_errors


@contextmanager
def only_one(path: Path, what: str) -> Iterator[None]:
    """Hold a lock inside the block; the system lets go of it however this process ends.

    Args:
        path: the lock's file; it is made where it is missing, and stays.
        what: whom there may be only one of, "server", say.

    Raises:
        ConfigError: another process holds it; the message names that process.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"a {what} runs already on {path.parent} (process {path.read_text().strip()})",
                f"Stop that one first, or give this {what} another state folder.",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def holder(path: Path) -> int | None:
    """Return the id of the process that holds a lock, or None.

    Raises:
        PermissionError: this user may not look.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(path.read_text().strip() or 0) or None
    finally:
        os.close(descriptor)
    return None


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Wait for a lock, and hold it inside the block: for changes that must not cross."""
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
