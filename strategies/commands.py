"""`fedgraft strategies`: the table of installed rules and what each can do."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from strategies.registry import rule_class, rule_names


def strategies(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Show the aggregation rules that are installed and what each can do.

    Example: fedgraft strategies
    """
    rules = [rule_class(name) for name in rule_names()]
    if as_json:
        rows = [
            {"name": rule.name, "title": rule.title, "citation": rule.citation}
            | {"options": sorted(_options(rule.Options))}
            | asdict(rule.capabilities)
            for rule in rules
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(title="Aggregation rules", title_justify="left")
    table.add_column("strategy.name", no_wrap=True)
    table.add_column("rule")
    for heading in ("sum-only", "exact", "mixed ranks", "base residual", "personal"):
        table.add_column(heading, justify="center")
    table.add_column("options")
    for rule in rules:
        able = asdict(rule.capabilities).values()
        options = ", ".join(f"{k}={v}" for k, v in _options(rule.Options).items())
        table.add_row(
            rule.name,
            f"{rule.title}\n[dim]{rule.citation}[/dim]",
            *("yes" if can else "-" for can in able),
            options or "-",
        )
    console = Console()
    console.print(table)
    console.print(
        "sum-only: the server never needs a single client's update. "
        "exact: the aggregate is the mean of the products B A."
    )


def _options(options: type) -> dict[str, object]:
    fields = getattr(options, "model_fields", {})
    return {field.alias or name: field.default for name, field in fields.items()}
