"""What the verdict says, and above all what it does not say."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from server.statistics import build_comparison
from server.verdict import verdict

WINNERS = re.compile(r"\b(better|worse) than (?!the untouched|their own|its own)")


def comparison(
    finals: dict[str, list[float]],
    *,
    metric: str = "accuracy",
    direction: str = "max",
    initial: float = 0.4,
    references: dict[str, float] | None = None,
) -> dict[str, Any]:
    runs = [
        {
            "strategy": name,
            "seed": seed,
            "task": "t",
            "metric": metric,
            "direction": direction,
            "initial": initial,
            "final": final,
        }
        for name, values in finals.items()
        for seed, final in enumerate(values)
    ]
    seeds = range(max(len(values) for values in finals.values()))
    rows = [
        {"name": name, "seed": seed, "metric": metric, "final": final}
        for name, final in (references or {}).items()
        for seed in seeds
    ]
    return build_comparison(runs, rows)


def test_two_that_cannot_be_told_apart() -> None:
    text = verdict(comparison({"fedavg": [0.70, 0.74, 0.72], "lora-fair": [0.71, 0.73, 0.74]}))
    headline, finding, *_ = text.splitlines()
    assert headline == "fedavg and lora-fair can't be told apart on this data."
    # Differences 1, -1, 2 points: mean 0.67, sd 1.528, half 4.303 * 1.528 / sqrt(3) = 3.79.
    assert "+0.7 points over 3 seeds, 95% interval −3.1 to +4.5, which holds zero" in finding
    # t_{22} * 1.528 / sqrt(23) = 0.661 < 0.667, and 0.677 with 22 seeds.
    assert "it takes about 23 seeds to tell" in finding
    assert not WINNERS.search(text)


def test_several_that_cannot_be_told_apart() -> None:
    text = verdict(comparison({"a": [0.7, 0.74], "b": [0.71, 0.73], "c": [0.75, 0.72]}))
    assert text.splitlines()[0] == "On this data b and c can't be told apart from a."
    assert not WINNERS.search(text)
    assert "one in twenty" not in text


@pytest.mark.parametrize(("direction", "word"), [("max", "better"), ("min", "worse")])
def test_an_interval_without_zero_decides_by_direction(direction: str, word: str) -> None:
    finals = {"a": [1.00, 1.10, 1.20], "b": [1.50, 1.61, 1.69], "c": [1.0, 1.2, 1.1]}
    text = verdict(comparison(finals, metric="loss", direction=direction, initial=4.0))
    assert (
        text.splitlines()[0] == f"On this data b is {word} than a; c can't be told apart from it."
    )
    assert "which excludes zero" in text
    assert "one in twenty" in text


def test_one_seed_tells_nothing() -> None:
    text = verdict(comparison({"a": [0.5], "b": [0.9]}))
    assert text.splitlines()[0] == "One seed can't say which strategy is better."
    assert "One seed tells nothing" in text
    assert not WINNERS.search(text)
    assert "One seed tells nothing" in verdict(comparison({"a": [0.5]}))


def test_one_run_is_described() -> None:
    references = {"base": 0.4, "centralised": 0.8}
    lines = verdict(comparison({"a": [0.774]}, references=references)).splitlines()
    assert lines[0] == (
        "a reaches a test accuracy of 77.4%, 37.4 points better than the untouched base."
    )
    assert lines[1] == "It ends 2.6 points short of training on the pooled data."


def test_a_run_worse_than_its_start_is_called_that() -> None:
    loss = comparison({"a": [2.75]}, metric="loss", direction="min", initial=2.5)
    assert "0.250 worse than its own start" in verdict(loss)


def test_standing_to_the_reference_rows() -> None:
    finals = {"a": [0.70, 0.74], "b": [0.71, 0.73]}
    text = verdict(comparison(finals, references={"base": 0.4, "centralised": 0.75}))
    assert "All of them gain over the untouched base: 32.0 points." in text
    assert "They end short of training on the pooled data: 3.0 points." in text
    text = verdict(comparison(finals, references={"base": 0.8, "centralised": 0.6}))
    assert "All of them gain" not in text
    assert "They end short" not in text
    assert "−8.0 points" in text


def test_a_diverged_run_is_not_ranked() -> None:
    text = verdict(comparison({"a": [0.7, 0.7, 0.7], "b": [math.nan, 0.9, 0.9]}))
    assert text.splitlines()[0] == "On this data b can't be compared with a."
    assert "b has no result" in text


def test_equal_strategies_need_no_number_of_seeds() -> None:
    text = verdict(comparison({"a": [0.70, 0.74], "b": [0.74, 0.70]}))
    assert "no number of seeds would tell" in text
