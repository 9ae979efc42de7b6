"""The ServerApp: the same one in process, under Ray and deployed."""

from __future__ import annotations

import logging
import uuid
from datetime import datetime
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedgraft.config import Config
from fedgraft.errors import FedGraftError
from fedgraft.logs import quiet
from fedgraft.run_directory import OUT_KEY, RunDirectory
from server.progress import FAILED, ProgressWriter
from server.run import run_federation

log = logging.getLogger(__name__)
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes, in the directory that it names."""
    config = Config.from_run_config(context.run_config)
    directory = _directory(config, str(context.run_config.get(OUT_KEY) or ""))
    with quiet(directory.log):
        try:
            run_federation(grid, config, directory)
        except FedGraftError as error:
            log.error("%s", error)
            _tell(directory, error.message, error.remedy, error.exit_status)
            raise
        except Exception as error:
            log.exception("the run failed")
            _tell(directory, f"{type(error).__name__}: {error}", f"See {directory.log}.", 1)
            raise


def _directory(config: Config, out: str) -> RunDirectory:
    """Open the run directory that a command prepared, or start one (`flwr run .` has none)."""
    if out and (Path(out) / "config.toml").is_file():
        return RunDirectory.open(Path(out))
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    path = Path(out) if out else Path("runs") / f"{config.strategy.name}-{stamp}"
    return RunDirectory.create(path.absolute(), config, lineage=uuid.uuid4().hex)


def _tell(directory: RunDirectory, message: str, remedy: str, status: int) -> None:
    progress = ProgressWriter(directory.progress)
    progress.write(FAILED, message=message, remedy=remedy, status=status)
    progress.close()
