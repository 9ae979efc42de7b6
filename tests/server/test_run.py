"""One run on the digits: watched on validation, stopped, resumed, extended, tested twice."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from client.app import app as client_app
from fedgraft.adapter import Adapter
from fedgraft.config import Config
from fedgraft.errors import ModelError, RunError
from fedgraft.files import read_tensors
from fedgraft.resident_model import resident_model, resident_task
from fedgraft.run_directory import RunDirectory
from server.checkpoint import Checkpoints
from server.run import FederatedRun, run_federation
from simulations.engine import run_config
from simulations.in_process import InProcessGrid

Summary = dict[str, Any]


def new(path: Path, tiny: Config, **settings: Any) -> RunDirectory:
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()}
    quick = {"evaluate.clients": False, "train.steps": 1}
    config = tiny.with_overrides(quick | named)
    return RunDirectory.create(path, config, "lineage")


def go(directory: RunDirectory, **settings: Any) -> Summary:
    """Start or resume the run of a directory, some keys changed."""
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()}
    config = directory.config().with_overrides(named)
    directory.write_config(config, directory.lineage())
    grid = InProcessGrid(client_app, config.federation.clients, run_config(config, directory))
    return run_federation(grid, config, directory)


def saved(directory: RunDirectory) -> dict[str, torch.Tensor]:
    return read_tensors(directory.adapter / "adapter_model.safetensors")[0]


def state(directory: RunDirectory) -> Adapter:
    found = Checkpoints(directory.checkpoints, keep=9).latest()
    assert found is not None
    return found.state.adapter


def timeless(directory: RunDirectory) -> list[dict[str, Any]]:
    """The records without what a clock wrote."""
    records = directory.rounds()
    for record in records:
        del record["seconds"]
        for client in record["clients"].values():
            client.pop("seconds", None)
    return records


class Killed(BaseException):
    """What kill -9 is to a test: nothing catches it."""


@pytest.fixture
def validations(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lets a test say what validation gives, evaluation by evaluation."""
    evaluate = FederatedRun._evaluate

    def script(*values: float) -> None:
        left = list(values)

        def scripted(
            self: FederatedRun, adapter: Adapter, *, test: bool = False
        ) -> dict[str, float]:
            if test:
                return evaluate(self, adapter, test=True)
            return {"accuracy": left.pop(0), "loss": 1.0}

        monkeypatch.setattr(FederatedRun, "_evaluate", scripted)

    yield script


# A whole run


@pytest.fixture(scope="module")
def whole(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, Summary]:
    path = tmp_path_factory.mktemp("whole") / "run"
    directory = new(path, tiny, evaluate__clients=True, federation__fraction=0.5)
    return directory, go(directory)


