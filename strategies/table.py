"""The table of rules and what each can do, as `fedgraft strategies` shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from string import ascii_lowercase

from rich.console import Console
from rich.table import Table

from strategies.options import RuleOptions, SteppedOptions
from strategies.rule import Rule

MEANINGS = {
    "sum_only": "the server never needs a single client's update",
    "exact": "the aggregate is the mean of the clients' products B A",
    "mixed_ranks": "clients may hold different ranks",
    "base_residual": "what the factors cannot hold is added to the base",
    "personal": "a part of the adapter stays on its client",
    "server_optimizer": "strategy.server-optimizer may step from one round's result to the next",
    "quantised_base": "nothing is written into the base's own weights",
    "dora": "DoRA's magnitudes may be averaged beside the factors (adapter.type=dora)",
    "any_start": "adapter.init may be orthogonal, pissa or olora, whose B is not zero",
    "client_privacy": "privacy.mode=client may clip and noise the rule's sums; the other rules "
    "work, as post-processing, on what privacy.mode=example or local made private on the clients",
    "extras": "what becomes of trained tensors that are not LoRA, a classifier's head, say",
}
"""What each of a rule's capabilities means, for people."""
WIDE = 114
"""Columns of a screen on which the capabilities' names fit above the table's columns."""


def show(rules: Sequence[type[Rule]]) -> None:
    """Print the table, what its columns mean, and each rule's paper and options."""
    console = Console()
    heads = {name: _words(name) for name in MEANINGS}
    legend = heads
    if console.width < WIDE:
        heads = dict(zip(MEANINGS, ascii_lowercase, strict=False))
        legend = {name: f"{letter}  {_words(name)}" for name, letter in heads.items()}
    console.print(_table(rules, heads))
    for name, meaning in MEANINGS.items():
        console.print(f"[bold]{legend[name]}[/bold]: {meaning}", highlight=False)
    console.print()
    for rule in rules:
        console.print(f"[bold]{rule.name}[/bold]: {rule.title}. {rule.citation}", highlight=False)
        if own := [name for name in rule.Options.model_fields if name not in _STEPPED]:
            told = ", ".join(_option(rule, name) for name in own)
            console.print(f"  strategy.{told}", highlight=False)
    stepped = ", ".join(_option(SteppedOptions, name) for name in _STEPPED)
    console.print(f"\nWhere there may be a server optimizer: strategy.{stepped}", highlight=False)


_STEPPED = tuple(SteppedOptions.model_fields)
"""Options that many rules share, told once."""


def _option(owner: type[Rule] | type[RuleOptions], name: str) -> str:
    options = owner.Options if issubclass(owner, Rule) else owner
    field = options.model_fields[name]
    default = "unset" if field.default is None else json.dumps(field.default)
    return f"{field.alias or name}={default}"


def _table(rules: Sequence[type[Rule]], heads: Mapping[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("strategy.name", no_wrap=True)
    for name in MEANINGS:
        table.add_column(heads[name], justify="center")
    for rule in rules:
        able = rule.capabilities
        table.add_row(rule.name, *(_told(getattr(able, name)) for name in MEANINGS))
    return table


def _told(value: bool | str) -> str:
    if isinstance(value, str):
        return value
    return "yes" if value else "-"


def row(rule: type[Rule]) -> dict[str, object]:
    """Return a rule with its options and what it can do, as plain JSON values."""
    named = {"name": rule.name, "title": rule.title, "citation": rule.citation}
    able = asdict(rule.capabilities) | {"client_privacy": rule.capabilities.client_privacy}
    return named | {"options": _options(rule)} | able


def _options(rule: type[Rule]) -> dict[str, object]:
    fields = rule.Options.model_fields
    return {field.alias or name: field.default for name, field in fields.items()}


def _words(name: str) -> str:
    return name.replace("_", " ")
