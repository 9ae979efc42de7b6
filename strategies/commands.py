"""`fedgraft strategies`."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def strategies(as_json: bool) -> None:
    """Show the aggregation rules that are installed and what each can do.

    \b
    Example: fedgraft strategies
    """
    from strategies.registry import rule_class, rule_names
    from strategies.table import row, show

    rules = [rule_class(name) for name in rule_names()]
    if as_json:
        click.echo(json.dumps([row(rule) for rule in rules], indent=2))
    else:
        show(rules)