def test_a_run_leaves_what_it_promises(whole: tuple[RunDirectory, Summary]):
    directory, summary = whole
    assert directory.summary() == summary
    assert [record["round"] for record in directory.rounds()] == [0, 1, 2, 3]
    assert sorted(path.name for path in directory.adapter.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert {
        "strategy": "fedavg",
        "task": "digits",
        "seed": 0,
        "rounds": 3,
        "clients": 2,
        "metric": "accuracy",
        "direction": "max",
        "stopped_early": False,
        "client_steps": 3,  # one client a round, one step each
        "epsilon": None,
        "delta": None,
        "refused_updates": 0,
        "failed_clients": 0,
    }.items() <= summary.items()
    assert summary["label"] == "fedavg" and set(summary["client_descriptions"]) == {"0", "1"}
    assert summary["wall_seconds"] > summary["train_seconds"] > 0
    assert summary["peak_memory_bytes"] > 10**8
    assert directory.config().threads == 1  # resolved, since sums depend on it


def test_a_round_is_recorded_as_documented(whole: tuple[RunDirectory, Summary]):
    start, *rounds = whole[0].rounds()
    keys = {
        *("round", "lr", "train_loss", "validation", "clients", "sampled", "failed", "refused"),
        *("bytes_up", "bytes_down", "seconds", "aggregation_bias", "epsilon"),
    }
    assert all(keys <= record.keys() for record in (start, *rounds))
    assert (start["train_loss"], start["aggregation_bias"], start["lr"]) == (None, None, None)
    assert (start["bytes_up"], start["sampled"]) == (0, [])
    for number, record in enumerate(rounds, start=1):
        (name,) = record["sampled"]
        client = record["clients"][name]
        assert client["examples"] == 390 and client["train_loss"] == record["train_loss"]
        assert all(set(c["validation"]) >= {"accuracy", "loss"} for c in record["clients"].values())
        assert len(record["clients"]) == 2  # all evaluate, also those that did not train
        cosine = 8e-3 * 0.5 * (1 + math.cos(math.pi * (number - 1) / 3))
        assert record["lr"] == pytest.approx(cosine)
        assert record["bytes_up"] == record["bytes_down"] > 60_000
        assert {"train", "aggregate", "evaluate"} <= record["seconds"].keys()
        # One client: its update is the mean.
        assert record["aggregation_bias"]["before"] == 0.0
    assert sum(record["bytes_up"] for record in rounds) == whole[1]["bytes_up"]


def test_the_recorded_metrics_are_those_of_the_adapter(
    whole: tuple[RunDirectory, Summary], tiny: Config
):
    directory, summary = whole
    task = resident_task(directory.config())
    model = resident_model(task, directory.config())
    best = Adapter.from_tensors(saved(directory), model.scaling)
    assert model.evaluate(task, best, task.test())["accuracy"] == summary["final"]
    found = model.evaluate(task, best, task.validation())
    assert found["accuracy"] == summary["validation_best"]
    initial = model.evaluate(task, model.initial_adapter(0), task.test())["accuracy"]
    assert initial == summary["initial"]
    values = [record["validation"]["accuracy"] for record in directory.rounds()]
    assert summary["validation_best"] == max(values)
    assert summary["best_round"] == values.index(max(values))


def test_two_runs_of_one_config_are_equal(
    whole: tuple[RunDirectory, Summary], tiny: Config, tmp_path: Path
):
    again = new(tmp_path / "run", tiny, evaluate__clients=True, federation__fraction=0.5)
    go(again)
    assert timeless(again) == timeless(whole[0])
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (again.adapter / name).read_bytes() == (whole[0].adapter / name).read_bytes()


def test_the_test_split_is_touched_twice(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    directory = new(tmp_path / "run", tiny)
    task = resident_task(directory.config())
    touched: list[str] = []
    for name in ("test", "validation"):
        original = getattr(task, name)
        monkeypatch.setattr(
            task, name, lambda *a, _n=name, _o=original: touched.append(_n) or _o(*a)
        )
    go(directory)
    assert touched.count("test") == 2
    assert touched[0] == "validation" and touched[-1] == "test"


# Choosing and stopping


def test_the_best_round_on_validation_is_kept_and_a_tie_keeps_the_earlier(
    validations: Callable[..., None], tiny: Config, tmp_path: Path
):
    validations(0.1, 0.5, 0.5, 0.4)
    directory = new(tmp_path / "run", tiny, checkpoint__keep=9)
    summary = go(directory)
    assert (summary["best_round"], summary["validation_best"]) == (1, 0.5)
    first = read_tensors(directory.checkpoints / "round-000001.safetensors")[0]
    made = saved(directory)
    assert all(torch.equal(made[n], first[f"adapter/{n}"]) for n in made)
    assert not torch.equal(*(t["adapter/" + next(iter(made))] for t in (first, last(directory))))


def last(directory: RunDirectory) -> dict[str, torch.Tensor]:
    return read_tensors(max(directory.checkpoints.glob("round-*")))[0]


def test_the_untouched_start_may_be_the_best(
    validations: Callable[..., None], tiny: Config, tmp_path: Path
):
    validations(0.9, 0.5, 0.5, 0.4)
    summary = go(new(tmp_path / "run", tiny))
    assert summary["best_round"] == 0 and summary["final"] == summary["initial"]


def test_nan_on_validation_is_never_the_best(
    validations: Callable[..., None], tiny: Config, tmp_path: Path
):
    validations(math.nan, 0.2, math.nan, 0.1)
    directory = new(tmp_path / "run", tiny)
    assert go(directory)["best_round"] == 1
    values = [record["validation"]["accuracy"] for record in directory.rounds()]
    assert values == [None, 0.2, None, 0.1]
    json.loads(directory.rounds_file.read_text().splitlines()[0], parse_constant=pytest.fail)


def test_patience_ends_the_run(validations: Callable[..., None], tiny: Config, tmp_path: Path):
    validations(0.1, 0.3, 0.2, 0.3, 0.9, 0.9)
    directory = new(tmp_path / "run", tiny, federation__rounds=9, evaluate__patience=2)
    summary = go(directory)
    assert summary["rounds"] == 3 and summary["stopped_early"] and summary["best_round"] == 1
    assert [record["round"] for record in directory.rounds()] == [0, 1, 2, 3]
    # It goes on when it is given more patience, from where it stopped.
    validations(0.2, 0.9, 0.8)
    more = go(directory, evaluate__patience=4, federation__rounds=6)
    assert (more["rounds"], more["best_round"], more["stopped_early"]) == (6, 5, False)


def test_patience_counts_evaluations_and_not_rounds(
    validations: Callable[..., None], tiny: Config, tmp_path: Path
):
    validations(0.3, 0.2, 0.1)
    directory = new(
        tmp_path / "run", tiny, federation__rounds=9, evaluate__patience=2, evaluate__every=2
    )
    assert go(directory)["rounds"] == 4
    seen = [record["round"] for record in directory.rounds() if record["validation"]]
    assert seen == [0, 2, 4]


def test_evaluating_every_few_rounds_includes_the_last(tiny: Config, tmp_path: Path):
    directory = new(tmp_path / "run", tiny, evaluate__every=2, evaluate__clients=True)
    summary = go(directory)
    records = directory.rounds()
    assert [r["round"] for r in records if r["validation"]] == [0, 2, 3]
    with_clients = [r["round"] for r in records if "validation" in r["clients"].get("0", {})]
    assert with_clients == [0, 2, 3]
    assert summary["best_round"] in (0, 2, 3)


def test_a_base_that_gives_nonsense_is_found_before_the_first_round(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        FederatedRun, "_evaluate", lambda *_, **__: {"accuracy": math.nan, "loss": math.nan}
    )
    directory = new(tmp_path / "run", tiny)
    with pytest.raises(ModelError, match="untouched base has a test accuracy of nan"):
        go(directory)
    assert directory.rounds() == []
    # Where the run was given an adapter, that is what gives nonsense.
    monkeypatch.setattr(FederatedRun, "_initial_adapter", lambda run: run.model.initial_adapter(0))
    given = new(tmp_path / "second", tiny.with_overrides({"adapter.from": "runs/first/adapter"}))
    with pytest.raises(ModelError, match=r"the adapter in runs/first/adapter has a test accuracy"):
        go(given)


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
