"""Small runs on the digits, as the server sees them, for the tests of `server.run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from client.app import app as client_app
from fedgraft.adapter import Adapter
from fedgraft.config import Config
from fedgraft.files import read_tensors
from fedgraft.run_directory import RunDirectory
from server.checkpoint import Checkpoints
from server.run import run_federation
from simulations.engine import run_config
from simulations.in_process import InProcessGrid

Summary = dict[str, Any]


def new(path: Path, tiny: Config, **settings: Any) -> RunDirectory:
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()}
    quick = {"evaluate.clients": False, "train.steps": 1}
    config = tiny.with_overrides(quick | named)
    return RunDirectory.create(path, config, "lineage")


def go(directory: RunDirectory, **settings: Any) -> Summary:
    """Start or resume the run of a directory, some keys changed."""
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()}
    config = directory.config().with_overrides(named)
    directory.write_config(config, directory.lineage())
    grid = InProcessGrid(client_app, config.federation.clients, run_config(config, directory))
    return run_federation(grid, config, directory)


def saved(directory: RunDirectory) -> dict[str, torch.Tensor]:
    return read_tensors(directory.adapter / "adapter_model.safetensors")[0]


def state(directory: RunDirectory) -> Adapter:
    found = Checkpoints(directory.checkpoints, keep=9).latest()
    assert found is not None
    return found.state.adapter


def timeless(directory: RunDirectory) -> list[dict[str, Any]]:
    """The records without what a clock wrote."""
    records = directory.rounds()
    for record in records:
        del record["seconds"]
        for client in record["clients"].values():
            client.pop("seconds", None)
    return records


class Killed(BaseException):
    """What kill -9 is to a test: nothing catches it."""
