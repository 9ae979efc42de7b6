"""What a round of the digits federation costs the server: 12 small layers, rank 8, 6 clients."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from aggregation_workload import adapter, medians, update_of
from rich.console import Console
from rich.table import Table

from strategies.aggregation import aggregate
from strategies.diagnostics import aggregation_bias
from strategies.registry import build_rule
from strategies.spool import UpdateSpool

SHAPES = [(64, 64)] * 8 + [(128, 64), (64, 128)] * 2
RULES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fedavg", {}),
    ("ffa-lora", {}),
    ("lora-fair", {}),
    ("lora-fair", {"objective": "cosine"}),
)


def digits_round(console: Console) -> None:
    """Measure and print the parts of a round."""
    table = Table(title="Digits: 12 layers, r=8, 6 clients")
    for column in ("rule", "spool 6", "aggregate", "diagnose"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    current = adapter({f"layers.{i}": shape for i, shape in enumerate(SHAPES)}, 8)
    updates = [update_of(current, k) for k in range(6)]
    with tempfile.TemporaryDirectory() as folder:
        spool = UpdateSpool(Path(folder))

        def fill() -> None:
            spool.clear()
            for k, update in enumerate(updates):
                spool.add(str(k), 100.0 + k, update)

        for name, chosen in RULES:
            rule = build_rule(name, chosen)
            fill()
            made = aggregate(rule, spool, current, {}, 1).adapter
            seconds = medians(
                5,
                fill,
                partial(aggregate, rule, spool, current, {}, 1),
                partial(aggregation_bias, rule, spool, current, made, 1),
            )
            table.add_row(
                " ".join([name, *map(str, chosen.values())]),
                *(f"{1e3 * second:.1f} ms" for second in seconds),
            )
    console.print(table)
