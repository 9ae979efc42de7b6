"""A comparison in plain words: who can be told apart from the first strategy, and who cannot.

Nothing is called better or worse unless the paired 95% interval of its difference excludes zero;
with one seed nothing is compared at all.
"""

from __future__ import annotations

import math

from server.statistics import (
    MOST_SEEDS,
    BySeed,
    Comparison,
    finals,
    improvement,
    mean_and_sd,
    mean_improvement,
    paired_differences,
    paired_interval,
    references_by_strategy,
    seeds_needed,
    short_labels,
)
from server.units import Unit, listed

_NAMED = 3
"""So many strategies are named in a headline, and of more their number is."""
_EACH = 6
"""So many strategies get a line each."""
_ONE_SEED = (
    "One seed tells nothing about how much of {what} is luck: another seed deals the data "
    "differently and starts from another adapter. Repeat with fedgraft compare and at least three "
    "seeds (--seeds 0,1,2)."
)


def verdict(comparison: Comparison) -> str:
    """Say what a comparison shows: the headline on the first line, then one finding a line.

    Args:
        comparison: what `statistics.build_comparison` returns and `comparison.json` holds.
    """
    reading = _Reading(comparison)
    lines = reading.one_strategy() if len(reading.by_label) == 1 else reading.all_strategies()
    return "\n".join(lines)


