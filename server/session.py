"""A run from its directory to its report, whatever carries its messages.

What `fedgraft simulate` and `fedgraft submit` share: where a new run lies, which of its keys a
resume may change, whether it has finished, and what is drawn of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedgraft.config import Config
from fedgraft.errors import ConfigError
from fedgraft.run_directory import RunDirectory
from fedgraft.settings import flatten
from server.plots import save_plots
from server.report import write_report

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


def resume(
    path: Path, settings: Mapping[str, Any], *, deployed: bool = False
) -> tuple[Config, RunDirectory]:
    """Open a run to be continued, with some of its keys changed.

    Args:
        path: the run's directory.
        settings: the keys to change.
        deployed: on clients that are machines of their own; otherwise on this machine alone.

    Raises:
        ConfigError: there is no run, its clients are the other kind, or a key is set that a resume
            cannot change.
        RunError: another process is at work on it, or the disk is full or refuses the write.
    """
    directory = RunDirectory.open(path)
    if directory.deployed != deployed:
        clients = "machines of their own" if directory.deployed else "simulated"
        raise ConfigError(
            f"the clients of the run in {path} are {clients}",
            f"Continue it with {directory.resume_command()}.",
        )
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
            f"privacy.target-epsilon, or on clients whose policies allow more, with "
            f"--set adapter.from={directory.adapter}."
        )
    if summary["stopped_early"]:
        state, key = f"stopped early after round {summary['rounds']}", "evaluate.patience"
    else:
        state, key = f"is finished after {summary['rounds']} rounds", "federation.rounds"
    return f"The run in {directory.path} {state}; to go on, add a larger --set {key}=N."


def draw(path: Path) -> None:
    """Write the plots and the report of a run or comparison directory."""
    save_plots([path], path / "plots")
    write_report([path], path / "report.html")


def free_path(folder: Path, name: str) -> Path:
    """Return folder/name, or the first of name-2, name-3, ... that does not exist."""
    path, number = folder / name, 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}"
    return path
