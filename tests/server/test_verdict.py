"""What the verdict says, and above all what it does not say."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from server.statistics import build_comparison, short_labels
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


def test_only_intervals_that_exist_are_counted() -> None:
    """Of two that share fewer than two seeds with the first there is none to warn of."""
    text = verdict(comparison({"a": [0.7, 0.72, 0.71], "b": [0.5], "c": [0.6]}))
    assert text.splitlines()[0] == "On this data b and c can't be compared with a."
    assert "one in twenty" not in text
    finals = {"a": [0.7, 0.72, 0.71], "b": [0.5], "c": [0.8, 0.82, 0.81], "d": [0.9, 0.91, 0.92]}
    assert "These are 2 intervals" in verdict(comparison(finals))
    del finals["d"]
    assert "one in twenty" not in verdict(comparison(finals))  # one interval is what 95% says


def test_many_that_cannot_be_told_apart_are_counted_and_not_named() -> None:
    finals = {f"rule-{k}": [0.7, 0.74 + 0.01 * k] for k in range(25)}
    headline, second, *_ = verdict(comparison(finals)).splitlines()
    assert headline == "None of the 24 others can be told apart from rule-0 on this data."
    assert second == "24 intervals hold zero: the table has every difference."


def test_of_many_the_ones_that_differ_are_told_with_their_intervals() -> None:
    luck = [0.0, 0.001, -0.001]
    finals = {"first": [0.70, 0.70, 0.70]}
    finals |= {f"good-{k}": [0.80 + 0.01 * k + x for x in luck] for k in range(4)}
    finals |= {"bad": [0.60 + x for x in luck], "odd": [math.nan] * 3}
    finals |= {f"open-{k}": [0.70 + x for x in luck] for k in range(3)}
    headline, better, worse, still, none, *_ = verdict(comparison(finals)).splitlines()
    assert headline == (
        "On this data 4 of the 9 others are better than first; bad is worse than it; open-0, "
        "open-1 and open-2 can't be told apart from it; odd can't be compared with it."
    )
    assert better.startswith("Better than first: good-3 (+13.0 points, 95% interval +12.8 to ")
    assert better.count("interval") == 4
    assert worse == "Worse than first: bad (−10.0 points, 95% interval −10.2 to −9.8)."
    assert still == "3 intervals hold zero: the table has every difference."
    assert none.startswith("odd has no result")


def test_what_all_labels_share_is_not_repeated() -> None:
    finals = {"fedavg train.lr=0.1": [0.70, 0.74], "fedavg train.lr=0.2": [0.71, 0.73]}
    headline = verdict(comparison(finals)).splitlines()[0]
    assert headline == "train.lr=0.1 and train.lr=0.2 can't be told apart on this data."
    # Nor is anything left out where one would have no name, or two the same.
    assert short_labels(["a", "a x=1"]) == {"a": "a", "a x=1": "a x=1"}
    assert short_labels(["a b", "b a"]) == {"a b": "a b", "b a": "b a"}
    assert short_labels(["a (c)", "a (d)"]) == {"a (c)": "a (c)", "a (d)": "a (d)"}


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
