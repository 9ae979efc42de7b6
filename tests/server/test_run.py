"""One run on the digits: watched on validation, stopped early, tested twice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import Summary, go, new, saved, timeless

from fedgraft.adapter import Adapter
from fedgraft.config import Config
from fedgraft.errors import ModelError
from fedgraft.files import read_tensors
from fedgraft.memory_estimate import MemoryEstimate
from fedgraft.resident_model import resident_model, resident_task
from fedgraft.run_directory import RunDirectory
from server.run import FederatedRun

# A whole run


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
    assert summary["estimated_memory_bytes"] is None  # a small base, of which nothing is told
    assert directory.config().threads == 1  # resolved, since sums depend on it


def test_a_round_is_recorded_as_documented(whole: tuple[RunDirectory, Summary]):
    start, *rounds = whole[0].rounds()
    keys = {
        *("round", "lr", "train_loss", "validation", "clients", "sampled", "failed", "refused"),
        *("bytes_up", "bytes_down", "bytes_evaluated", "seconds", "aggregation_bias", "epsilon"),
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


# Rules that leave a part of the adapter on the clients


def test_personal_parts_are_evaluated_where_they_are_whatever_is_asked_of_clients(
    tiny: Config, tmp_path: Path
):
    """The server holds the untouched base: its figures would be of nobody's model."""
    summaries, records = {}, {}
    for asked in (False, True):
        settings = {"strategy__name": "fedsa-lora", "evaluate__clients": asked}
        directory = new(tmp_path / str(asked), tiny, federation__rounds=2, **settings)
        summaries[asked] = go(directory)["final"]
        records[asked] = timeless(directory)
    assert summaries[False] == summaries[True] and records[False] == records[True]
    assert all(client["validation"] for client in records[False][-1]["clients"].values())


def test_the_estimate_of_a_large_base_stands_beside_the_measured_peak(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told = MemoryEstimate(30_000_000, 60, 20, 15, 5, 1000, "cpu", "8 examples")
    monkeypatch.setattr("server.run.estimate", lambda *_: told)
    summary = go(new(tmp_path, tiny.with_overrides({"federation.rounds": 1})))
    assert summary["estimated_memory_bytes"] == 100
