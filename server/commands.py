"""`fedgraft report` and `fedgraft export`."""

from __future__ import annotations

import json
from pathlib import Path

import click

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("directories", metavar="DIR...", type=PATH, nargs=-1, required=True)
@click.option(
    "--out", type=PATH, default=Path("report.html"), show_default=True, help="The file to write."
)
@click.option("--json", "as_json", is_flag=True, help="Print where it lies as JSON.")
def report(directories: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Write one self-contained HTML report of runs or comparisons.

    \b
    Example: fedgraft report runs/fedavg-seed0 runs/lora-fair-seed0 --out both.html
    """
    from server.report import write_report

    path = write_report(directories, out)
    click.echo(json.dumps({"report": str(path)}) if as_json else f"Report: {path}")


@click.command()
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("--to", type=PATH, required=True, help="A new folder.")
@click.option("--merge", is_flag=True, help="Merge the adapter into its base, a whole model.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of a merged model's weights; the sum is taken in float32.  [default: float32]",
)
@click.option("--json", "as_json", is_flag=True, help="Print where it lies as JSON.")
def export(directory: Path, to: Path, merge: bool, dtype: str | None, as_json: bool) -> None:
    """Export a run's adapter as a PEFT folder, or merged into its base.

    \b
    Example: fedgraft export runs/fedavg-seed0 --to my-adapter

    A merged model is the base in full precision with the adapter added to its weights, whatever
    the base was quantised to for training.
    """
    if dtype is not None and not merge:
        raise click.UsageError("--dtype is of a merged model: add --merge.")
    from fedgraft.run_directory import RunDirectory
    from server.export import export_adapter, export_merged
    from server.screen import busy

    run = RunDirectory.open(directory)
    if merge:
        with busy("Merging the adapter into its base"):
            export_merged(run, to, dtype or "float32")
    else:
        export_adapter(run, to)
    kind = "model" if merge else "adapter"
    click.echo(json.dumps({kind: str(to)}) if as_json else f"Exported the {kind} to {to}")
