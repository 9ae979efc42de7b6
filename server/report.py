"""One self-contained report.html from run and comparison directories.

Pictures are embedded and styles are inline; nothing is loaded from anywhere, and no script runs.
Names and descriptions of clients are untrusted text and are escaped. Equal results give equal
bytes but for one section: what was measured by the clock stands in a table of its own.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import tomli_w
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from fedgraft.errors import ConfigError
from fedgraft.files import write_text
from server import report_sections
from server.figure import colour
from server.plots import draw_plots
from server.report_samples import samples_shown
from server.results import Results, read_results
from server.table import base_name, reference_rows, strategy_rows
from server.verdict import verdict

TEMPLATES = Path(__file__).parent / "templates"


def write_report(directories: Sequence[Path], out: Path) -> Path:
    """Write the report of run and comparison directories and return its path.

    Args:
        directories: runs, comparisons, or both; of one task.
        out: the file to write; folders above it are made.

    Raises:
        ConfigError: a directory is missing or broken (see `results.read_results`), or `out` is a
            folder.
        RunError: the disk is full or refuses the write.
    """
    if not directories:
        raise ConfigError("a report needs a run or a comparison", "Name at least one directory.")
    if out.is_dir():
        raise ConfigError(f"{out} is a folder", f"Name a file, {out / 'report.html'} say.")
    write_text(out, render(read_results(directories)))
    return out


def render(results: Results) -> str:
    """Return the report as HTML."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    environment.filters["unbroken"] = partial(_unbroken, list(results.names.values()))
    headline, *findings = verdict(results.comparison).splitlines()
    return environment.get_template("report.html.j2").render(
        headline=headline,
        findings=findings,
        facts=report_sections.facts(results),
        unit=results.unit,
        better="higher" if results.direction == "max" else "lower",
        rows=strategy_rows(results.comparison),
        colours={label: colour(results.place(label)) for label in results.labels},
        names=results.names,
        base=base_name(results.comparison),
        references=reference_rows(results.comparison),
        plots={plot.name: plot for plot in draw_plots(results)},
        clients=report_sections.client_rows(results),
        metrics=report_sections.metric_rows(results),
        samples=samples_shown(results),
        incidents=report_sections.incidents(results),
        hidden=any(map(report_sections.keeps_back, results.runs)),
        notes=report_sections.notes(results),
        promises=report_sections.promises(results),
        runs=report_sections.run_rows(results),
        settings=report_sections.settings(results),
        config=tomli_w.dumps(results.config),
        command=results.command,
        versions=report_sections.versions(results),
    )


def _unbroken(labels: Sequence[str], text: str) -> Markup:
    """Escape text and keep short strategy names in it from being broken at their hyphens."""
    escaped = str(escape(text))
    names = sorted((str(escape(label)) for label in labels if len(label) <= 20), key=len)
    if names:
        pattern = "|".join(re.escape(name) for name in reversed(names))
        escaped = re.sub(
            rf"(?<![\w-])({pattern})(?![\w-])", r'<span class="name">\1</span>', escaped
        )
    return Markup(escaped)
