"""What another Unix user of this machine could read or change, asked as that user."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from deploy.as_user import become
from fedgraft.errors import ConfigError


def asked_as(user: tuple[int, int], ask: Callable[[], Sequence[Path]]) -> list[Path]:
    """Let a user answer which paths it finds, by root or by that user.

    Raises:
        ConfigError: that user cannot be taken on.
    """
    if os.geteuid() == user[0]:
        return list(ask())
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            become(*user)
            with os.fdopen(into, "w") as file:
                json.dump([os.fspath(path) for path in ask()], file)
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out) as file:
        text = file.read()
    os.waitpid(child, 0)
    if not text:
        raise ConfigError(
            f"user {user[0]} cannot be taken on here", "Start `fedgraft client` as root."
        )
    return [Path(path) for path in json.loads(text)]


def changed_at(path: Path) -> Path | None:
    """Return where this process' user could change a path, or put another in its place.

    That is the path itself, a folder above it, or one that a link on the way leads through; whoever
    owns one of them may change its mode, and a sticky folder lets nobody touch what is another's.
    """
    for place, held in _way_to(path):
        try:
            found = place.stat()
            if os.statvfs(place).f_flag & os.ST_RDONLY:
                continue
            if found.st_uid == os.geteuid():
                return place
            if not os.access(place, os.W_OK):
                continue
            if held is None or not found.st_mode & stat.S_ISVTX:
                return place
            if not os.path.lexists(held) or held.lstat().st_uid == os.geteuid():
                return held
        except OSError:  # this user cannot even look
            continue
    return None


def _way_to(path: Path) -> Iterator[tuple[Path, Path | None]]:
    """Yield what a path leads through, each with the next: folders, links' folders, its end."""
    chain = [*reversed(path.absolute().parents), path.absolute()]
    yield from pairwise([*chain, None])
    left, seen = chain, set[Path]()
    while left:
        place = left.pop()
        if place in seen:
            continue
        seen.add(place)
        with suppress(OSError):
            if place.is_symlink():
                target = place.parent / place.readlink()
                chain = [*reversed(target.parents), target]
                yield from pairwise(chain)
                left += chain