class _Reading:
    """A comparison with what every sentence about it needs."""

    def __init__(self, comparison: Comparison) -> None:
        run = comparison["runs"][0]
        self.unit = Unit(str(run["metric"]))
        self.direction = str(run["direction"])
        self.by_label = finals(comparison["runs"])
        self.first = next(iter(self.by_label))
        self.names = short_labels(list(self.by_label))
        self.base = references_by_strategy(comparison, "base")
        self.centralised = references_by_strategy(comparison, "centralised")
        rows = any(row["name"] == "base" for row in comparison["references"])
        self.base_words = "the untouched base" if rows else "its own start"

    def one_strategy(self) -> list[str]:
        """Say what a strategy reaches, and what lies between it and the reference rows."""
        by_seed = self.by_label[self.first]
        mean, sd = mean_and_sd(list(by_seed.values()))
        if mean is None:
            return [self._no_result(self.first)]
        headline = f"{self.first} reaches a test {self.unit.name} of {self.unit.spread(mean, sd)}"
        gain = mean_improvement(by_seed, self.base[self.first], self.direction)
        if gain is not None:
            word = "better" if gain >= 0 else "worse"
            headline += f", {self._size(gain)} {word} than {self.base_words}"
        lines = [f"{headline}."]
        ahead = mean_improvement(by_seed, self.centralised[self.first], self.direction)
        if ahead is not None:
            word = "past" if ahead > 0 else "short of"
            lines.append(f"It ends {self._size(ahead)} {word} training on the pooled data.")
        if len(by_seed) == 1:
            lines.append(_ONE_SEED.format(what="this"))
        else:
            lines.append(f"Mean and standard deviation are over {len(by_seed)} seeds.")
        return lines

    def all_strategies(self) -> list[str]:
        """Say what the paired intervals show, then how all stand to the reference rows."""
        if max(len(by_seed) for by_seed in self.by_label.values()) == 1:
            luck = _ONE_SEED.format(what="a difference")
            return ["One seed can't say which strategy is better.", luck, *self._standing()]
        groups: dict[str, list[str]] = {"better": [], "worse": [], "open": [], "unknown": []}
        findings = {}
        for label in list(self.by_label)[1:]:
            group, findings[label] = self._finding(label)
            groups[group].append(label)
        lines = list(findings.values())
        if len(lines) > _EACH:
            lines = [
                *self._in_groups(groups),
                *dict.fromkeys(findings[x] for x in groups["unknown"]),
            ]
        intervals = sum(len(groups[group]) for group in ("better", "worse", "open"))
        if intervals > 1 and (groups["better"] or groups["worse"]):
            lines.append(
                f"These are {intervals} intervals of 95% each: of strategies that do not "
                "differ, one in twenty would exclude zero by luck."
            )
        return [self._headline(groups), *lines, *self._standing()]

    def _in_groups(self, groups: dict[str, list[str]]) -> list[str]:
        """Return a line for the better ones, one for the worse and one for the rest."""
        lines = []
        for word in ("better", "worse"):
            found = []
            for label in groups[word]:
                interval = paired_interval(self._pairs(label))
                assert interval is not None
                said = self.unit.differences(interval.difference, interval.low, interval.high)
                size = f"{said[0]}{self.unit.points}, 95% interval {said[1]} to {said[2]}"
                found.append((-abs(interval.difference), f"{self.names[label]} ({size})"))
            if found:
                told = "; ".join(text for _, text in sorted(found))
                lines.append(f"{word.capitalize()} than {self.names[self.first]}: {told}.")
        if groups["open"]:
            count = len(groups["open"])
            verb = "interval holds" if count == 1 else "intervals hold"
            lines.append(f"{count} {verb} zero: the table has every difference.")
        return lines

    def _pairs(self, label: str) -> list[float]:
        return paired_differences(self.by_label[self.first], self.by_label[label])

    def _finding(self, label: str) -> tuple[str, str]:
        """Return how a strategy compares with the first one, in one word and in a sentence."""
        differences = self._pairs(label)
        interval = paired_interval(differences)
        if interval is None:
            for name in (self.first, label):
                if not all(math.isfinite(value) for value in self.by_label[name].values()):
                    return "unknown", self._no_result(name)
            return "unknown", (
                f"{self.names[label]} shares fewer than two seeds with {self.names[self.first]}, "
                "and one tells nothing."
            )
        middle, low, high = self.unit.differences(interval.difference, interval.low, interval.high)
        finding = (
            f"{self.names[label]} minus {self.names[self.first]}: {middle}{self.unit.points} "
            f"over {len(differences)} seeds, 95% interval {low} to {high}"
        )
        if not interval.excludes_zero:
            return "open", f"{finding}, which holds zero. {_how_many(differences)}"
        gain = improvement(interval.difference, 0.0, self.direction)
        return "better" if gain > 0 else "worse", f"{finding}, which excludes zero."

    def _headline(self, groups: dict[str, list[str]]) -> str:
        undecided, others = groups["open"], len(self.by_label) - 1
        first = self.names[self.first]
        if len(undecided) == 1 == others:
            return f"{first} and {self.names[undecided[0]]} can't be told apart on this data."
        if len(undecided) == others > _NAMED:
            return f"None of the {others} others can be told apart from {first} on this data."
        parts: list[str] = []
        for word in ("better", "worse"):
            if found := groups[word]:
                whom = "it" if parts else first
                parts.append(f"{self._who(found, not parts)} {_verb(found)} {word} than {whom}")
        for group, words in (("open", "told apart from"), ("unknown", "compared with")):
            if groups[group]:
                whom = "it" if parts else first
                parts.append(f"{self._who(groups[group], not parts)} can't be {words} {whom}")
        return f"On this data {'; '.join(parts)}."

    def _who(self, labels: list[str], first: bool) -> str:
        """Name a few strategies, or say how many they are; the first time, of how many."""
        if len(labels) <= _NAMED:
            return listed([self.names[label] for label in labels])
        return (
            f"{len(labels)} of the {len(self.by_label) - 1} others" if first else f"{len(labels)}"
        )

    def _standing(self) -> list[str]:
        """Say what the strategies gain over the base, and what the pooled data would add."""
        lines = []
        words = self.base_words.replace("its", "their")
        gains = self._over_all(self.base)
        if len(gains) == len(self.by_label) and min(gains) > 0:
            lines.append(f"All of them gain over {words}: {self._sizes(gains)}.")
        elif gains:
            lines.append(f"Change against {words} (above zero is better): {self._sizes(gains)}.")
        ahead = self._over_all(self.centralised)
        if len(ahead) == len(self.by_label) and max(ahead) < 0:
            short = self._sizes([-gain for gain in ahead])
            lines.append(f"They end short of training on the pooled data: {short}.")
        elif ahead:
            lines.append(
                "Against training on the pooled data (below zero is short of it): "
                f"{self._sizes(ahead)}."
            )
        return lines

    def _sizes(self, values: list[float]) -> str:
        low, high = self.unit.differences(min(values), max(values), signed=min(values) < 0)
        return f"{low if low == high else f'{low} to {high}'}{self.unit.points}"

    def _over_all(self, references: dict[str, BySeed]) -> list[float]:
        found = (
            mean_improvement(by_seed, references[label], self.direction)
            for label, by_seed in self.by_label.items()
        )
        return [gain for gain in found if gain is not None]

    def _no_result(self, label: str) -> str:
        name = self.names[label]
        return f"{name} has no result: the test {self.unit.name} of a run is no finite number."

    def _size(self, value: float) -> str:
        return f"{self.unit.difference(abs(value), signed=False)}{self.unit.points}"


def _how_many(differences: list[float]) -> str:
    needed = seeds_needed(differences)
    if needed is not None:
        return f"If the difference seen is the real one, it takes about {needed} seeds to tell."
    if math.fsum(differences) == 0:
        return "The mean difference seen is zero: no number of seeds would tell."
    return f"At the difference seen, even {MOST_SEEDS:,} seeds would not tell."


def _verb(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
