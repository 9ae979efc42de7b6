"""What can be said about strategies from a few seeds: means, paired intervals, seeds needed.

Runs of two strategies with one seed share partition, initial adapter and client samples, so they
are compared pair by pair: the interval is Student's (1908) for the mean of the differences, which
is much narrower than one from two independent means. The difference is raw (strategy minus first
strategy), so for a metric with direction "min" a negative one is the better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from fedgraft.errors import ConfigError
from server.units import number

LEVEL = 0.95
MOST_SEEDS = 1000
REFERENCES = ("base", "alone", "centralised")
START = "start"
"""The row that stands in for `base` where a run has no reference rows: its own round 0."""

Comparison = dict[str, Any]
BySeed = dict[int, float]


@dataclass(frozen=True)
class Interval:
    """A mean of paired differences with its confidence interval, in the metric's own unit."""

    difference: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the two can be told apart."""
        return self.low > 0 or self.high < 0


def mean_and_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean and the sample standard deviation (n - 1), which one value has not."""
    if not values or not all(math.isfinite(v) for v in values):
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_differences(first: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """Return other minus first for each seed that both have, in the order of the seeds.

    Empty where a run of either has no finite result: to leave its seed out would flatter it.
    """
    pairs = [other[seed] - first[seed] for seed in sorted(first.keys() & other.keys())]
    return pairs if all(math.isfinite(difference) for difference in pairs) else []


def paired_interval(differences: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Return Student's interval of the mean difference, None with fewer than two pairs."""
    n = len(differences)
    if n < 2:
        return None
    mean, sd = float(np.mean(differences)), float(np.std(differences, ddof=1))
    half = float(student.ppf((1 + level) / 2, n - 1)) * sd / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def seeds_needed(differences: Sequence[float], level: float = LEVEL) -> int | None:
    """Return how many paired seeds it takes for the interval to exclude zero.

    The smallest n >= 2 with t_{n-1} sd / sqrt(n) < |mean|, at the observed mean and standard
    deviation: a rough guide, since both are guesses themselves when the seeds are few.

    Returns:
        None with fewer than two differences, where their mean is zero, and above `MOST_SEEDS`.
    """
    if len(differences) < 2:
        return None
    mean, sd = abs(float(np.mean(differences))), float(np.std(differences, ddof=1))
    n = np.arange(2, MOST_SEEDS + 1)
    enough = student.ppf((1 + level) / 2, n - 1) * sd / np.sqrt(n) < mean
    return int(n[np.argmax(enough)]) if enough.any() else None


def label_of(summary: Mapping[str, Any]) -> str:
    """Return what tables call a run's strategy: its name and what the grid overrode."""
    return str(summary.get("label") or summary["strategy"])


def short_labels(labels: Sequence[str]) -> dict[str, str]:
    """Return what labels may be called beside each other: without the words that all share.

    They stay as they are where two would be called the same, or one nothing.
    """
    words = {label: label.split(" ") for label in labels}
    shared = set.intersection(*map(set, words.values())) if len(words) > 1 else set()
    short = {label: " ".join(w for w in own if w not in shared) for label, own in words.items()}
    clear = all(name and not name.startswith("(") for name in short.values())
    return short if clear and len(set(short.values())) == len(short) else {x: x for x in labels}


def finals(runs: Sequence[Mapping[str, Any]], key: str = "final") -> dict[str, BySeed]:
    """Return the test metric by strategy label, in order of first appearance, and by seed.

    Raises:
        ConfigError: two runs have the same label and the same seed.
    """
    found: dict[str, BySeed] = {}
    for run in runs:
        label, seed = label_of(run), int(run["seed"])
        by_seed = found.setdefault(label, {})
        if seed in by_seed:
            raise ConfigError(
                f"two runs are both {label} with seed {seed}", "Compare each of them once."
            )
        by_seed[seed] = number(run.get(key))
    return found


def build_comparison(
    summaries: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]
) -> Comparison:
    """Return what `comparison.json` holds.

    Args:
        summaries: one `summary.json` a run, with its "directory"; the first one's strategy is the
            one that all others are compared with.
        references: the reference rows, one a name and seed. Where the runs do not all have the
            same, a row has a "label" and in "runs" the directories that it belongs to.

    Returns:
        {"runs", "references", "strategies"}: a strategy's mean is null where a run has no finite
        result, its sd with one seed, its difference, low and high for the first strategy and
        where fewer than two seeds are shared with it.

    Raises:
        ConfigError: no runs; two with the same label and seed; runs of different tasks or metrics.
    """
    if not summaries:
        raise ConfigError("there is no run to compare", "Name at least one strategy and one seed.")
    for key in ("task", "metric", "direction"):
        values = sorted({str(summary[key]) for summary in summaries if key in summary})
        if len(values) > 1:
            raise ConfigError(
                f"these runs differ in {key}: {', '.join(values)}",
                "Compare runs of one task and metric; write one report for each.",
            )
    by_label = finals(summaries)
    first = next(iter(by_label.values()))
    strategies = []
    for label, by_seed in by_label.items():
        mean, sd = mean_and_sd(list(by_seed.values()))
        interval = None if by_seed is first else paired_interval(paired_differences(first, by_seed))
        strategies.append(
            {
                "strategy": label,
                "mean": mean,
                "sd": sd,
                "difference": interval.difference if interval else None,
                "low": interval.low if interval else None,
                "high": interval.high if interval else None,
            }
        )
    return {
        "runs": [dict(summary) for summary in summaries],
        "references": [dict(reference) for reference in references],
        "strategies": strategies,
    }


def improvement(new: float, old: float, direction: str) -> float:
    """Return by how much `new` is better than `old`: positive is better in either direction."""
    return old - new if direction == "min" else new - old


def reference_finals(comparison: Comparison) -> dict[str, BySeed]:
    """Return the reference rows' test metric by label, in the order of `REFERENCES`, and by seed.

    Without a base row, the runs' own starts stand in for it under the name `START`, where the
    strategies agree on them.
    """
    found: dict[str, BySeed] = {}
    for reference in comparison["references"]:
        found.setdefault(reference_label(reference), {})[int(reference["seed"])] = number(
            reference["final"]
        )
    names = {reference_label(row): str(row["name"]) for row in comparison["references"]}
    if "base" not in names.values() and (starts := _shared_starts(comparison)):
        found[START], names[START] = starts, START
    order = {name: place for place, name in enumerate((START, *REFERENCES))}
    return {label: found[label] for label in sorted(found, key=lambda x: order.get(names[x], 9))}


def reference_label(reference: Mapping[str, Any]) -> str:
    """Return what tables call a reference row: its name, and what tells it from others of it."""
    return str(reference.get("label") or reference["name"])


def references_by_strategy(comparison: Comparison, name: str) -> dict[str, BySeed]:
    """Return what each strategy is to be measured against, by its label and by seed.

    Args:
        comparison: whose reference rows name the runs that they belong to in "runs", by directory;
            a row without that belongs to all.
        name: "base", "alone" or "centralised". Where no row is a base, it is each run's own start.

    Returns:
        Empty for a strategy that no row belongs to.
    """
    rows = [row for row in comparison["references"] if row["name"] == name]
    found: dict[str, BySeed] = {label_of(run): {} for run in comparison["runs"]}
    for run in comparison["runs"]:
        seed = int(run["seed"])
        for row in rows:
            own = row.get("runs")
            if int(row["seed"]) == seed and (own is None or run.get("directory") in own):
                found[label_of(run)][seed] = number(row["final"])
        if name == "base" and not rows and math.isfinite(start := number(run.get("initial"))):
            found[label_of(run)][seed] = start
    return found


def _shared_starts(comparison: Comparison) -> BySeed:
    """Return the runs' starts by seed; empty where two of a seed differ."""
    starts: BySeed = {}
    for run in comparison["runs"]:
        start = number(run.get("initial"))
        if math.isfinite(start) and starts.setdefault(int(run["seed"]), start) != start:
            return {}
    return starts


def mean_improvement(by_seed: BySeed, reference: BySeed, direction: str) -> float | None:
    """Return how much better than a reference a strategy is, on the mean of the shared seeds."""
    gains = [
        improvement(by_seed[seed], reference[seed], direction)
        for seed in sorted(by_seed.keys() & reference.keys())
    ]
    return mean_and_sd(gains)[0]
