"""Means, paired intervals and seeds needed, against numbers that can be worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedgraft.errors import ConfigError
from fedgraft.seeds import stream
from server.statistics import (
    START,
    build_comparison,
    mean_and_sd,
    mean_improvement,
    paired_differences,
    paired_interval,
    reference_finals,
    references_by_strategy,
    seeds_needed,
)

# Student's t, two-sided 95%, by degrees of freedom, from a printed table.
T_TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 29: 2.045}


def summary(strategy: str, seed: int, final: float, **more: Any) -> dict[str, Any]:
    return {
        "strategy": strategy,
        "seed": seed,
        "task": "digits",
        "metric": "accuracy",
        "direction": "max",
        "initial": 0.4,
        "final": final,
    } | more


def runs(**finals: list[float]) -> list[dict[str, Any]]:
    return [
        summary(name, seed, final)
        for name, values in finals.items()
        for seed, final in enumerate(values)
    ]


def test_mean_and_sample_deviation() -> None:
    # Deviations -2, 0, 2: their squares sum to 8, over n - 1 = 2 that is 4, its root 2.
    assert mean_and_sd([1.0, 3.0, 5.0]) == (3.0, 2.0)
    assert mean_and_sd([0.7]) == (0.7, None)
    assert mean_and_sd([0.7, math.nan]) == (None, None)
    assert mean_and_sd([]) == (None, None)


@pytest.mark.parametrize("freedom", T_TABLE)
def test_interval_is_students(freedom: int) -> None:
    n = freedom + 1
    differences = [float(k) for k in range(n)]
    interval = paired_interval(differences)
    assert interval is not None
    mean = (n - 1) / 2
    sd = math.sqrt(sum((k - mean) ** 2 for k in range(n)) / (n - 1))
    half = T_TABLE[freedom] * sd / math.sqrt(n)
    assert interval.difference == pytest.approx(mean)
    # The printed table has four digits.
    assert interval.high - mean == pytest.approx(half, rel=5e-4)
    assert mean - interval.low == pytest.approx(half, rel=5e-4)


def test_interval_holds_the_truth_nineteen_times_in_twenty() -> None:
    random = stream(0, "coverage")
    trials = 1000
    held = 0
    for sample in random.normal(0.3, 1.0, (trials, 3)):
        interval = paired_interval(list(sample))
        assert interval is not None
        held += interval.low <= 0.3 <= interval.high
    # Four standard errors of a share of 0.95 over 1,000 trials are 0.028.
    assert held / trials == pytest.approx(0.95, abs=0.028)


def test_interval_needs_two_pairs() -> None:
    assert paired_interval([]) is None
    assert paired_interval([0.1]) is None


def test_pairs_go_by_seed_and_not_by_place() -> None:
    first = {0: 0.5, 1: 0.6, 7: 0.9}
    other = {7: 1.0, 3: 0.0, 1: 0.8, 0: 0.6}
    assert paired_differences(first, other) == pytest.approx([0.1, 0.2, 0.1])


def test_a_run_without_a_result_leaves_no_pairs() -> None:
    assert paired_differences({0: 0.5, 1: 0.6}, {0: math.nan, 1: 0.7}) == []


def test_seeds_needed_by_hand() -> None:
    # Mean 2, sd 1. With 3 seeds 4.303 / sqrt(3) = 2.48 > 2; with 4, 3.182 / 2 = 1.59 < 2.
    assert seeds_needed([1.0, 2.0, 3.0]) == 4
    # Mean 1, sd sqrt(2). With 9 seeds 2.306 * 1.414 / 3 = 1.087 > 1; with 10, 1.012 > 1;
    # with 11, 2.228 * 1.414 / 3.317 = 0.950 < 1.
    assert seeds_needed([0.0, 2.0]) == 11
    assert seeds_needed([-2.0, 0.0]) == 11
    assert seeds_needed([0.5, 0.5]) == 2


def test_seeds_needed_may_have_no_answer() -> None:
    assert seeds_needed([1.0]) is None
    assert seeds_needed([-1.0, 1.0]) is None
    assert seeds_needed([-1.0, 1.001]) is None  # some two million seeds


def test_seeds_needed_agrees_with_the_interval() -> None:
    random = stream(0, "agreement")
    decided = 0
    for _ in range(300):
        differences = list(random.normal(random.uniform(-2, 2), 1.0, random.integers(2, 9)))
        interval, needed = paired_interval(differences), seeds_needed(differences)
        assert interval is not None
        enough = needed is not None and needed <= len(differences)
        assert enough == interval.excludes_zero
        decided += enough
    assert 30 < decided < 270  # both outcomes were met


def test_comparison_has_the_documented_form() -> None:
    reference = {"name": "base", "seed": 0, "metric": "accuracy", "final": 0.4}
    comparison = build_comparison(runs(a=[0.5, 0.7], b=[0.6, 0.8]), [reference])
    assert set(comparison) == {"runs", "references", "strategies"}
    assert len(comparison["runs"]) == 4
    assert comparison["references"] == [reference]
    first, second = comparison["strategies"]
    assert first == {
        "strategy": "a",
        "mean": pytest.approx(0.6),
        "sd": pytest.approx(0.1 * math.sqrt(2)),
        "difference": None,
        "low": None,
        "high": None,
    }
    assert second["difference"] == pytest.approx(0.1)
    assert second["low"] <= second["difference"] <= second["high"]


def test_one_seed_has_neither_deviation_nor_interval() -> None:
    comparison = build_comparison(runs(a=[0.5], b=[0.6]), [])
    for row in comparison["strategies"]:
        assert [row[key] for key in ("sd", "difference", "low", "high")] == [None] * 4


def test_a_run_without_a_result_is_never_left_out_of_a_mean() -> None:
    rows = build_comparison(runs(a=[0.5, 0.7, 0.6], b=[0.6, math.nan, 0.7]), [])["strategies"]
    assert rows[1]["mean"] is None
    assert rows[1]["difference"] is None


def test_labels_tell_variants_of_one_rule_apart() -> None:
    summaries = [
        summary("fedavg", seed, 0.5, label=f"fedavg train.lr={lr}")
        for lr in (0.01, 0.02)
        for seed in (0, 1)
    ]
    rows = build_comparison(summaries, [])["strategies"]
    assert [row["strategy"] for row in rows] == ["fedavg train.lr=0.01", "fedavg train.lr=0.02"]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ConfigError, match="no run to compare"):
        build_comparison([], [])
    with pytest.raises(ConfigError, match="two runs are both a with seed 0"):
        build_comparison(runs(a=[0.5]) * 2, [])
    with pytest.raises(ConfigError, match="differ in metric: accuracy, loss"):
        build_comparison([*runs(a=[0.5]), summary("b", 0, 0.5, metric="loss")], [])


@pytest.mark.parametrize(("direction", "gain"), [("max", 0.2), ("min", -0.2)])
def test_gain_is_positive_where_better(direction: str, gain: float) -> None:
    found = mean_improvement({0: 0.6, 1: 0.8}, {0: 0.5, 1: 0.5, 2: 0.0}, direction)
    assert found == pytest.approx(gain)
    assert mean_improvement({0: 0.6}, {1: 0.5}, direction) is None


def test_starts_stand_in_for_a_base_row() -> None:
    comparison = build_comparison(runs(a=[0.5, 0.7]), [])
    assert reference_finals(comparison) == {START: {0: 0.4, 1: 0.4}}
    rows = [{"name": n, "seed": 0, "final": 0.3} for n in ("centralised", "alone", "base")]
    comparison = build_comparison(runs(a=[0.5, 0.7]), rows)
    assert list(reference_finals(comparison)) == ["base", "alone", "centralised"]


def test_a_run_is_measured_against_the_row_that_belongs_to_it() -> None:
    """By hand: rank 2 and rank 4 have a row each; "c" has none."""
    summaries = [
        summary(name, 0, final) | {"directory": f"runs/{name}"}
        for name, final in (("a", 0.5), ("b", 0.6), ("c", 0.7))
    ]
    rows = [
        {"name": "centralised", "seed": 0, "final": final}
        | {"label": f"centralised adapter.rank={rank}", "runs": [f"runs/{name}"]}
        for name, rank, final in (("a", 2, 0.8), ("b", 4, 0.9))
    ]
    comparison = build_comparison(summaries, [*rows, {"name": "base", "seed": 0, "final": 0.4}])
    assert references_by_strategy(comparison, "centralised") == {
        "a": {0: 0.8},
        "b": {0: 0.9},
        "c": {},
    }
    assert references_by_strategy(comparison, "base") == {name: {0: 0.4} for name in "abc"}
    assert reference_finals(comparison) == {
        "base": {0: 0.4},
        "centralised adapter.rank=2": {0: 0.8},
        "centralised adapter.rank=4": {0: 0.9},
    }


def test_starts_that_differ_are_no_row_and_each_runs_own() -> None:
    summaries = [summary("a", 0, 0.5, initial=0.4), summary("b", 0, 0.5, initial=0.3)]
    comparison = build_comparison(summaries, [])
    assert reference_finals(comparison) == {}
    assert references_by_strategy(comparison, "base") == {"a": {0: 0.4}, "b": {0: 0.3}}


def test_rows_are_plain_numbers() -> None:
    rows = build_comparison(runs(a=[0.5, 0.7], b=[0.6, 0.8]), [])["strategies"]
    values = [value for row in rows for key, value in row.items() if key != "strategy"]
    assert not any(isinstance(value, np.generic) for value in values)
