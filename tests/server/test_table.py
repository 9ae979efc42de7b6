"""The table at the end of a run or a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from synthetic_runs import write_comparison, write_run

from server.statistics import build_comparison
from server.table import REFERENCE_WORDS, fitting_table, reference_rows, strategy_rows


def printed(comparison: dict[str, Any], width: int = 80) -> list[str]:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(fitting_table(comparison, console))
    return [line.rstrip() for line in capture.get().splitlines()]


def run(strategy: str, seed: int, final: float, **more: Any) -> dict[str, Any]:
    return {
        "strategy": strategy,
        "seed": seed,
        "task": "t",
        "metric": "accuracy",
        "direction": "max",
        "initial": 0.4,
        "final": final,
        "bytes_up": 3_000_000,
        "bytes_down": 4_500_000,
        "wall_seconds": 18.2,
    } | more


def test_cells_by_hand() -> None:
    finals = {"a": [0.70, 0.74], "b": [0.71, 0.77]}
    runs = [run(name, seed, f) for name, values in finals.items() for seed, f in enumerate(values)]
    references = [
        {"name": name, "seed": seed, "metric": "accuracy", "final": final}
        for name, final in (("base", 0.5), ("centralised", 0.73))
        for seed in (0, 1)
    ]
    first, second = strategy_rows(build_comparison(runs, references))
    # 0.70, 0.74: mean 0.72, sd 0.0283; gain 22 points; short of centralised by 1 point.
    assert (first.result, first.difference, first.interval) == ("72.0 ± 2.8%", "–", "–")
    assert (first.gain, first.short, first.sent, first.wall) == ("+22.0", "+1.0", "7.50", "18")
    # Differences 1 and 3 points: mean 2, sd 1.414, half 12.706 * 1.414 / 1.414 = 12.7.
    assert (second.difference, second.interval) == ("+2.0", "−10.7 to +14.7")
    assert second.short == "−1.0"


def test_it_fits_a_terminal_of_80_columns(tmp_path: Path) -> None:
    for metric in ("accuracy", "perplexity"):
        lines = printed(write_comparison(tmp_path / metric, rounds=1, metric=metric))
        assert max(map(len, lines)) <= 80
        assert "…" not in "".join(lines)
        words = [line.split()[0] for line in lines if line and line[0].isalpha()]
        rows = ["fedavg", "ffa-lora", "lora-fair", "base", "alone", "centralised"]
        assert words[-6:] == rows


def test_a_narrow_screen_does_without_columns_and_cuts_none(tmp_path: Path) -> None:
    comparison = write_comparison(tmp_path / "c", rounds=1)
    for run in comparison["runs"]:
        run["client_metric"] = {"worst": 0.644, "best": 0.8, "mean": 0.7, "sd": 0.05}
        run["wall_seconds"] = 123.0
    titles = []
    for width in (200, 80, 70):
        text = "\n".join(printed(comparison, width))
        whole = {"worst": "64.4%", "time,": "123"}
        for title, cell in whole.items():
            assert (title in text) == (text.count(cell) >= 3)
        assert "sent" in text and "interval" in text
        titles.append([title for title in whole if title in text])
    assert titles == [["worst", "time,"], ["time,"], []]


def test_one_run_has_no_empty_columns(tmp_path: Path) -> None:
    lines = printed(build_comparison([write_run(tmp_path / "run", rounds=1)], []))
    text = "\n".join(lines)
    assert "interval" not in text
    assert "central" not in text
    assert "epsilon" not in text
    assert "start" in text


def test_labels_are_text_and_not_markup() -> None:
    assert any(
        "[red]a[/red]" in line
        for line in printed(build_comparison([run("[red]a[/red]", 0, 0.5)], []))
    )


def test_the_worst_client_is_a_mean_over_seeds() -> None:
    worst = ({"worst": 0.50, "sd": 0.04}, {"worst": 0.56, "sd": 0.02})
    runs = [run("a", seed, 0.7, client_metric=found) for seed, found in enumerate(worst)]
    [row] = strategy_rows(build_comparison(runs, []))
    assert (row.worst, row.apart) == ("53.0%", "3.0")
    text = "\n".join(printed(build_comparison(runs, [])))
    assert "worst" in text and "53.0%" in text
    silent = build_comparison([run("a", 0, 0.7, client_metric=None)], [])
    assert strategy_rows(silent)[0].worst == "–" and "worst" not in "\n".join(printed(silent))


def test_the_privacy_spent_is_the_worst_runs() -> None:
    runs = [run("a", seed, 0.7, epsilon=epsilon) for seed, epsilon in enumerate((3.0, 3.25))]
    comparison = build_comparison(runs, [])
    assert strategy_rows(comparison)[0].epsilon == "3.25"
    for privacy, shown in (({"untold": 1}, "unknown"), ({"untold": 0}, "∞")):
        silent = run("a", 2, 0.7, epsilon=None) | {"privacy": privacy}
        assert strategy_rows(build_comparison([*runs, silent], []))[0].epsilon == shown
    assert any("3.25" in line for line in printed(comparison))


def test_reference_rows_say_what_they_are(tmp_path: Path) -> None:
    rows = {row.name: row for row in reference_rows(write_comparison(tmp_path / "c", rounds=1))}
    assert list(rows) == ["base", "alone", "centralised"]
    assert rows["alone"].spread == "51.0% to 68.0%"
    assert rows["base"].spread == ""
    assert all(row.words == REFERENCE_WORDS[name] for name, row in rows.items())
