"""One federation on this machine: prepare its directory, run it, draw what it leaves behind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from fedgraft.config import Config
from fedgraft.run_directory import RunDirectory
from server import session
from simulations.check import check
from simulations.engine import Engine, run_engine


def simulate(config: Config, out: Path | None = None, engine: Engine = "in-process") -> Path:
    """Run a new federation and return its run directory.

    Args:
        config: the run's config.
        out: the directory; `runs/<strategy>-seed<seed>` with a number by default.
        engine: in this process, or Flower's Ray simulation.

    Raises:
        FedGraftError: what went wrong and what to do.
    """
    directory = prepare(config, out)
    run(config, directory, engine)
    return directory.path


def prepare(
    config: Config, out: Path | None = None, say: Callable[[str], None] = lambda text: None
) -> RunDirectory:
    """Check a config as far as can be without training, and start its run directory.

    Args:
        config: the run's config.
        out: as for `simulate`.
        say: as for `check`.

    Raises:
        ConfigError, DataError, ModelError: what cannot work, found before anything runs.
    """
    path = out or session.free_path(Path("runs"), f"{config.strategy.name}-seed{config.seed}")
    RunDirectory.check_free(path)
    checked = check(config, say)
    return RunDirectory.create(path, checked, lineage(checked))


def run(config: Config, directory: RunDirectory, engine: Engine) -> None:
    """Run or continue a prepared directory, then draw its plots and its report."""
    run_engine(config, directory, engine)
    session.draw(directory.path)


def lineage(config: Config) -> str:
    """Return a simulation's lineage: a function of its config, so that equal runs are equal.

    Simulated clients keep personal state inside the run directory, so equal lineages of two runs
    never meet.
    """
    return hashlib.sha256(config.to_json().encode()).hexdigest()[:32]
