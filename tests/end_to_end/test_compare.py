"""A comparison: the same data, adapters and samples for all strategies of a seed, and its files."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import SMALL, call, outcome, records, run, settings, start

from fedgraft.config import Config
from fedgraft.run_directory import RunDirectory
from server.checkpoint import Checkpoints
from simulations.plan import Plan

TINY = settings(federation__rounds=2, federation__fraction=0.7)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compared") / "two"
    done = run(
        *("compare", "--strategies", "fedavg,ffa-lora", "--seeds", "0,1", "--out", path),
        *TINY,
        *("--set", "compare.ffa-lora.train.lr=0.016"),
        cwd=path.parent,
    )
    assert done.status == 0, done.err
    assert "done ffa-lora, seed 1" in done.err and str(path / "report.html") in done.out
    return path


@pytest.mark.slow
def test_comparison_json_holds_what_the_design_says(compared: Path) -> None:
    found = json.loads((compared / "comparison.json").read_text())
    assert set(found) == {"runs", "references", "strategies"}
    assert [(row["strategy"], row["seed"]) for row in found["runs"]] == [
        ("fedavg", 0),
        ("fedavg", 1),
        ("ffa-lora", 0),
        ("ffa-lora", 1),
    ]
    for row in found["runs"]:
        own = json.loads((compared / row["directory"] / "summary.json").read_text())
        assert own["final"] == row["final"]
    named = [(row["name"], row["seed"]) for row in found["references"]]
    assert named == [(n, s) for n in ("base", "alone", "centralised") for s in (0, 1)]
    first, second = found["strategies"]
    assert [first[key] for key in ("difference", "low", "high")] == [None] * 3
    finals = [row["final"] for row in found["runs"]]
    assert first["mean"] == pytest.approx((finals[0] + finals[1]) / 2)
    differences = [finals[2] - finals[0], finals[3] - finals[1]]
    assert second["difference"] == pytest.approx(sum(differences) / 2)
    # Student's t with one degree of freedom: 12.706 times the standard error.
    half = 12.7062 * abs(differences[0] - differences[1]) / 2
    assert second["high"] - second["difference"] == pytest.approx(half, rel=1e-4)


@pytest.mark.slow
def test_strategies_of_a_seed_share_samples_partitions_and_the_first_adapter(
    compared: Path,
) -> None:
    for seed in (0, 1):
        runs = [compared / "runs" / f"{name}-seed{seed}" for name in ("fedavg", "ffa-lora")]
        sampled = [[record["sampled"] for record in records(run)] for run in runs]
        assert sampled[0] == sampled[1]
        sizes = [[r["clients"]["0"].get("examples") for r in records(run)[1:]] for run in runs]
        assert sizes[0] == sizes[1] or None in sizes[0] + sizes[1]
        assert records(runs[0])[0]["validation"] == records(runs[1])[0]["validation"]
        first_A = [
            RunDirectory(run).config().seed for run in runs
        ]  # A is derived from the seed alone, and FFA-LoRA keeps it
        assert first_A == [seed, seed]
    rates = {
        name: RunDirectory(compared / "runs" / f"{name}-seed0").config().train.lr
        for name in ("fedavg", "ffa-lora")
    }
    assert rates == {"fedavg": 8e-3, "ffa-lora": 1.6e-2}


@pytest.mark.slow
def test_a_run_of_a_comparison_is_an_ordinary_run(compared: Path, tmp_path: Path) -> None:
    own = compared / "runs" / "fedavg-seed1"
    done = call("simulate", own / "config.toml", "--out", tmp_path / "again")
    assert done.status == 0, done.err
    assert outcome(tmp_path / "again") == outcome(own)


def test_overrides_may_be_nested_or_dotted_and_a_grid_multiplies() -> None:
    config = Config.from_dict(
        {"compare": {"ffa-lora": {"train": {"lr": 0.1}}, "lora-fair": {"train.lr": 0.2}}}
    )
    plan = Plan(config, ("fedavg", "ffa-lora", "lora-fair"), (0,), {"adapter.rank": [2, 4]})
    found = {label: (c.train.lr, c.adapter.rank) for label, c in plan.variants().items()}
    assert found == {
        "fedavg adapter.rank=2": (8e-3, 2),
        "fedavg adapter.rank=4": (8e-3, 4),
        "ffa-lora adapter.rank=2": (0.1, 2),
        "ffa-lora adapter.rank=4": (0.1, 4),
        "lora-fair adapter.rank=2": (0.2, 2),
        "lora-fair adapter.rank=4": (0.2, 4),
    }


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--strategies", "fedavg,fedavg"], "--strategies"),
        (["--strategies", "fedavg,best"], "best"),
        (["--seeds", "0,one"], "--seeds"),
        (["--grid", "train.lr"], "--grid"),
        (["--grid", "train.rate=1,2"], "train.rate"),
        (["--references", "base,upper"], "upper"),
        (["--set", "compare.fedavgg.train.lr=1"], "fedavg"),
    ],
)
def test_wrong_usage_is_said_before_anything_runs(
    arguments: list[str], named: str, tmp_path: Path
) -> None:
    done = call("compare", *arguments, "--out", tmp_path / "out")
    assert done.status == 2, done.err
    assert named in done.err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_a_resume_finishes(tmp_path: Path) -> None:
    wanted: list[Any] = ["--strategies", "fedavg", "--seeds", "0,1", "--references", "none"]
    chosen = settings(federation__rounds=12)
    process = start("compare", *wanted, *chosen, "--out", "cut", cwd=tmp_path)
    folder = tmp_path / "cut" / "runs" / "fedavg-seed0" / "checkpoints"
    end = time.monotonic() + 120
    while Checkpoints(folder, 2).oldest_round() < 2 and time.monotonic() < end:
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "fedgraft compare --resume cut" in err and "Traceback" not in err
    assert psutil.wait_procs(workers, timeout=20)[1] == []
    done = run("compare", "--resume", "cut", cwd=tmp_path)
    assert done.status == 0, done.err
    whole = tmp_path / "whole"
    assert call("simulate", *chosen, "--set", "seed=0", "--out", whole).status == 0
    assert outcome(tmp_path / "cut" / "runs" / "fedavg-seed0") == outcome(whole)
    assert SMALL["federation.clients"] == 3
