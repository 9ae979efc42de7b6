"""`fedgraft privacy`: figures that compose, in words and for machines, and clear refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fedgraft.errors import ConfigError, LedgerError
from fedgraft.privacy.accounting import epsilon
from fedgraft.privacy.command import privacy
from fedgraft.privacy.events import Release
from fedgraft.privacy.figures import rounded_up
from fedgraft.privacy.ledger import Entry, Ledger, head_of

EXAMPLE, PAIR = Release((1.1,), 0.01, 40), Release((3.0, 3.0), 0.3)
OTHER = replace(EXAMPLE, noise_multipliers=(1.3,))
NORTH, SOUTH = "a1" * 32, "b2" * 32
FIRST, SECOND, THIRD = "0f" * 16, "1e" * 16, "2d" * 16


def call(*arguments: object, width: int = 80) -> Result:
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(privacy, words, env={"COLUMNS": str(width)})


def figures(*arguments: object) -> dict[str, Any]:
    done = call(*arguments, "--json")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two runs about one set of data and one about another."""
    ledger = Ledger(tmp_path / "ledgers" / "l.jsonl")
    base = Entry(NORTH, FIRST, 1, "example", "example", "add-or-remove-one", EXAMPLE, 1e-5)
    for round in (1, 2, 3):
        ledger.record(replace(base, round=round))
    ledger.record(replace(base, run=SECOND, round=7, release=OTHER, delta=1e-6))
    ledger.record(replace(base, run=SECOND, round=9, release=OTHER, delta=1e-6))
    client = replace(base, mode="client", unit="client", fingerprint=SOUTH, run=THIRD, release=PAIR)
    ledger.record(client)
    return ledger.path


def test_each_run_alone_and_all_in_total(path: Path) -> None:
    found = figures(path, "--delta", "1e-5")
    assert (found["accountant"], found["adjacency"]) == ("rdp", "add-or-remove-one")
    assert (found["delta"], found["budget"]) == (1e-5, None)
    north, south = found["data"]
    assert (north["fingerprint"], south["fingerprint"]) == (NORTH, SOUTH)
    first, second = north["runs"]
    assert (first["run"], first["rounds"], first["releases"]) == (FIRST, 3, 120)
    assert (second["first_round"], second["last_round"], second["rounds"]) == (7, 9, 2)
    assert first["epsilon"] == first["epsilon_total"] == epsilon([EXAMPLE] * 3, 1e-5)
    assert second["epsilon"] == epsilon([OTHER] * 2, 1e-5)
    assert second["epsilon_total"] == north["epsilon"]
    assert north["epsilon"] == epsilon([EXAMPLE] * 3 + [OTHER] * 2, 1e-5)
    assert first["noise_multipliers"] == [[1.1]] and first["sampling_rates"] == [0.01]
    assert south["runs"][0]["noise_multipliers"] == [[3.0, 3.0]]
    assert south["runs"][0]["joint_noise_multipliers"] == [PAIR.noise_multiplier]
    assert (north["left"], north["rounds_left"], north["over"]) == (None, None, False)


def test_the_strictest_recorded_delta_is_taken_and_the_accountant_asked_for(path: Path) -> None:
    assert figures(path)["delta"] == 1e-6
    tight = figures(path, "--delta", "1e-4", "--accountant", "pld")
    assert (tight["delta"], tight["accountant"]) == (1e-4, "pld")
    spent = [EXAMPLE] * 3 + [OTHER] * 2
    assert tight["data"][0]["epsilon"] == epsilon(spent, 1e-4, "pld") < epsilon(spent, 1e-4)


def test_what_a_budget_leaves(path: Path) -> None:
    north, south = figures(path, "--budget", "2.5")["data"]
    assert north["left"] == pytest.approx(2.5 - north["epsilon"])
    spent = [EXAMPLE] * 3 + [OTHER] * 2
    rounds = north["rounds_left"]
    assert epsilon([*spent, *[OTHER] * rounds], 1e-6) <= 2.5
    assert epsilon([*spent, *[OTHER] * (rounds + 1)], 1e-6) > 2.5
    assert south["rounds_left"] > 0 and not south["over"]
    assert call(path, "--budget", "2.5").exit_code == 0


