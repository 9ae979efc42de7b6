"""One readable log of several processes: when, which part, what it said."""

from __future__ import annotations

import logging
import re
import sys
import threading
from datetime import datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

import click

from fedgraft.files import disk_errors

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")
"""What a terminal would obey, in a line that quotes what a stranger has sent."""
_BYTES, _KEPT = 20 * 2**20, 5
"""Size at which the file is put aside as .1, .2 ..., and how many of those are kept."""
_COLOURS = ("cyan", "magenta", "yellow", "green", "blue")


class MergedLog:
    """Lines of several parts in one file and, if wished, on the screen. Safe between threads.

    Args:
        path: the file, appended to; it is rotated at 20 MiB, and five old ones are kept.
        screen: whether each line is also shown, with the part's name in a colour of its own.

    Raises:
        RunError: the file cannot be written.
    """

    def __init__(self, path: Path, screen: bool = False) -> None:
        self.path = path
        self._screen = screen
        self._lock = threading.Lock()
        self._colours: dict[str, str] = {}
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = RotatingFileHandler(
                path, maxBytes=_BYTES, backupCount=_KEPT, encoding="utf-8", errors="replace"
            )
        # A full disk must not end a server: the line is lost, and the screen still shows it.
        self._file.handleError = lambda record: None  # type: ignore[method-assign]

    def write(self, part: str, line: str) -> None:
        r"""Add one line; colours are taken off, and a line of nothing is left out.

        Other control characters are written as \xNN.
        """
        text = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", _ANSI.sub("", line).rstrip())
        if not text:
            return
        time = datetime.now().astimezone().isoformat(sep=" ", timespec="milliseconds")
        with self._lock:
            self._file.emit(logging.makeLogRecord({"msg": f"{time} {part:<10} {text}"}))
            if self._screen:
                colour = self._colours.setdefault(
                    part, _COLOURS[len(self._colours) % len(_COLOURS)]
                )
                click.echo(f"{click.style(f'{part:<10}', fg=colour)} {text}", file=sys.stderr)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
