"""One federation on this machine: prepare its directory, run it, draw what it leaves behind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedgraft.config import Config
from fedgraft.errors import ConfigError
from fedgraft.run_directory import RunDirectory
from fedgraft.settings import flatten
from server.plots import save_plots
from server.report import write_report
from simulations.check import check
from simulations.engine import Engine, run_engine

RESUMABLE = (
    "federation.rounds",
    "federation.min-clients",
    "federation.deadline",
    "evaluate.patience",
    "checkpoint.every",
    "checkpoint.keep",
    "track.tensorboard",
)
"""Keys that a resumed run may change: none of them rewrites the rounds that are done."""


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
    path = out or free_path(Path("runs"), f"{config.strategy.name}-seed{config.seed}")
    RunDirectory.check_free(path)
    checked = check(config, say)
    return RunDirectory.create(path, checked, lineage(checked))


def resume(path: Path, settings: Mapping[str, Any]) -> tuple[Config, RunDirectory]:
    """Open a run to be continued, with some of its keys changed.

    Raises:
        ConfigError: there is no run, or a key is set that a resume cannot change.
        RunError: another process is at work on it, or the disk is full or refuses the write.
    """
    directory = RunDirectory.open(path)
    config = directory.config()
    changed = config.with_overrides(settings)
    before, after = flatten(config.to_dict()), flatten(changed.to_dict())
    for key in [*settings, *sorted(before.keys() | after.keys())]:
        if before.get(key) != after.get(key) and key not in RESUMABLE:
            raise ConfigError(
                f"{key} cannot be changed by a resume",
                f"Start a new run, from this one's adapter with --set adapter.from="
                f"{directory.adapter} if you like. A resume may change {', '.join(RESUMABLE)}.",
            )
    with directory.held():  # another process may be at work on it
        if not is_finished(changed, directory):
            directory.summary_file.unlink(missing_ok=True)  # the sign that a run has finished
            directory.write_config(changed, directory.lineage())
    return changed, directory


def is_finished(config: Config, directory: RunDirectory) -> bool:
    """Whether a run has nothing left to do under this config."""
    summary = directory.summary()
    if summary is None:
        return False
    if summary["rounds"] >= config.federation.rounds or summary.get("budget_spent"):
        return True
    return bool(summary["stopped_early"]) and summary.get("patience") == config.evaluate.patience


def how_to_go_on(directory: RunDirectory) -> str:
    """Say of a finished run that it is, and how it may be extended."""
    summary = directory.summary()
    assert summary is not None
    if summary.get("budget_spent"):
        return (
            f"The run in {directory.path} stopped after round {summary['rounds']}, when its "
            "clients' privacy budget was spent; to go on, start a new run with a larger "
            f"privacy.target-epsilon and --set adapter.from={directory.adapter}."
        )
    if summary["stopped_early"]:
        state, key = f"stopped early after round {summary['rounds']}", "evaluate.patience"
    else:
        state, key = f"is finished after {summary['rounds']} rounds", "federation.rounds"
    return f"The run in {directory.path} {state}; to go on, add a larger --set {key}=N."


def run(config: Config, directory: RunDirectory, engine: Engine) -> None:
    """Run or continue a prepared directory, then draw its plots and its report."""
    run_engine(config, directory, engine)
    draw(directory.path)


def draw(path: Path) -> None:
    """Write the plots and the report of a run or comparison directory."""
    save_plots([path], path / "plots")
    write_report([path], path / "report.html")


def lineage(config: Config) -> str:
    """Return a simulation's lineage: a function of its config, so that equal runs are equal.

    Simulated clients keep personal state inside the run directory, so equal lineages of two runs
    never meet.
    """
    return hashlib.sha256(config.to_json().encode()).hexdigest()[:32]


def free_path(folder: Path, name: str) -> Path:
    """Return folder/name, or the first of name-2, name-3, ... that does not exist."""
    path, number = folder / name, 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}"
    return path
