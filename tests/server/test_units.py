"""How numbers are written."""

from __future__ import annotations

import math

import pytest

from server.units import Unit, clip, listed, megabytes, ranges, seconds

ACCURACY, LOSS = Unit("accuracy"), Unit("loss")


def test_shares_are_per_cent_and_their_differences_points() -> None:
    assert ACCURACY.value(0.7742) == "77.4%"
    assert ACCURACY.spread(0.7742, 0.0118) == "77.4 ± 1.2%"
    assert ACCURACY.spread(0.7742, None) == "77.4%"
    assert ACCURACY.difference(0.0104) == "+1.0"
    assert ACCURACY.interval(-0.023, 0.043) == "−2.3 to +4.3"
    assert ACCURACY.points == " points"
    assert Unit("balanced_accuracy").axis == "balanced accuracy (%)"


@pytest.mark.parametrize(
    ("raw", "text"),
    [(2.5831, "2.583"), (0.81234, "0.8123"), (12.346, "12.35"), (1234.5, "1,234"), (0.0, "0.000")],
)
def test_losses_have_four_digits(raw: float, text: str) -> None:
    assert LOSS.value(raw) == text


@pytest.mark.parametrize(
    ("metric", "name", "title", "value"),
    [
        ("macro_f1", "macro F1", "Macro F1", "50.0%"),
        ("f1[bad film]", "f1[bad film]", "F1[bad film]", "50.0%"),
        ("rouge_l", "ROUGE-L", "ROUGE-L", "0.5000"),
        ("exact_match", "exact match", "Exact match", "50.0%"),
    ],
)
def test_names_of_metrics(metric: str, name: str, title: str, value: str) -> None:
    unit = Unit(metric)
    assert (unit.name, unit.title, unit.value(0.5)) == (name, title, value)


def test_differences_of_losses_share_their_decimals() -> None:
    assert LOSS.differences(-0.0123, -0.0456, 0.021) == ("−0.0123", "−0.0456", "+0.0210")
    assert LOSS.points == ""


def test_a_bound_that_is_not_zero_is_not_shown_as_zero() -> None:
    assert ACCURACY.differences(0.0098, 0.0003, 0.0193) == ("+0.98", "+0.03", "+1.93")
    assert ACCURACY.difference(0.0) == "0.0"


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_what_is_missing_is_a_dash(missing: float | None) -> None:
    assert ACCURACY.value(missing) == LOSS.difference(missing) == "–"
    assert megabytes(missing) == seconds(missing) == "–"


def test_sizes_times_and_lists() -> None:
    assert [megabytes(n) for n in (13.2e6, 7.44e6, 2.5e9, 1234)] == [
        "13.2",
        "7.44",
        "2,500",
        "0.0012",
    ]
    assert [seconds(s) for s in (0.44, 18.3, 3600)] == ["0.4", "18", "3,600"]
    assert [listed(list(words)) for words in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]
    assert ranges([5, 1, 3, 4, 3]) == "1, 3–5"


def test_clipped_text_is_one_printable_line() -> None:
    assert clip("a\nb\x00c", 9) == "a b c"
    assert clip("abcdefgh", 5) == "abcd…"
