"""What runs and comparisons left behind, read for plots and reports.

A directory is a run (it has summary.json) or a comparison (it has comparison.json, whose runs are
listed with their "directory", relative to it).
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedgraft.errors import ConfigError
from fedgraft.run_directory import PLAN_FILE, RunDirectory
from fedgraft.settings import read_toml
from server.progress import FAILED, ProgressReader
from server.statistics import (
    Comparison,
    build_comparison,
    label_of,
    reference_label,
    short_labels,
)
from server.units import Unit

COMPARISON_FILE = "comparison.json"
MOST_COLOURS = 7
"""More strategies than these are not told apart by their colours; the others are drawn in grey."""
_NEEDED = ("strategy", "seed", "task", "metric", "direction", "final", "best_round")


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        name: its folder, as the report shows it.
        source: the folder that was asked for: its own, or its comparison's.
        summary: what summary.json holds, its label unique among the runs that are read together.
        rounds: what rounds.jsonl holds, by round.
        config: the resolved config, without the run's id.
        versions: what computed it, by package.
        samples: what samples.jsonl holds, in the order of its lines.
        deployed: its clients are machines of their own.
    """

    name: str
    source: str
    summary: dict[str, Any]
    rounds: dict[int, dict[str, Any]]
    config: dict[str, Any]
    versions: dict[str, str]
    samples: tuple[dict[str, Any], ...] = ()
    deployed: bool = False

    @property
    def label(self) -> str:
        """What tables call its strategy."""
        return label_of(self.summary)

    @property
    def seed(self) -> int:
        """The seed that runs of different strategies are paired by."""
        return int(self.summary["seed"])


@dataclass(frozen=True)
class Results:
    """Runs of one task, with the comparison that their summaries make.

    Attributes:
        notes: what a reader of the comparison must know.
        config: what `command` needs as config.toml: a comparison's plan, else the first run's.
        command: what makes the same again.
    """

    runs: tuple[Run, ...]
    comparison: Comparison
    notes: tuple[str, ...]
    config: dict[str, Any]
    command: str

    @property
    def unit(self) -> Unit:
        """How the metric is written."""
        return Unit(str(self.runs[0].summary["metric"]))

    @property
    def direction(self) -> str:
        """Whether a larger ("max") or smaller ("min") metric is better."""
        return str(self.runs[0].summary["direction"])

    @property
    def labels(self) -> list[str]:
        """The strategies in the order of the table, the first one first."""
        return [str(strategy["strategy"]) for strategy in self.comparison["strategies"]]

    @property
    def names(self) -> dict[str, str]:
        """What strategies are called beside each other, by label."""
        return short_labels(self.labels)

    @cached_property
    def highlighted(self) -> list[str]:
        """The strategies that plots draw in colours of their own: all, or where they are many the
        first one and the best."""
        means = {str(s["strategy"]): s["mean"] for s in self.comparison["strategies"]}
        first, *others = means
        sign = -1.0 if self.direction == "max" else 1.0
        ranked = sorted(
            (label for label in others if means[label] is not None),
            key=lambda label: sign * means[label],
        )
        best = {first, *ranked[: MOST_COLOURS - 1]}
        return self.labels if len(means) <= MOST_COLOURS else [x for x in means if x in best]

    def place(self, label: str) -> int | None:
        """Return which colour a strategy has; None for one of the many that are drawn in grey."""
        return self.highlighted.index(label) if label in self.highlighted else None

    def of(self, label: str) -> list[Run]:
        """Return a strategy's runs in the order of their seeds."""
        return sorted((run for run in self.runs if run.label == label), key=lambda run: run.seed)


def read_results(directories: Sequence[Path]) -> Results:
    """Read run and comparison directories; one that is named twice counts once.

    Raises:
        ConfigError: a directory, or a file in it, is missing or broken, or the runs are of
            different tasks; the message names the file.
    """
    runs: dict[Path, Run] = {}
    references: list[tuple[str, list[dict[str, Any]]]] = []
    plan: dict[str, Any] = {}
    only = len(directories) == 1
    sources = Counter(path.name for path in {directory.resolve() for directory in directories})
    for directory in directories:
        if not directory.is_dir():
            raise ConfigError(f"there is no folder {directory}", "Check the path.")
        source = directory.resolve().name
        if sources[source] > 1:
            source = str(directory)
        if not (directory / COMPARISON_FILE).is_file():
            run = _read_run(directory, "." if only else source, source)
            runs.setdefault(directory.resolve(), run)
            continue
        listing = _read_object(directory / COMPARISON_FILE, ("runs", "references"))
        called: dict[str, str] = {}
        for name, label in _listed_runs(listing, directory / COMPARISON_FILE):
            folder = directory / name
            run = _read_run(folder, name if only else f"{source}/{name}", source)
            if label:
                run = replace(run, summary=run.summary | {"label": label})
            called[name] = runs.setdefault(folder.resolve(), run).name
        references.append((source, _of_directory(listing["references"], called)))
        if only and (directory / PLAN_FILE).is_file():
            plan = read_toml(directory / PLAN_FILE)
    chosen = _with_unique_labels(list(runs.values()))
    rows, notes = (listing["references"], ()) if only and references else _agreed(references)
    comparison = build_comparison([r.summary | {"directory": r.name} for r in chosen], rows)
    if plan:
        return Results(tuple(chosen), comparison, notes, plan["config"], _compare_command(plan))
    command = "\n".join(_again(run) for run in chosen)
    return Results(tuple(chosen), comparison, notes, chosen[0].config, command)


