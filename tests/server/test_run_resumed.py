"""One run on the digits: interrupted, damaged, resumed, extended, or begun from an adapter."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Killed, Summary, go, new, saved, state, timeless

from fedgraft.config import Config
from fedgraft.errors import RunError
from fedgraft.files import read_tensors
from fedgraft.run_directory import RunDirectory
from server.checkpoint import Checkpoints

# Resuming


def die_at(
    monkeypatch: pytest.MonkeyPatch, target: Any, name: str, call: int
) -> Callable[[], None]:
    """Let one call of a function be the last thing that the process does."""
    if isinstance(target, str):
        target = importlib.import_module(target)
    original = getattr(target, name)
    count = 0

    def fatal(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, fatal)
    return lambda: monkeypatch.setattr(target, name, original)


PLACES = {
    "before the first checkpoint": (Checkpoints, "save", 1),
    "in training": ("client.seat", "train", 6),
    "in aggregation": ("strategies.strategy", "aggregate", 3),
    "after the record, before the checkpoint": (Checkpoints, "save", 4),
    "in the last checkpoint": (Checkpoints, "save", 5),
    "while the adapter is written": ("server.run", "write_adapter", 1),
    "before the summary": (RunDirectory, "write_summary", 1),
}


@pytest.fixture(scope="module")
def uninterrupted(
    tiny: Config, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[RunDirectory, Summary]]:
    """Runs of four rounds with personal state, by checkpoint.every."""
    found = {}
    for every in (1, 3):
        directory = new(tmp_path_factory.mktemp("straight") / "run", tiny, **LONG, **every_(every))
        found[every] = directory, go(directory)
    return found


LONG = {
    "federation__rounds": 4,
    "federation__fraction": 0.5,
    "federation__clients": 3,
    "train__optimizer_state": "keep",
    "strategy__name": "lora-fair",
}


def every_(every: int) -> dict[str, int]:
    return {"checkpoint__every": every}


@pytest.mark.parametrize(
    ("place", "every"),
    [
        *((place, 1) for place in PLACES),
        *((place, 3) for place in ("in training", "in aggregation", "in the last checkpoint")),
    ],
)
def test_a_run_killed_anywhere_ends_as_if_it_had_not_been(
    place: str,
    every: int,
    uninterrupted: dict[int, tuple[RunDirectory, Summary]],
    tiny: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    target, name, call = PLACES[place]
    if (place, every) == ("in the last checkpoint", 3):  # rounds 0, 3 and 4 are saved
        call = 3
    directory = new(tmp_path / "run", tiny, **LONG, **every_(every))
    revive = die_at(monkeypatch, target, name, call)
    with pytest.raises(Killed):
        go(directory)
    revive()
    assert directory.summary() is None
    summary = go(directory)
    straight, expected = uninterrupted[every]
    assert timeless(directory) == timeless(straight)
    assert state(directory).digest() == state(straight).digest()
    assert saved(directory).keys() == saved(straight).keys()
    assert all(torch.equal(t, saved(straight)[n]) for n, t in saved(directory).items())
    clocks = {"wall_seconds", "train_seconds", "aggregate_seconds", "peak_memory_bytes"}
    assert {k: v for k, v in summary.items() if k not in clocks} == {
        k: v for k, v in expected.items() if k not in clocks
    }
    kept = {path.name for path in directory.personal.rglob("*.safetensors")}
    assert kept == {path.name for path in straight.personal.rglob("*.safetensors")}


def test_the_best_adapter_so_far_outlives_a_crash(
    validations: Callable[..., None],
    tiny: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    directory = new(tmp_path / "run", tiny, checkpoint__keep=9)
    validations(0.1, 0.9, 0.2)
    revive = die_at(monkeypatch, "client.seat", "train", 6)
    with pytest.raises(Killed):
        go(directory)
    revive()
    validations(0.3)  # of round 3; the best is of round 1
    assert go(directory)["best_round"] == 1
    first = read_tensors(directory.checkpoints / "round-000001.safetensors")[0]
    made = saved(directory)
    assert all(torch.equal(made[n], first[f"adapter/{n}"]) for n in made)


def test_a_damaged_newest_checkpoint_costs_one_round(
    uninterrupted: dict[int, tuple[RunDirectory, Summary]],
    tiny: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    directory = new(tmp_path / "run", tiny, **LONG)
    revive = die_at(monkeypatch, Checkpoints, "save", 5)
    with pytest.raises(Killed):
        go(directory)
    revive()
    newest = max(directory.checkpoints.glob("round-*"))
    assert newest.name == "round-000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    go(directory)
    straight, _ = uninterrupted[1]
    assert timeless(directory) == timeless(straight)
    assert state(directory).digest() == state(straight).digest()


def test_damaged_checkpoints_do_not_start_the_run_anew(tiny: Config, tmp_path: Path):
    directory = new(tmp_path / "run", tiny)
    go(directory)
    records = directory.rounds_file.read_bytes()
    for path in directory.checkpoints.iterdir():
        path.write_bytes(b"")
    with pytest.raises(RunError, match="no checkpoint in"):
        go(directory, federation__rounds=5)
    assert directory.rounds_file.read_bytes() == records


def test_a_finished_run_goes_on_with_more_rounds(tiny: Config, tmp_path: Path):
    # With a constant learning rate more rounds change nothing of those that are done.
    constant = {"train__schedule": "constant", "train__optimizer_state": "keep"}
    directory = new(tmp_path / "short", tiny, **constant, federation__rounds=2)
    first = go(directory)
    assert first["rounds"] == 2
    more = go(directory, federation__rounds=4)
    straight = new(tmp_path / "long", tiny, **constant, federation__rounds=4)
    assert more["rounds"] == 4 and more["initial"] == first["initial"]
    assert go(straight)["final"] == more["final"]
    assert state(directory).digest() == state(straight).digest()
    assert timeless(directory) == timeless(straight)
    assert more["wall_seconds"] > first["wall_seconds"]
    assert more["client_steps"] == 2 * first["client_steps"] == 8


def test_a_finished_run_trains_no_more(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    directory = new(tmp_path / "run", tiny)
    first = go(directory)
    monkeypatch.setattr("client.seat.train", pytest.fail)
    again = go(directory)
    assert again["final"] == first["final"] and again["rounds"] == first["rounds"]


def test_an_adapter_may_be_the_start(
    whole: tuple[RunDirectory, Summary], tiny: Config, tmp_path: Path
):
    directory = new(
        tmp_path / "run", tiny, adapter__from=str(whole[0].adapter), federation__rounds=1
    )
    summary = go(directory)
    assert summary["initial"] == whole[1]["final"]
    # FFA-LoRA keeps the adapter's own A, which then has to travel.
    frozen = new(
        tmp_path / "ffa",
        tiny,
        adapter__from=str(whole[0].adapter),
        federation__rounds=1,
        strategy__name="ffa-lora",
    )
    go(frozen)
    given, made = saved(whole[0]), state(frozen).tensors()
    assert all(torch.equal(made[n], given[n]) == ("lora_A" in n) for n in given)
    assert frozen.rounds()[1]["bytes_down"] > frozen.rounds()[1]["bytes_up"]


# What goes wrong


def test_a_full_disk_ends_the_run_with_what_to_do_and_the_rest_intact(
    small_disk: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch
):
    # 1 MiB holds the run with two checkpoints of 130 kB, but not with all the ballast.
    directory = new(small_disk / "run", tiny)
    save = Checkpoints.save
    ballast = small_disk / "ballast"

    def fill(self: Checkpoints, checkpoint: Any) -> None:
        if checkpoint.state.round == 2:
            with ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(1 << 12))
                except OSError:
                    pass
        save(self, checkpoint)

    monkeypatch.setattr(Checkpoints, "save", fill)
    with pytest.raises(RunError, match="the disk is full") as caught:
        go(directory)
    assert "Free some space" in caught.value.remedy
    assert [p.name for p in sorted(directory.checkpoints.iterdir())] == [
        "round-000000.safetensors",
        "round-000001.safetensors",
    ]
    ballast.unlink()
    monkeypatch.setattr(Checkpoints, "save", save)
    assert go(directory)["rounds"] == 3
