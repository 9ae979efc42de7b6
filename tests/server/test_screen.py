"""What a run says while it runs, and what the screen makes of it."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedgraft.config import Config
from fedgraft.errors import ConfigError, FedGraftError, RunError
from fedgraft.run_directory import RunDirectory
from server import screen as screen_module
from server.progress import (
    FAILED,
    FINISHED,
    REPLY,
    ROUND,
    SAMPLED,
    START,
    ProgressReader,
    ProgressWriter,
    failure,
)
from server.screen import Screen


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", Config(), "x")


def play(writer: ProgressWriter, rounds: int = 20, first: int = 0) -> None:
    """Say what a run of two clients says."""
    writer.write(START, round=first, rounds=rounds, metric="accuracy", strategy="fedavg", seed=0)
    if first == 0:
        writer.write(ROUND, round=0, value=0.4, loss=None)
    for round in range(first + 1, rounds + 1):
        writer.write(SAMPLED, round=round, clients=["0", "1"])
        writer.write(REPLY, round=round, client="0", trouble="")
        writer.write(
            REPLY, round=round, client="1", trouble="tensor 'x' holds NaN" if round == 3 else ""
        )
        value = 0.4 + 0.01 * round if round % 2 == 0 else None
        writer.write(ROUND, round=round, value=value, loss=1.0 / round)
    writer.write(FINISHED, final=0.77, best_round=rounds - 1)


def shown(run: RunDirectory, say: Callable[[ProgressWriter], None], **console: Any) -> str:
    """Return what a screen shows while a run says something."""
    file = io.StringIO()
    out = Console(file=file, **({"width": 120} | console))
    writer = ProgressWriter(run.progress)
    with Screen({"fedavg, seed 0": run.progress}, console=out):
        say(writer)
    writer.close()
    return file.getvalue()


# The progress file


def test_events_are_read_as_they_are_written(tmp_path: Path):
    reader = ProgressReader(tmp_path / "progress.jsonl")
    assert reader.events() == []  # before there is a file
    writer = ProgressWriter(tmp_path / "progress.jsonl")
    writer.write(ROUND, round=1, value=None)
    writer.write(REPLY, client='a "name"\n', trouble="")
    first, second = reader.events()
    assert first == {"event": ROUND, "round": 1, "value": None}
    assert second["client"] == 'a "name"\n'
    assert reader.events() == []
    writer.write(FINISHED, final=0.5)
    assert [event["event"] for event in reader.events()] == [FINISHED]


def test_a_line_that_is_not_whole_yet_waits_for_its_end(tmp_path: Path):
    path = tmp_path / "progress.jsonl"
    reader = ProgressReader(path)
    line = json.dumps({"event": ROUND, "name": "Grüße"}, ensure_ascii=False).encode() + b"\n"
    for cut in range(1, len(line)):
        path.write_bytes(line[:cut])
        assert reader.events() == []
    path.write_bytes(line)
    assert reader.events() == [{"event": ROUND, "name": "Grüße"}]


def test_a_reader_begins_where_the_file_ends(tmp_path: Path):
    # A resumed run adds to the file of its earlier sessions, whose last line may be cut.
    path = tmp_path / "progress.jsonl"
    writer = ProgressWriter(path)
    writer.write(ROUND, round=1)
    writer.close()
    with path.open("a") as file:
        file.write('{"event": "rep')
    reader = ProgressReader(path)
    ProgressWriter(path).write(START, round=1)
    assert [event["event"] for event in reader.events()] == [START]


def test_a_full_disk_does_not_end_a_run_for_the_screens_sake(small_disk: Path):
    writer = ProgressWriter(small_disk / "progress.jsonl")
    for _ in range(30):
        writer.write(FAILED, message="x" * 100_000)
    writer.close()


@pytest.mark.parametrize(("status", "kind"), [(1, RunError), (2, ConfigError)])
def test_a_failure_told_by_another_process_is_raised_here(status: int, kind: type[FedGraftError]):
    told = {"event": FAILED, "message": "no clients", "remedy": "Start some.", "status": status}
    error = failure(told)
    assert type(error) is kind and error.exit_status == status
    assert (error.message, error.remedy) == ("no clients", "Start some.")


# Plain lines


def test_where_there_is_no_terminal_about_ten_lines_are_printed(run: RunDirectory):
    lines = shown(run, play).splitlines()
    trouble = "fedavg, seed 0, round 3, client 1: tensor 'x' holds NaN"
    assert lines.pop(2) == trouble
    assert lines == [
        "fedavg, seed 0: round 0/20, validation accuracy 40.0%",
        "fedavg, seed 0: round 2/20, validation accuracy 42.0%, training loss 0.500",
        *(
            f"fedavg, seed 0: round {k}/20, validation accuracy {40 + k}.0%, "
            f"training loss {1 / k:.3f}, 1 updates failed or refused"
            for k in range(4, 21, 2)
        ),
        "done fedavg, seed 0: test accuracy 77.0%, the adapter of round 19 of 20",
    ]


def test_a_short_run_prints_every_round_and_a_resumed_one_the_rest(run: RunDirectory):
    lines = shown(run, lambda writer: play(writer, rounds=4, first=2)).splitlines()
    rounds = [line.split(",")[1].split()[-1] for line in lines if "training loss" in line]
    assert rounds == ["3/4", "4/4"]


def test_every_one_of_many_runs_prints_fewer_lines(tmp_path: Path):
    runs = {f"run {k}": RunDirectory.create(tmp_path / str(k), Config(), "x") for k in range(2)}
    file = io.StringIO()
    with Screen({name: r.progress for name, r in runs.items()}, console=Console(file=file)):
        for directory in runs.values():
            play(ProgressWriter(directory.progress))
    lines = file.getvalue().splitlines()
    assert sum(line.startswith("run 0: round") for line in lines) == 5  # 0, 5, 10, 15, 20
    assert sum(line.startswith("done run") for line in lines) == 2


def test_a_client_in_trouble_again_and_again_is_named_three_times(run: RunDirectory):
    def say(writer: ProgressWriter) -> None:
        writer.write(START, round=0, rounds=9, metric="accuracy", strategy="fedavg", seed=0)
        for round in range(1, 10):
            writer.write(SAMPLED, round=round, clients=["7"])
            writer.write(REPLY, round=round, client="7", trouble="no\n  reply [red]")
            writer.write(ROUND, round=round, value=None, loss=None)

    lines = shown(run, say).splitlines()
    assert sum("client 7: no reply [red]" in line for line in lines) == 3
    assert lines[-1].endswith("9 updates failed or refused")


def test_a_label_with_brackets_is_no_markup(run: RunDirectory):
    for terminal in (True, False):
        file = io.StringIO()
        writer = ProgressWriter(run.progress)
        console = Console(file=file, width=200, force_terminal=terminal, color_system=None)
        with Screen({"lora-fair [red] (lambda=1)": run.progress}, console=console):
            play(writer, rounds=1)
        assert "done lora-fair [red] (lambda=1): test" in file.getvalue()


def test_reference_rows_are_told_of(tmp_path: Path):
    file = io.StringIO()
    with Screen({}, ["alone, seed 0"], console=Console(file=file, width=100)) as screen:
        screen.started("alone, seed 0")
        screen.done("alone, seed 0", "accuracy", 0.5)
    assert file.getvalue() == "done alone, seed 0: test accuracy 50.0%\n"


def test_a_run_that_was_finished_before_is_told_of_once(run: RunDirectory):
    file = io.StringIO()
    with Screen({"a": run.progress}, console=Console(file=file, width=100)) as screen:
        screen.done("a", "accuracy", 0.5)
        screen.done("a", "accuracy", 0.5)
    assert file.getvalue() == "done a: test accuracy 50.0% (before)\n"


# Bars


def test_a_terminal_shows_bars_and_keeps_the_last_line(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(screen_module, "_POLL_SECONDS", 0.01)

    def say(writer: ProgressWriter) -> None:
        writer.write(START, round=0, rounds=5, metric="accuracy", strategy="fedavg", seed=0)
        writer.write(SAMPLED, round=1, clients=["0", "1"])
        writer.write(REPLY, round=1, client="0", trouble="")
        writer.write(ROUND, round=1, value=0.5, loss=0.25)
        time.sleep(0.3)  # bars are drawn ten times a second
        writer.write(FINISHED, final=0.77, best_round=1)

    text = shown(run, say, force_terminal=True, color_system=None)
    assert "━" in text and "fedavg, seed 0" in text
    assert "1/5  validation 50.0%  clients 1/2  loss 0.250" in text
    assert "done fedavg, seed 0: test accuracy 77.0%, the adapter of round 1 of 1" in text
    narrow = shown(run, say, force_terminal=True, color_system=None, width=50)
    assert "1/5" in narrow and "loss" not in narrow


def test_many_runs_have_a_bar_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(screen_module, "_POLL_SECONDS", 0.01)
    runs = {f"run {k}": RunDirectory.create(tmp_path / str(k), Config(), "x") for k in range(3)}
    file = io.StringIO()
    console = Console(file=file, width=120, force_terminal=True, color_system=None)
    with Screen({name: r.progress for name, r in runs.items()}, ["base"], console) as screen:
        for directory in runs.values():
            play(ProgressWriter(directory.progress), rounds=2)
        screen.started("base")
        time.sleep(0.3)
        screen.done("base", "accuracy", 0.4)
        time.sleep(0.3)
    text = file.getvalue()
    assert "all 4 jobs" in text and "4/4 done" in text and "reference row" in text
    assert all(f"done run {k}: test accuracy 77.0%" in text for k in range(3))


def test_time_left_is_that_of_the_part_that_was_watched(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(screen_module.time, "monotonic", lambda: now)
    pace = screen_module._Pace()
    pace.note(0.5)  # resumed in the middle
    assert pace.left() == ""
    now = 160.0
    pace.note(0.6)  # a tenth in a minute: four more
    assert pace.left() == "4:00 left"
    now = 190.0
    assert pace.left() == "3:30 left"  # it goes on between two events
    now = 9999.0
    assert pace.left() == "0:00 left"


def test_the_screen_ends_with_its_block_also_after_an_error(run: RunDirectory):
    before = threading.active_count()
    console = Console(file=io.StringIO())
    with pytest.raises(KeyError), Screen({"a": run.progress}, console=console):
        assert threading.active_count() == before + 1
        raise KeyError
    assert threading.active_count() == before