def test_an_exceeded_budget_ends_with_status_1(path: Path) -> None:
    spent = [data["epsilon"] for data in figures(path)["data"]]
    budget = round(sum(spent) / 2, 3)  # between the two
    assert min(spent) < budget < max(spent)
    done = call(path, "--budget", budget)
    assert done.exit_code == 1
    assert f"more than the budget of {budget}." in done.stdout
    for data in figures(path, "--budget", budget)["data"]:
        assert data["over"] == (data["epsilon"] > budget) == (data["left"] == 0)
        assert not data["over"] or data["rounds_left"] == 0


def test_the_screen_fits_80_columns_and_names_accountant_and_relation(path: Path) -> None:
    done = call(path, "--budget", "3")
    assert done.exit_code == 0 and max(map(len, done.stdout.splitlines()[1:])) <= 80
    assert "Epsilon at delta 1e-06, composed by RDP; neighbouring data: add-or-remove-one." in (
        done.stdout
    )
    assert "example: protects each example, add-or-remove-one" in done.stdout
    assert "client: protects each client, add-or-remove-one" in done.stdout
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.strip()}
    north = epsilon([EXAMPLE] * 3 + [OTHER] * 2, 1e-6)
    total = rounded_up(north)
    alone = rounded_up(epsilon([OTHER] * 2, 1e-6))
    assert rows[SECOND[:12]] == ["example", "7-9", "(2)", "1.3", "0.01", "80", alone, total]
    assert rows[THIRD[:12]][:6] == ["client", "1", "3", "x2", "0.3", "1"]
    assert f"Spent: epsilon {total} of 3; {3 - north:.3g} is left, room for" in done.stdout


def test_units_that_differ_are_told_apart(path: Path) -> None:
    local = Entry(NORTH, THIRD, 1, "local", "client", "replace-one", Release((4.0,), 1.0), 1e-6)
    Ledger(path).record(local)
    words = " ".join(call(path).stdout.split())
    assert "local: protects each client, replace-one, recorded with twice the sensitivity" in words
    assert "Note: the total holds for single examples" in words


def test_an_empty_ledger_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its head is there: the process was killed before the first entry."""
    path = tmp_path / "l.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_append", lambda *_: None)
        Ledger(path).record(Entry("f", "r", 1, "local", "client", "replace-one", PAIR, 1e-5))
    done = call(path)
    assert done.exit_code == 0 and done.stdout.endswith("Nothing was released.\n")
    assert figures(path)["data"] == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--delta", "0"], "delta"),
        (["--delta", "1"], "delta"),
        (["--budget", "0"], "budget"),
        (["--accountant", "prv"], "accountant"),
    ],
)
def test_wrong_usage(arguments: list[str], named: str, path: Path) -> None:
    done = call(path, *arguments)
    assert done.exit_code == 2 and f"--{named}" in done.stderr


def test_a_wrong_path_is_no_empty_ledger(path: Path) -> None:
    done = call(path.with_name("m.jsonl"))
    assert isinstance(done.exception, ConfigError) and "m.jsonl" in done.exception.message
    done = call(path.parent.parent)
    assert isinstance(done.exception, ConfigError) and str(path) in done.exception.remedy


def test_a_deleted_or_damaged_ledger_is_refused(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"count": 40', b'"count": 4', 1))
    done = call(path)
    assert isinstance(done.exception, LedgerError) and "damaged in line 1" in str(done.exception)
    path.unlink()
    done = call(path)
    assert isinstance(done.exception, LedgerError) and "is missing" in str(done.exception)
    path.write_bytes(content)
    head_of(path).unlink()
    assert isinstance(call(path).exception, LedgerError)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (2.00001, "2.001"),
        (0.0083711, "0.008372"),
        (2231.29, "2232"),
        (9.9999, "10"),
        (1.2344, "1.235"),
        (None, "infinite"),
    ],
)
def test_epsilon_is_never_shown_smaller_than_it_is(value: float | None, shown: str) -> None:
    assert rounded_up(value) == shown
