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
from fedgraft.errors import RunError
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
        writer.write(REPLY, round=round, client="1", trouble="NaN" if round == 3 else "")
        value = 0.4 + 0.01 * round if round % 2 == 0 else None
        writer.write(ROUND, round=round, value=value, loss=1.0 / round)
    writer.write(FINISHED, final=0.77, best_round=rounds - 1)


def shown(run: RunDirectory, say: Callable[[ProgressWriter], None], **console: Any) -> str:
    """Return what a screen shows while a run says something."""
    file = io.StringIO()
    out = Console(file=file, width=100, **console)
    writer = ProgressWriter(run.progress)
    with Screen({"fedavg, seed 0": run}, out):
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


def test_a_failure_told_by_another_process_is_raised_here():
    error = failure({"event": FAILED, "message": "no clients", "remedy": "Start some."})
    assert isinstance(error, RunError)
    assert (error.message, error.remedy) == ("no clients", "Start some.")


# Plain lines


def test_where_there_is_no_terminal_about_ten_lines_are_printed(run: RunDirectory):
    lines = shown(run, play).splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == [
        f"fedavg, seed 0: round {k}/20" for k in range(0, 21, 2)
    ]
    assert lines[0] == "fedavg, seed 0: round 0/20  validation accuracy 40.0%"
    assert lines[1] == (
        "fedavg, seed 0: round 2/20  clients 2/2  validation accuracy 42.0%  loss 0.500"
    )
    assert lines[2].endswith("validation accuracy 44.0%  loss 0.250  1 failed or refused")
    assert lines[-1] == ("done fedavg, seed 0: test accuracy 77.0% (adapter of round 19 of 20)")
    assert "\x1b" not in "".join(lines)


def test_a_short_run_prints_every_round_and_a_resumed_one_the_rest(run: RunDirectory):
    lines = shown(run, lambda writer: play(writer, rounds=4, first=2)).splitlines()
    assert [line.split("  ")[0].split()[-1] for line in lines[:-1]] == ["3/4", "4/4"]


def test_what_is_said_is_printed_as_it_is(run: RunDirectory):
    file = io.StringIO()
    with Screen({"a": run}, Console(file=file, width=40)) as screen:
        screen.say("a line that is much longer than the forty columns of this screen")
    assert file.getvalue().count("\n") == 1


def test_a_label_with_brackets_is_no_markup(run: RunDirectory):
    file = io.StringIO()
    writer = ProgressWriter(run.progress)
    with Screen({"lora-fair [x] (lambda=1)": run}, Console(file=file, width=200)):
        play(writer, rounds=1)
    assert "done lora-fair [x] (lambda=1): test" in file.getvalue()


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

    text = shown(run, say, force_terminal=True)
    assert "━" in text and "1/5" in text and "left" in text
    assert "clients 1/2  validation accuracy 50.0%  loss 0.250" in text
    assert "test accuracy 77.0% (adapter of round 1 of 1)" in text


def test_many_runs_have_a_bar_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(screen_module, "_POLL_SECONDS", 0.01)
    runs = {f"run {k}": RunDirectory.create(tmp_path / str(k), Config(), "x") for k in range(3)}
    file = io.StringIO()
    with Screen(runs, Console(file=file, width=120, force_terminal=True)):
        for directory in runs.values():
            play(ProgressWriter(directory.progress), rounds=2)
        time.sleep(0.3)
    text = file.getvalue()
    assert "all runs" in text and "3/3" in text
    assert all(f"run {k}: test accuracy 77.0%" in text for k in range(3))


def test_a_screen_that_sees_a_run_only_from_its_middle_shows_it_all_the_same(run: RunDirectory):
    def say(writer: ProgressWriter) -> None:
        writer.write(REPLY, round=1, client="0", trouble="")
        writer.write(ROUND, round=1, value=0.5, loss=0.25)
        writer.write(FINISHED, final=0.5, best_round=1)

    for terminal in (True, False):
        assert "test metric 0.5" in shown(run, say, force_terminal=terminal)


def test_the_screen_ends_with_its_block_also_after_an_error(run: RunDirectory):
    before = threading.active_count()
    with pytest.raises(KeyError), Screen({"a": run}, Console(file=io.StringIO())):
        assert threading.active_count() == before + 1
        raise KeyError
    assert threading.active_count() == before