def _again(run: Run) -> str:
    """Return the command that runs the same config anew."""
    file = shlex.quote("config.toml" if run.name == "." else f"{run.name}/config.toml")
    if run.deployed:
        return f"fedgraft submit {file} --to server.toml --out again"
    return f"fedgraft simulate {file} --out again"


def _compare_command(plan: dict[str, Any]) -> str:
    """Return the command that a comparison's plan stands for, one option a line."""
    options = {
        "--strategies": ",".join(plan["strategies"]),
        "--seeds": ",".join(str(seed) for seed in plan["seeds"]),
    }
    lines = [f"{name} {shlex.quote(value)}" for name, value in options.items()]
    for key, values in plan.get("grid", {}).items():
        lines.append(f"--grid {shlex.quote(f'{key}=' + ','.join(str(v) for v in values))}")
    return " \\\n  ".join(["fedgraft compare config.toml", *lines, "--out again"])


def _listed_runs(listing: dict[str, Any], file: Path) -> list[tuple[str, str]]:
    """Return folder and label of the runs that a comparison lists."""
    runs = [run for run in listing["runs"] if isinstance(run, dict)]
    if not runs or not all(isinstance(run.get("directory"), str) for run in runs):
        raise ConfigError(f'{file} lists a run without its "directory"', "Compare again.")
    return [(run["directory"], str(run.get("label") or "")) for run in runs]


def _read_run(folder: Path, name: str, source: str) -> Run:
    if not folder.is_dir():
        raise ConfigError(
            f"there is no folder {folder}", "Keep a comparison's run folders beside it."
        )
    directory = RunDirectory(folder)
    if (folder / PLAN_FILE).is_file():
        raise ConfigError(
            f"{folder} holds a comparison that has not finished: {COMPARISON_FILE} is missing",
            f"Finish it with fedgraft compare --resume {folder}.",
        )
    if not directory.summary_file.is_file():
        if directory.rounds_file.is_file():
            raise ConfigError(
                f"{folder} holds a run that has not finished{_failure_of(directory)}: "
                "summary.json is missing",
                f"Finish it with {directory.resume_command()}.",
            )
        raise ConfigError(
            f"{folder} holds no run: it has neither summary.json nor {COMPARISON_FILE}",
            "Name a folder that fedgraft simulate, compare or submit wrote.",
        )
    for file in (directory.rounds_file, directory.config_file):
        if not file.is_file():
            raise ConfigError(f"{file} is missing", "Restore it, or run again.")
    config = read_toml(directory.config_file)
    versions = config.pop("versions", {})
    recorded = config.pop("run", {})
    return Run(
        name=name,
        source=source,
        summary=_read_object(directory.summary_file, _NEEDED),
        rounds={int(record["round"]): record for record in directory.rounds()},
        config=config,
        versions={str(package): str(version) for package, version in versions.items()},
        samples=tuple(directory.samples()),
        deployed=recorded.get("deployed") is True,
    )


def _read_object(file: Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise ConfigError(f"{file} cannot be read: {error}", "Restore it, or run again.") from None
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ConfigError(
            f"{file} lacks {', '.join(missing)}", "Was it written by another program or version?"
        )
    found: dict[str, Any] = content
    return found


def _failure_of(directory: RunDirectory) -> str:
    """Return in brackets what a run failed of, if that is the last thing it told."""
    events = ProgressReader.of_session(directory.progress).events()
    failed = bool(events) and events[-1]["event"] == FAILED
    return f" (it failed: {events[-1]['message']})" if failed else ""


def _with_unique_labels(runs: list[Run]) -> list[Run]:
    """Add to a label where its runs come from, where two of them share label and seed."""
    taken = Counter((run.label, run.seed) for run in runs)
    twins = {label for (label, _), count in taken.items() if count > 1}
    return [
        replace(run, summary=run.summary | {"label": f"{run.label} ({run.source})"})
        if run.label in twins
        else run
        for run in runs
    ]


def _of_directory(rows: list[dict[str, Any]], runs: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return a comparison's reference rows with the runs that they belong to, as read here.

    Args:
        rows: the rows; one that names no runs belongs to all of the comparison's.
        runs: what a run is called here, by the directory that the comparison has it under.
    """
    return [
        row | {"runs": [runs[name] for name in row.get("runs", runs) if name in runs]}
        for row in rows
    ]


def _agreed(
    by_source: Sequence[tuple[str, list[dict[str, Any]]]],
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Join the reference rows of several comparisons: equal ones, and others under their source.

    Returns:
        The rows, each with the runs that it belongs to, and what a reader must know.
    """
    found: dict[str, list[dict[int, float]]] = {}
    for _, rows in by_source:
        for label in dict.fromkeys(reference_label(row) for row in rows):
            finals = {int(r["seed"]): r["final"] for r in rows if reference_label(r) == label}
            found.setdefault(label, []).append(finals)
    disputed = {label for label, finals in found.items() if any(f != finals[0] for f in finals)}
    joined: dict[tuple[str, int], dict[str, Any]] = {}
    for source, rows in by_source:
        for row in rows:
            label = reference_label(row)
            shown = f"{label} ({source})" if label in disputed else label
            first = joined.setdefault((shown, int(row["seed"])), row | {"label": shown, "runs": []})
            first["runs"] += row["runs"]
    if not disputed:
        return list(joined.values()), ()
    return list(joined.values()), (
        f"The comparisons' reference rows {', '.join(sorted(disputed))} differ, so their "
        "federations or seeds do: each run is measured against its own comparison's.",
    )
