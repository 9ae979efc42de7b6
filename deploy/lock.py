"""A lock that a process holds for as long as it lives, with its id in it."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from fedgraft.errors import ConfigError
from fedgraft.files import disk_errors

_LONGEST_ID = 32


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
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
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
        with open_strange(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read(_LONGEST_ID) or 0) or None
    except PermissionError:
        raise
    except (OSError, ValueError):  # there is none, or something else in its place
        return None
    return None


def open_strange(path: Path) -> TextIO:
    """Open a file to read it where another user could have put anything in its place.

    A link is not followed, and a pipe does not hold us up.

    Raises:
        OSError: there is no file, or this user may not read it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return os.fdopen(descriptor)


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
