"""`fedgraft data`: look at data before training on them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from fedgraft.tasks.data_check import Findings, Segment

PROBLEMS_SHOWN = 20
CLIENTS_SHOWN = 20
SHOWN = 1200
"""Characters of an example on the screen; a longer one loses its middle there."""
COLUMN_NAMES = ("min", "median", "mean", "p95", "max")


@click.command()
@click.argument("source", metavar="FILE_OR_FOLDER")
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="A run's CONFIG.toml."
)
@click.option(
    "--set", "settings", metavar="KEY=VALUE", multiple=True, help="Set one key; may be repeated."
)
@click.option("--base", help="Short for --set model.base=...: count tokens as this base does.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def data(
    source: str,
    config_file: Path | None,
    settings: tuple[str, ...],
    base: str | None,
    as_json: bool,
) -> None:
    """Check data: counts, lengths, examples as they are trained on, broken lines.

    \b
    Example: fedgraft data dialogues.jsonl --base Qwen/Qwen2.5-0.5B-Instruct

    A Hub dataset's id does, too. Without a base, lengths are in characters. With --config, or a
    --set of federation keys, it says what each client would hold.

    Exits with 0 where all is well, 1 where something is wrong with the data, 2 for wrong usage.
    """
    from rich.console import Console

    from fedgraft.config import Config
    from fedgraft.errors import ConfigError
    from fedgraft.logs import hushed
    from fedgraft.settings import parse_settings, read_toml
    from fedgraft.tasks.data_files import READERS
    from fedgraft.tasks.folders import DOCUMENTS
    from fedgraft.tasks.hub import local_path

    chosen = parse_settings(settings) | {"task.data": source}
    if base is not None:
        chosen["model.base"] = base
    config = Config.load(config_file).with_overrides(chosen)
    told = read_toml(config_file) if config_file is not None else {}
    task = told.get("task", {})
    file = Path(source).suffix.lower() in (*READERS, *DOCUMENTS)
    path = Path(source).expanduser() if file else local_path(source)
    if path is not None and not path.exists():
        raise ConfigError(
            f"{source} is no file or folder, and no Hub dataset's id", "Check the path."
        )
    with Console(stderr=True).status("Looking at the data"), hushed():
        from fedgraft.tasks.data_check import check

        found = check(
            config,
            task_set="task.name" in chosen or "task.name" in told or "name" in task,
            clients=config_file is not None or any(k.startswith("federation.") for k in chosen),
        )
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2, ensure_ascii=False))
    else:
        _show(found, config.task.max_length, Console(highlight=False))
    raise SystemExit(1 if found.problems else 0)


def _show(found: Findings, limit: int, console: Console) -> None:
    from rich.table import Table

    guessed = " (guessed; set task.name to choose)" if found.guessed and found.task else ""
    console.print(f"{found.data}: {found.task or 'unknown task'}{guessed}", markup=False)
    if found.columns:
        console.print(f"Columns read: {', '.join(found.columns)}", markup=False)
    if found.template is not None:
        template = found.template.replace("\n", "\\n")
        console.print(f"Template: {template}", markup=False)
    if found.rows:
        table = Table(box=None, pad_edge=False)
        for name in ("split", "rows", *(f"{name}" for name in COLUMN_NAMES)):
            table.add_column(name, justify="left" if name == "split" else "right")
        if found.fits:
            table.add_column(f"over {limit} tokens", justify="right")
        for split, rows in found.rows.items():
            lengths = found.lengths.get(split, {})
            own = "" if split in found.given else " (cut from train)"
            cells = [f"{lengths[name]:.0f}" if name in lengths else "-" for name in COLUMN_NAMES]
            fit = found.fits.get(split)
            over = [str(fit["cut"] + fit.get("split", 0))] if fit is not None else []
            table.add_row(split + own, str(rows), *cells, *over)
        console.print()
        console.print(table)
        console.print(f"Lengths are in {found.unit}.")
    if found.labels:
        counts = ", ".join(f"{label}: {count}" for label, count in list(found.labels.items())[:20])
        console.print(f"Labels of {len(found.labels)} kinds: {counts}", markup=False)
    _show_examples(found, console)
    _show_clients(found, console)
    for note in found.notes:
        console.print(f"[yellow]Note:[/yellow] {_safe(note)}")
    for problem in found.problems[:PROBLEMS_SHOWN]:
        console.print(f"[red]Problem:[/red] {_safe(problem)}")
    if (more := len(found.problems) - PROBLEMS_SHOWN) > 0:
        console.print(f"... and {more} more; --json lists all of them.")
    count = len(found.problems)
    verdict = f"{count} problem{'s' if count != 1 else ''} found." if count else "No problems."
    console.print(verdict)


def _show_examples(found: Findings, console: Console) -> None:
    if not found.examples:
        return
    coloured = console.is_terminal and not console.no_color
    how = "in colour" if coloured else "in [[ ]]"
    what = "what the loss counts" if found.task == "causal-lm" else "the label"
    console.print(f"\nExamples, {what} {how}:", markup=False)
    for number, segments in enumerate(found.examples, start=1):
        console.print(f"--- {number}", style="dim")
        console.print(_marked(segments, coloured=coloured))
    console.print()


def _marked(segments: list[Segment], *, coloured: bool) -> Text:
    from rich.text import Text

    text = Text()
    size = sum(len(part) for part, _ in segments)
    room = max(40, SHOWN // len(segments)) if size > SHOWN else SHOWN
    for part, counted in segments:
        shown = part if len(part) <= room else f"{part[: room // 2]} [...] {part[-room // 2 :]}"
        if coloured:
            text.append(shown, style="bold green" if counted else "")
        else:
            text.append(f"[[{shown}]]" if counted else shown)
    return text


def _show_clients(found: Findings, console: Console) -> None:
    from rich.table import Table

    if not found.clients:
        return
    table = Table(box=None, pad_edge=False)
    for name in ("client", "training rows", "holds"):
        table.add_column(name, justify="left" if name == "holds" else "right")
    for client in found.clients[:CLIENTS_SHOWN]:
        held = ", ".join(f"{value}: {count}" for value, count in client["holds"].items())
        table.add_row(str(client["client"]), str(client["rows"]), _safe(held))
    console.print(table)
    if (more := len(found.clients) - CLIENTS_SHOWN) > 0:
        console.print(f"... and {more} more clients; --json lists all of them.")
    console.print()


def _safe(text: str) -> str:
    from rich.markup import escape

    return escape(text)
