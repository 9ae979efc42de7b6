"""`fedgraft report` and `fedgraft export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedgraft.run_directory import RunDirectory
from server.export import export_adapter, export_merged


def report(
    directories: Annotated[
        list[Path], typer.Argument(help="Run or comparison directories, shown in one report.")
    ],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print where it lies as JSON.")] = False,
) -> None:
    """Write one self-contained HTML report of runs or comparisons.

    Example: fedgraft report runs/fedavg-seed0 runs/lora-fair-seed0 --out both.html
    """
    from server.report import write_report

    path = write_report(directories, out)
    typer.echo(json.dumps({"report": str(path)}) if as_json else f"Report: {path}")


def export(
    directory: Annotated[Path, typer.Argument(help="A finished run's directory.")],
    to: Annotated[Path, typer.Option(help="A new folder.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapter into its base, a whole model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print where it lies as JSON.")] = False,
) -> None:
    """Export a run's adapter as a PEFT folder, or merged into its base.

    Example: fedgraft export runs/fedavg-seed0 --to my-adapter
    """
    run = RunDirectory.open(directory)
    if merge:
        export_merged(run, to)
    else:
        export_adapter(run, to)
    kind = "model" if merge else "adapter"
    typer.echo(json.dumps({kind: str(to)}) if as_json else f"Exported the {kind} to {to}")
