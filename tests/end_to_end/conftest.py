"""Processes that start quickly, for tests that kill many of them."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

import pytest


@pytest.fixture(scope="session")
def forks() -> ForkServerContext:
    """Start processes by forking them from a server that has loaded the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "client.app",
            "peft",
            "server.app",
            "simulations.compare",
            "sklearn.datasets",
            "transformers.models.vit.modeling_vit",
        ]
    )
    return context
