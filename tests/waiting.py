"""Waiting for what happens in other processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil


def until(check: Callable[[], Any], seconds: float = 90.0, what: str = "it") -> Any:
    """Wait until a check gives something true, and return that."""
    limit = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < limit, f"{what} did not happen in {seconds:g} s"
        time.sleep(0.02)
    return value


def alive(pid: int) -> bool:
    """Whether a process runs."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
