"""Processes that start quickly, for tests that kill many of them."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def forks() -> ForkServerContext:
    """Start processes by forking them from a server in which all is loaded (`warm`)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    with pytest.MonkeyPatch.context() as patch:  # the server looks nowhere else for `warm`
        folders = [HERE.parent.parent, HERE.parent, HERE]
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
        forkserver.ensure_running()
    return context


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands in this process draw nothing: it takes longer than a small federation."""
    monkeypatch.setattr("server.session.draw", lambda path: None)
