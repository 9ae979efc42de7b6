"""Shared by all tests: one thread, quiet libraries, and one digits model for the whole session."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers run side by side
os.environ.setdefault("FEDGRAFT_TOKEN_CACHE", "off")  # nothing of a test stays in the home folder

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from fedgraft.config import Config
from fedgraft.logs import quiet_environment
from fedgraft.resident_model import ResidentModel, resident_model, resident_task
from fedgraft.tasks.task import Task

os.environ.update(quiet_environment())


TINY: dict[str, Any] = {
    "federation.clients": 2,
    "federation.rounds": 3,
    "federation.partition": "iid",
    "train.steps": 2,
    "train.batch-size": 8,
    "model.device": "cpu",
    "threads": 1,
}
"""A federation on the built-in digits whose round takes a fraction of a second."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums depend on torch's thread count to the last bit; no test leaves another one behind."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Config:
    return Config().with_overrides(TINY)


@pytest.fixture
def digits(tiny: Config) -> Task:
    return resident_task(tiny)


@pytest.fixture
def model(tiny: Config, digits: Task) -> ResidentModel:
    """The process's resident model: loaded on the first call, and again after another config's."""
    return resident_model(digits, tiny)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB, a real one; where none may be mounted the test is skipped."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def full_disk(small_disk: Path) -> Path:
    """The small disk with no byte left; removing its file `ballast` makes room."""
    with (small_disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    return small_disk
