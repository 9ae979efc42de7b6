"""`fedgraft privacy`: what was spent about which data, on which runs, and what is left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedgraft.privacy.figures import rounded_up

if TYPE_CHECKING:
    from rich.console import Console

    from fedgraft.privacy.accounting import Accountant

SHOWN = 12
"""Characters of a fingerprint or a run's lineage on the screen; --json has all of them."""


@click.command()
@click.argument("path", metavar="LEDGER", type=click.Path(path_type=Path))
@click.option(
    "--delta",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="The guarantee's delta; the smallest recorded one when left out.",
)
@click.option(
    "--budget", type=click.FloatRange(0, min_open=True), help="The epsilon that may be spent."
)
@click.option(
    "--accountant",
    type=click.Choice(["rdp", "pld"]),
    default="rdp",
    help="How epsilon is composed; pld is tighter and slower.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def privacy(
    path: Path,
    delta: float | None,
    budget: float | None,
    accountant: Accountant,
    as_json: bool,
) -> None:
    """Show what a privacy ledger says was spent, on which runs, and what is left.

    \b
    Example: fedgraft privacy runs/first/ledgers/server.jsonl --budget 3

    Releases about the same data compose, over rounds and runs. Epsilon is given for each run as
    if it were the only one, and in total up to and with it.

    Exits with 0, with 1 where the ledger is damaged or more than the budget is spent, with 2 for
    wrong usage.
    """
    from rich.console import Console

    from fedgraft.errors import ConfigError
    from fedgraft.privacy.ledger import Ledger, head_of

    if path.is_dir():
        found = sorted(path.glob("**/ledgers/*.jsonl")) or sorted(path.glob("*.jsonl"))
        remedy = f"Name a ledger, such as {found[0]}." if found else "Name a ledger's file."
        raise ConfigError(f"{path} is a folder", remedy)
    if not path.exists() and not head_of(path).exists():
        raise ConfigError(f"there is no ledger {path}", "Check the path.")
    ledger = Ledger(path)
    with Console(stderr=True).status("Composing"):
        from fedgraft.privacy.statement import statement

        spent = statement(ledger, delta, budget, accountant)
    if as_json:
        click.echo(json.dumps(spent, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        show(spent, Console(highlight=False))
    raise SystemExit(1 if any(data["over"] for data in spent["data"]) else 0)


def show(spent: dict[str, Any], console: Console) -> None:
    """Print what `statement` returns, for people."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console.print(f"Ledger {spent['path']}", markup=False)
    if not spent["data"]:
        console.print("Nothing was released.")
        return
    console.print(
        f"Epsilon at delta {spent['delta']:g}, composed by {spent['accountant'].upper()}; "
        f"neighbouring data: {spent['adjacency']}."
    )
    for data in spent["data"]:
        console.print(f"\nData {data['fingerprint'][:SHOWN]}", markup=False, style="bold")
        for kind in data["protects"]:
            console.print(f"  {_promise(**kind)}", markup=False)
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for number, title in enumerate(
            ["run", "mode", "rounds", "noise", "sampling", "releases", "epsilon", "in\ntotal"]
        ):
            table.add_column(title, justify="left" if number < 3 else "right", vertical="bottom")
        for run in data["runs"]:
            cells = [
                run["run"][:SHOWN],
                ", ".join(run["modes"]),
                _rounds(run),
                _noise(run),
                _range(run["sampling_rates"]),
                f"{run['releases']:,}",
                rounded_up(run["epsilon"]),
                rounded_up(run["epsilon_total"]),
            ]
            table.add_row(*(Text(cell) for cell in cells))
        console.print(table)
        console.print(_verdict(data, spent["budget"]))
        if len({kind["unit"] for kind in data["protects"]}) > 1:
            console.print(
                "[yellow]Note:[/yellow] the total holds for single examples; for a client as a "
                "whole only its own releases count, and the example runs promise it nothing."
            )


def _promise(mode: str, unit: str, relation: str) -> str:
    doubled = "" if relation == "add-or-remove-one" else ", recorded with twice the sensitivity"
    return f"{mode}: protects each {unit}, {relation}{doubled}"


def _verdict(data: dict[str, Any], budget: float | None) -> str:
    total = rounded_up(data["epsilon"])
    if budget is None:
        return f"Spent: epsilon {total}."
    if data["over"]:
        return f"[red]Spent: epsilon {total}, more than the budget of {budget:g}.[/red]"
    from fedgraft.privacy.statement import MOST_ROUNDS

    count = data["rounds_left"]
    many = "a million or more" if count >= MOST_ROUNDS else f"{count:,}"
    return (
        f"Spent: epsilon {total} of {budget:g}; {data['left']:.3g} is left, room for {many} more "
        f"round{'' if count == 1 else 's'} like the last."
    )


def _rounds(run: dict[str, Any]) -> str:
    first, last, count = run["first_round"], run["last_round"], run["rounds"]
    if first == last:
        return str(first)
    return f"{first}-{last}" + ("" if count == last - first + 1 else f" ({count})")


def _noise(run: dict[str, Any]) -> str:
    """Return one multiplier a query on the same sample, or the range of the joint ones."""
    queries = run["noise_multipliers"]
    if len(queries) > 1:
        return _range(run["joint_noise_multipliers"])
    only = queries[0]
    if len(set(only)) == 1 and len(only) > 1:
        return f"{only[0]:.3g} x{len(only)}"
    return "/".join(f"{sigma:.3g}" for sigma in only)


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low}-{high}"
