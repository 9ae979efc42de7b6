"""The ServerApp: the same one in process, under Ray and deployed."""

from __future__ import annotations

import logging
import uuid
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedgraft.config import RUN_CONFIG_KEY, Config
from fedgraft.errors import ConfigError, FedGraftError
from fedgraft.flower import ask_soon_for_objects
from fedgraft.logs import quiet
from fedgraft.run_directory import OUT_KEY, RunDirectory
from server.progress import FAILED, ProgressWriter
from server.run import run_federation
from server.units import Unit

log = logging.getLogger(__name__)
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes, in the directory that it names."""
    config = Config.from_run_config(context.run_config)
    ask_soon_for_objects(config.federation.deadline)
    directory = _directory(context, config)
    with directory.held(), quiet(directory.log):
        try:
            summary = run_federation(grid, config, directory)
        except FedGraftError as error:
            log.error("%s", error)
            _tell(directory, error.message, error.remedy, error.exit_status)
            raise
        except Exception as error:
            log.exception("the run failed")
            _tell(directory, f"{type(error).__name__}: {error}", f"See {directory.log}.", 1)
            raise
    if RUN_CONFIG_KEY not in context.run_config:
        unit = Unit(summary["metric"])
        _say(
            f"test {unit.name} {unit.value(summary['final'])}; see fedgraft report {directory.path}"
        )


def _say(text: str) -> None:
    """Print to where nobody else does, under `flwr run`: Flower carries it to the terminal."""
    print(f"FedGraft: {text}", flush=True)


def _directory(context: Context, config: Config) -> RunDirectory:
    """Open the run directory that a command prepared, or start one (`flwr run .` has none).

    Raises:
        ConfigError: `fedgraft.out` is a relative path, or holds a run already.
    """
    out = str(context.run_config.get(OUT_KEY) or "")
    if RUN_CONFIG_KEY in context.run_config:
        return RunDirectory.open(Path(out))
    if out and not Path(out).is_absolute():
        raise ConfigError(
            f"{OUT_KEY} is {out!r}, and the server does not know which folder that is relative to",
            "Give an absolute path, or none for a new folder under ~/fedgraft-runs.",
        )
    name = f"{config.strategy.name}-{datetime.now():%Y%m%d-%H%M%S}"
    path = Path(out) if out else Path.home() / "fedgraft-runs" / name
    directory = RunDirectory.create(path, config, lineage=uuid.uuid4().hex)
    _say(f"this run is kept in {path}")
    return directory


def _tell(directory: RunDirectory, message: str, remedy: str, status: int) -> None:
    with suppress(FedGraftError):  # of a full disk the caller is told all the same
        progress = ProgressWriter(directory.progress)
        progress.write(FAILED, message=message, remedy=remedy, status=status)
        progress.close()
