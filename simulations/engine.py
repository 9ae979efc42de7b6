"""Run one federation in a run directory, on the engine of choice."""

from __future__ import annotations

from typing import Literal

from flwr.app import Context, RecordDict, UserConfig

from fedgraft import interrupts
from fedgraft.config import RUN_CONFIG_KEY, Config
from fedgraft.deployed import simulation
from fedgraft.flower import SERVER_NODE
from fedgraft.run_directory import LEDGER_KEY, OUT_KEY, PERSONAL_KEY, RunDirectory
from simulations.in_process import InProcessGrid

Engine = Literal["in-process", "ray"]


def run_config(config: Config, directory: RunDirectory) -> UserConfig:
    """Return what travels to ServerApp and ClientApp: the config and three paths."""
    return {
        RUN_CONFIG_KEY: config.to_json(),
        OUT_KEY: str(directory.path.absolute()),
        PERSONAL_KEY: str(directory.personal.absolute()),
        LEDGER_KEY: str(directory.ledgers.absolute()),
    }


def run_engine(config: Config, directory: RunDirectory, engine: Engine = "in-process") -> None:
    """Run, or continue, the federation of a run directory.

    Raises:
        FedGraftError: the run failed; the message says what to do.
    """
    if engine == "ray":
        from simulations.ray_engine import run_under_ray

        with simulation():
            run_under_ray(config, directory, run_config(config, directory))
        return
    from client.app import app as client_app
    from server.app import app as server_app

    settings = run_config(config, directory)
    grid = InProcessGrid(client_app, config.federation.clients, settings)
    context = Context(grid.run.run_id, SERVER_NODE, {}, RecordDict(), settings)
    with simulation(), interrupts.remembered():
        server_app(grid, context)
