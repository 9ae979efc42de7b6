"""Curves against hand-made rounds, and pictures that are whole, honest and drawn alike twice."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image
from synthetic_runs import write_comparison, write_run

from server.bar_plots import number_place
from server.curve_plots import _visible
from server.figure import DPI, WIDTH, Plot, look, spread
from server.plots import draw_plots, save_plots
from server.results import Run, read_results
from server.series import (
    ClientResult,
    bias_by_round,
    clients_at_chosen_round,
    is_exact,
    metric_by_bytes,
    metric_by_round,
)

ALL = {"metric-by-round", "metric-by-megabytes", "differences", "aggregation-bias", "clients"}


def run(rounds: list[dict[str, Any]], *, seed: int = 0, best_round: int = 0) -> Run:
    summary = {"strategy": "a", "seed": seed, "metric": "accuracy", "best_round": best_round}
    return Run(".", ".", summary, {r["round"]: r for r in rounds}, {}, {})


def measured(round: int, accuracy: float | None, sent: int = 0) -> dict[str, Any]:
    validation = None if accuracy is None else {"accuracy": accuracy}
    return {"round": round, "validation": validation, "bytes_up": sent, "bytes_down": 2 * sent}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plots") / "comparison"
    write_comparison(folder, rounds=12)
    return folder


@pytest.fixture(scope="module")
def plots(compared: Path) -> dict[str, Plot]:
    return {plot.name: plot for plot in draw_plots(read_results([compared]))}


def test_a_curve_is_the_mean_with_the_lowest_and_the_highest_seed() -> None:
    one = run([measured(0, 0.4), measured(1, None), measured(2, 0.6), measured(3, 0.9)])
    two = run([measured(0, 0.2), measured(1, 0.5), measured(2, 0.8)], seed=1)
    curve = metric_by_round([one, two], "accuracy")
    # Round 1 was not measured by one seed and round 3 not run by the other.
    assert curve.x.tolist() == [0, 2]
    assert curve.mean.tolist() == pytest.approx([0.3, 0.7])
    assert curve.low.tolist() == [0.2, 0.6]
    assert curve.high.tolist() == [0.4, 0.8]


def test_bytes_add_up_over_rounds_without_a_measurement_too() -> None:
    rounds = [measured(0, 0.4), measured(1, None, 10), measured(2, 0.6, 10), measured(3, 0.7, 30)]
    assert metric_by_bytes([run(rounds)], "accuracy").x.tolist() == [0, 60, 150]


def test_unknown_bias_is_a_gap() -> None:
    def biased(round: int, after: float | None) -> dict[str, Any]:
        bias = None if after is None else {"before": 1.0, "after": after, "repairable": None}
        return {"round": round, "aggregation_bias": bias}

    runs = [
        run([biased(0, None), biased(1, 0.2), biased(2, None), biased(3, 0.1)]),
        run([biased(0, None), biased(1, 0.4), biased(2, None), biased(3, None)], seed=1),
    ]
    curve = bias_by_round(runs, "after")
    assert curve.x.tolist() == [1, 2, 3]
    assert curve.mean[[0, 2]].tolist() == pytest.approx([0.3, 0.1])
    assert math.isnan(curve.mean[1])
    assert not is_exact(runs)
    assert is_exact([run([biased(1, 3e-8), biased(2, 0.0)])])
    assert not is_exact([run([biased(1, None)])])  # unknown is not exact


def test_the_share_that_a_rule_removes() -> None:
    """Of a bias of 0.2 a rule leaves 0.19: 5%. Who makes it worse removes less than nothing."""

    def biased(round: int, before: float, after: float) -> dict[str, Any]:
        return {"round": round, "aggregation_bias": {"before": before, "after": after}}

    rounds = [biased(1, 0.2, 0.19), biased(2, 0.1, 0.12), biased(3, 0.0, 0.0)]
    curve = bias_by_round([run(rounds)], "removed")
    assert curve.mean[:2].tolist() == pytest.approx([0.05, -0.2])
    assert math.isnan(curve.mean[2])


def test_the_removed_share_is_said_and_drawn(plots: dict[str, Plot], tmp_path: Path) -> None:
    """The synthetic LoRA-FAIR removes 6%, FedAvg nothing."""
    biased = plots["aggregation-bias"]
    assert "Removed, the mean over rounds: lora-fair 6.0%." in biased.caption
    write_comparison(tmp_path / "c", strategies=("fedavg", "flora"), rounds=3)
    none = {p.name: p for p in draw_plots(read_results([tmp_path / "c"]))}["aggregation-bias"]
    assert "Removed" not in none.caption
    heights = [Image.open(io.BytesIO(plot.png)).height for plot in (none, biased)]
    assert heights[1] > heights[0] + 200


def test_next_to_no_bias_does_not_squeeze_the_rest() -> None:
    shown = _visible(np.array([0.2, 0.1, 1e-9, 0.0, math.nan]), largest=0.2)
    assert np.isfinite(shown).tolist() == [True, True, False, False, False]


def test_clients_are_read_at_each_runs_own_chosen_round() -> None:
    def clients(round: int, **accuracies: float) -> dict[str, Any]:
        return {
            "round": round,
            "clients": {
                name.lstrip("c"): {"examples": 50, "validation": {"accuracy": accuracy}}
                for name, accuracy in accuracies.items()
            },
        }

    one = run([clients(0, c2=0.1, c10=0.2), clients(1, c2=0.5, c10=0.6), clients(2, c2=0.9)])
    two = run([clients(0, c2=0.3), clients(1, c2=0.0), clients(2, c2=0.7, c10=0.8)], seed=1)
    one.summary["best_round"], two.summary["best_round"] = 1, 2
    found = clients_at_chosen_round([one, two], "accuracy")
    assert list(found) == ["2", "10"]
    assert (found["2"].low, found["2"].high) == (0.5, 0.7)
    assert found["10"].mean == pytest.approx(0.7)
    assert found["2"].start == pytest.approx(0.2)
    assert found["2"].examples == 50


def test_names_stand_apart_and_move_no_more_than_they_must() -> None:
    assert spread([0.1, 0.9], 0.2) == [0.1, 0.9]
    assert spread([0.9, 0.5, 0.5], 0.2) == pytest.approx([0.9, 0.4, 0.6])
    places = spread([0.5, 0.52, 0.3, 0.9, 0.51], 0.1)
    assert np.diff(sorted(places)).min() >= 0.1 - 1e-12
    assert np.argsort(places).tolist() == [2, 0, 4, 1, 3]


def test_a_comparison_has_every_plot(compared: Path, tmp_path: Path) -> None:
    paths = save_plots([compared], tmp_path / "plots")
    assert {path.stem for path in paths} == ALL
    for path in paths:
        image = Image.open(path)
        image.load()
        assert image.width == round(WIDTH * DPI)
        assert len(set(image.convert("RGB").resize((64, 64)).getdata())) > 8  # not a blank sheet


def test_pictures_are_equal_bytes_whatever_the_user_set_up(
    compared: Path, plots: dict[str, Plot]
) -> None:
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "lines.linewidth": 9}):
        again = draw_plots(read_results([compared]))
    assert {plot.name: plot.png for plot in again} == {k: plot.png for k, plot in plots.items()}
    assert dict(matplotlib.rcParams) == before


def test_pictures_carry_neither_date_nor_version(plots: dict[str, Plot]) -> None:
    for plot in plots.values():
        assert set(Image.open(io.BytesIO(plot.png)).info) <= {"dpi"}, plot.name


def test_one_run_of_one_round_is_drawn(tmp_path: Path) -> None:
    write_run(tmp_path / "run", rounds=1, clients=1)
    names = {plot.name for plot in draw_plots(read_results([tmp_path / "run"]))}
    assert names == ALL - {"differences"}


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    write_run(tmp_path / "run", strategy="ffa-lora", rounds=2)
    run = read_results([tmp_path / "run"])
    for record in run.runs[0].rounds.values():
        record |= {"validation": None, "bytes_up": 0, "bytes_down": 0}
        for client in record["clients"].values():
            client["validation"] = None
    assert draw_plots(run) == []  # and the rule is exact, so there is no bias to draw


@pytest.mark.filterwarnings("error")
def test_a_bias_that_one_of_two_rules_does_not_know(tmp_path: Path) -> None:
    for name in ("fedavg", "other"):
        write_run(tmp_path / name, strategy=name, rounds=2)
    results = read_results([tmp_path / "fedavg", tmp_path / "other"])
    for record in results.of("other")[0].rounds.values():
        record["aggregation_bias"] = None
    assert "aggregation-bias" in {plot.name for plot in draw_plots(results)}


def test_captions_and_alternatives_say_what_is_seen(plots: dict[str, Plot]) -> None:
    assert "lowest to highest seed" in plots["metric-by-round"].caption
    assert "Exact: ffa-lora" in plots["aggregation-bias"].alt
    assert "mirrored, lower contrast" in plots["clients"].alt
    for plot in plots.values():
        assert "fedavg" in plot.alt
        assert not plot.caption.startswith(" ")


@pytest.mark.parametrize(
    ("metric", "worst"), [("accuracy", "mirrored"), ("perplexity", "mirrored")]
)
def test_the_worst_client_is_the_worst_in_either_direction(
    tmp_path: Path, metric: str, worst: str
) -> None:
    write_run(tmp_path / "run", metric=metric, rounds=3)
    plot = {p.name: p for p in draw_plots(read_results([tmp_path / "run"]))}["clients"]
    assert worst in plot.alt


def test_a_number_stands_clear_of_the_tick_of_its_clients_start() -> None:
    bar = ClientResult("0", "", mean=0.30, low=0.28, high=0.32, start=0.33, examples=9.0)
    assert number_place(bar, longest=0.8) == 0.33
    for start in (0.20, 0.60, math.nan):  # in the bar, far from it, not measured
        assert number_place(replace(bar, start=start), longest=0.8) == 0.32


def test_hostile_names_are_drawn_as_text(tmp_path: Path) -> None:
    names = (r"$\frac{1}{", "<b>x</b>\n\x07", "日本語" * 40, "_hidden", "")
    write_run(tmp_path / "run", clients=5, rounds=2, descriptions=names)
    assert len(draw_plots(read_results([tmp_path / "run"]))) == 4


def test_of_many_strategies_the_first_and_the_best_have_colours(tmp_path: Path) -> None:
    strategies = ("fedavg", *(f"rule-{k}" for k in range(24)))
    write_comparison(tmp_path / "c", strategies=strategies, seeds=(0, 1), rounds=3)
    results = read_results([tmp_path / "c"])
    means = {row["strategy"]: row["mean"] for row in results.comparison["strategies"]}
    best = sorted(strategies[1:], key=lambda label: -means[label])[:6]
    assert set(results.highlighted) == {"fedavg", *best}
    looks = [look(results.place(label)) for label in results.highlighted]
    assert len({one["color"] for one in looks}) == len({one["marker"] for one in looks}) == 7
    plots = {plot.name: plot for plot in draw_plots(results)}
    heights = {name: Image.open(io.BytesIO(plot.png)).height for name, plot in plots.items()}
    assert max(heights.values()) < 2.1 * WIDTH * DPI
    assert all(label in plots["differences"].alt for label in strategies)
    assert "Of 18 more strategies see the table." in plots["clients"].caption


def test_many_clients_and_strategies_fit(tmp_path: Path) -> None:
    strategies = tuple("abcdefghi")
    write_comparison(tmp_path / "c", strategies=strategies, seeds=(0, 1), clients=40, rounds=3)
    plot = {p.name: p for p in draw_plots(read_results([tmp_path / "c"]))}["clients"]
    assert "The 34 better clients are left out. Of 2 more strategies see the table." in plot.caption
    assert Image.open(io.BytesIO(plot.png)).height < 4000
