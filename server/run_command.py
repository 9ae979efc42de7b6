"""What the commands that run something share: arguments, how to go on, and the result on screen."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from fedgraft.errors import ConfigError, FedGraftError, RunError

if TYPE_CHECKING:
    from fedgraft.run_directory import RunDirectory

PATH = click.Path(path_type=Path)

config_file_argument = click.argument(
    "config_file", metavar="[CONFIG.toml]", type=PATH, required=False
)
settings_option = click.option(
    "--set", "settings", metavar="KEY=VALUE", multiple=True, help="Set one key; may be repeated."
)
as_json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def show_run(directory: RunDirectory, as_json: bool) -> None:
    """Print a finished run: its summary as JSON, or its row of the table and where it lies."""
    from server.statistics import build_comparison

    summary = directory.summary()
    assert summary is not None
    if as_json:
        click.echo(json.dumps(summary, indent=2))
        return
    show(dict(build_comparison([summary | {"directory": "."}], [])), directory.path)


def show(result: dict[str, Any], path: Path) -> None:
    """Print a comparison's table, its verdict and where its report lies."""
    from server.table import fitting_table
    from server.verdict import verdict

    console = Console()
    whole = not console.is_terminal  # a terminal breaks lines between words, a pipe not at all
    console.print()
    console.print(fitting_table(result, console))
    for line in verdict(result).split("\n"):
        console.print(line, highlight=False, markup=False, soft_wrap=whole)
    console.print(
        f"\nReport: {path / 'report.html'}", highlight=False, markup=False, soft_wrap=True
    )


@contextmanager
def interruptible(command: Sequence[str], path: Path) -> Iterator[None]:
    """Say how to go on when Ctrl-C or a failure ends the work.

    Args:
        command: of `fedgraft`, with what it needs beside `--resume`.
        path: the directory to resume.

    Raises:
        RunError: the work was interrupted.
    """
    again = shlex.join(["fedgraft", *command, "--resume", str(path)])
    try:
        yield
    except KeyboardInterrupt:
        raise RunError(
            "interrupted; everything up to the last checkpoint is kept", f"Continue with: {again}"
        ) from None
    except FedGraftError as error:
        if error.exit_status == 1 and "resume" not in error.remedy:  # of which it may advise
            error.remedy = f"{error.remedy} Continue with: {again}".strip()
        raise


def leave_out(option: str, given: Mapping[str, object]) -> None:
    """Refuse what an option excludes.

    Raises:
        ConfigError: one of the given things is there.
    """
    for name, value in given.items():
        if value:
            raise ConfigError(
                f"{option} takes that from the directory, and {name} is given as well",
                f"Leave {name} out, or {option}.",
            )
