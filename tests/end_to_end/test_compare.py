"""A comparison: the same data, adapters and samples for all strategies of a seed, and its files."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import (
    SMALL,
    call,
    checkpoint,
    events,
    outcome,
    records,
    settings,
    start,
    without_times,
)

from fedgraft.config import Config
from fedgraft.errors import ConfigError
from fedgraft.run_directory import RunDirectory
from server.statistics import references_by_strategy
from simulations.compare import _jobs
from simulations.plan import Plan

WANTED = [
    *("compare", "--strategies", "fedavg,ffa-lora", "--seeds", "0,1"),
    *settings(federation__rounds=4, federation__fraction=0.7, checkpoint__keep=9),
    *("--set", "compare.ffa-lora.train.lr=0.016"),
]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compared") / "two"
    done = call(*WANTED, "--out", path, "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out) == json.loads((path / "comparison.json").read_text())
    assert "done ffa-lora, seed 1: test accuracy" in done.err
    assert "done centralised, seed 1: test accuracy" in done.err
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
        assert own | {"label": row["strategy"], "directory": row["directory"]} == row
    rows = {(row["name"], row["seed"]): row for row in found["references"]}
    assert rows["base", 0]["final"] == found["runs"][0]["initial"]
    assert rows["alone", 1]["low"] <= rows["alone", 1]["final"] <= rows["alone", 1]["high"]
    named = [(row["name"], row["seed"]) for row in found["references"]]
    assert named == [(n, s) for n in ("base", "alone", "centralised") for s in (0, 1)]
    first, second = found["strategies"]
    assert [first[key] for key in ("difference", "low", "high")] == [None] * 3
    finals = [row["final"] for row in found["runs"]]
    assert first["mean"] == pytest.approx((finals[0] + finals[1]) / 2)
    # The standard deviation of two values, n - 1 below the line.
    assert first["sd"] == pytest.approx(abs(finals[0] - finals[1]) / 2**0.5)
    differences = [finals[2] - finals[0], finals[3] - finals[1]]
    assert second["difference"] == pytest.approx(sum(differences) / 2)
    # Student's t with one degree of freedom: 12.706 times the standard error.
    half = 12.7062 * abs(differences[0] - differences[1]) / 2
    assert second["high"] - second["difference"] == pytest.approx(half, rel=1e-4)


@pytest.mark.slow
def test_strategies_of_a_seed_share_samples_partitions_and_the_first_adapter(
    compared: Path,
) -> None:
    samples, starts = {}, {}
    for seed in (0, 1):
        runs = [compared / "runs" / f"{name}-seed{seed}" for name in ("fedavg", "ffa-lora")]
        first, second = (records(run) for run in runs)
        assert [record["sampled"] for record in first] == [record["sampled"] for record in second]
        # Each client's own data: how many train, and how the untouched start does on the rest.
        # Fewer bytes go down where A does not travel.
        start, other_start = ({**run[0], "bytes_evaluated": 0} for run in (first, second))
        assert start == other_start and len(start["clients"]) == 3
        for one, other in zip(first[1:], second[1:], strict=True):
            shares = [
                {name: client.get("examples") for name, client in record["clients"].items()}
                for record in (one, other)
            ]
            assert shares[0] == shares[1] and set(one["sampled"]) <= shares[0].keys()
        begun = [checkpoint(run / "checkpoints" / "round-000000.safetensors")[0] for run in runs]
        assert begun[0] == begun[1] and len(begun[0]) > 20
        samples[seed], starts[seed] = [record["sampled"] for record in first], begun[0]
    assert samples[0] != samples[1] and starts[0] != starts[1]
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


def test_a_table_that_names_a_rule_is_a_variant_of_it() -> None:
    tables = {
        "compare.fedprox": {"strategy.name": "fedavg", "train.proximal-mu": 0.1},
        "compare.rank-aware": {"strategy": {"name": "flexlora", "rank-aware": True}},
    }
    names = ("fedavg", "fedprox", "flexlora", "rank-aware")
    found = Plan(Config().with_overrides(tables), names, (0,)).variants()
    assert {label: (c.strategy.name, c.train.proximal_mu) for label, c in found.items()} == {
        "fedavg": ("fedavg", 0.0),
        "fedprox": ("fedavg", 0.1),
        "flexlora": ("flexlora", 0.0),
        "rank-aware": ("flexlora", 0.0),
    }
    assert found["rank-aware"].strategy.options == {"rank-aware": True}
    grid = {"strategy.server-momentum": [0.5]}
    stepped = tables | {"strategy.server-optimizer": "avgm"}
    own = Plan(Config().with_overrides(stepped), ("fedavg", "fedprox"), (0,), grid)
    assert len(own.variants()) == 2
    with pytest.raises(ConfigError, match="rank-aware is set for all strategies, and fedprox"):
        grid = {"strategy.rank-aware": [True]}
        Plan(Config().with_overrides(tables), ("rank-aware", "fedprox"), (0,), grid).variants()


def test_a_grid_over_optimisers_tries_each_with_the_settings_that_it_uses() -> None:
    grid = {
        "strategy.server-optimizer": ["none", "avgm", "adam"],
        "strategy.server-lr": [0.1, 0.2],
        "strategy.server-tau": [1e-3, 1e-2],
    }
    plan = Plan(Config(), ("fedavg",), (0,), grid)
    found = {label: c.strategy.options for label, c in plan.variants().items()}
    assert len(found) == 1 + 2 + 4 and plan.beside().keys() == found.keys()
    assert found["fedavg strategy.server-optimizer=none"] == {"server-optimizer": "none"}
    label = "fedavg strategy.server-optimizer=avgm strategy.server-lr=0.2"
    assert found[label] == {"server-optimizer": "avgm", "server-lr": 0.2}
    unused = {"strategy.server-lr": [0.1, 0.2]}
    with pytest.raises(ConfigError, match=r"holds strategy\.server-lr, which nothing uses"):
        Plan(Config(), ("fedavg", "lora-fair"), (0,), unused).variants()
    one = {"compare.fedavg.strategy.server-optimizer": "avgm"}
    some = Plan(Config().with_overrides(one), ("fedavg", "ffa-lora"), (0,), unused).variants()
    assert list(some) == [
        "fedavg strategy.server-lr=0.1",
        "fedavg strategy.server-lr=0.2",
        "ffa-lora",
    ]


def rows(config: dict[str, Any], grid: dict[str, Any], name: str) -> dict[str, list[str]]:
    """Return a comparison's reference rows of a name, with the runs that each belongs to."""
    plan = Plan(Config().with_overrides(config), ("fedavg", "ffa-lora"), (0, 1), grid)
    jobs = [job for job in _jobs(plan, Path("c")) if job.reference == name]
    assert len({job.path for job in jobs}) == len(jobs) and len(jobs) % 2 == 0
    return {job.label: [path.name for path in job.runs] for job in jobs if job.config.seed == 0}


def test_one_reference_row_serves_all_that_differ_only_in_how_they_train() -> None:
    own = {"compare.ffa-lora.train.lr": 0.016, "compare.ffa-lora.adapter.alpha": 8.0}
    grid = {"strategy.server-optimizer": ["none", "avgm"], "federation.min-clients": [1, 2]}
    own |= {"compare.ffa-lora.strategy.server-lr": 0.5, "compare.fedavg.evaluate.every": 2}
    for name in ("base", "alone", "centralised"):
        assert rows({**SMALL, **own}, grid, name) == {name: []}


@pytest.mark.parametrize(
    ("key", "values", "which"),
    [
        ("adapter.rank", (2, 4), {"alone", "centralised"}),
        ("train.lr", (0.004, 0.008), {"alone", "centralised"}),
        ("train.batch-size", (5, 8), {"alone", "centralised"}),
        ("federation.rounds", (1, 2), {"alone", "centralised"}),
        ("federation.clients", (2, 3), {"alone", "centralised"}),
        ("federation.fraction", (0.5, 1.0), {"centralised"}),
        ("evaluate.fraction", (0.1, 0.2), {"base", "alone", "centralised"}),
    ],
)
def test_a_grid_has_reference_rows_of_its_own(
    key: str, values: tuple[Any, Any], which: set[str]
) -> None:
    for name in ("base", "alone", "centralised"):
        found = rows(SMALL, {key: list(values)}, name)
        if name not in which:
            assert found == {name: []}
            continue
        slug = [f"{key}-{value}" for value in values]
        assert found == {
            f"{name} {key}={value}": [f"fedavg-{s}-seed0", f"ffa-lora-{s}-seed0"]
            for value, s in zip(values, slug, strict=True)
        }


def test_what_one_strategy_trains_on_makes_a_row_of_its_own() -> None:
    own = {"compare.ffa-lora.federation.rounds": 5, "compare.ffa-lora.train.lr": 0.016}
    plan = Plan(Config().with_overrides({**SMALL, **own}), ("fedavg", "ffa-lora"), (0,))
    jobs = {job.label: job for job in _jobs(plan, Path("c")) if job.reference}
    first, second = "centralised federation.rounds=6", "centralised federation.rounds=5"
    alone = ["alone federation.rounds=6", "alone federation.rounds=5"]
    assert list(jobs) == ["base", *alone, first, second]
    assert [path.name for path in jobs[second].runs] == ["ffa-lora-seed0"]
    # The learning rate is FFA-LoRA's own and not the pooled data's.
    assert (jobs[second].config.federation.rounds, jobs[second].config.train.lr) == (5, 8e-3)
    assert jobs[first].config.federation.rounds == 6


@pytest.mark.slow
def test_runs_of_a_grid_are_measured_against_their_own_rows(tmp_path: Path) -> None:
    """Twelve times the rounds: both rows are what a comparison of that alone computes."""
    small = settings(federation__clients=2)
    one = ("compare", "--strategies", "fedavg", "--seeds", "0", *small)
    done = call(*one, "--grid", "federation.rounds=1,12", "--out", tmp_path / "grid")
    assert done.status == 0, done.err
    found = json.loads((tmp_path / "grid" / "comparison.json").read_text())
    by_label = {row.get("label", row["name"]): row for row in found["references"]}
    assert len(found["references"]) == len(by_label) == 5
    own = references_by_strategy(found, "centralised")
    for rounds in (1, 12):
        alone = tmp_path / str(rounds)
        done = call(*one, "--set", f"federation.rounds={rounds}", "--out", alone)
        assert done.status == 0, done.err
        wanted = json.loads((alone / "comparison.json").read_text())["references"]
        assert not any("runs" in row for row in wanted)
        for row in wanted:
            label = row["name"]
            label += "" if label == "base" else f" federation.rounds={rounds}"
            mine = by_label[label]
            assert row == {k: v for k, v in mine.items() if k not in ("label", "runs")}
        assert own[f"fedavg federation.rounds={rounds}"] == {0: wanted[2]["final"]}
    assert len({own[label][0] for label in own}) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--strategies", "fedavg,fedavg"], "--strategies"),
        (["--strategies", "fedavg,best"], "best"),
        (["--seeds", "0,one"], "--seeds"),
        (["--grid", "train.lr"], "--grid"),
        (["--grid", "train.rate=1,2"], "train.rate"),
        (["--grid", "compare.lora-fair.train.lr=1,2"], "--strategies lora-fair --grid train.lr="),
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


def test_one_option_of_a_rule_is_not_set_for_all(tmp_path: Path) -> None:
    option = ("--set", "strategy.lambda=0.5", "--out", tmp_path / "out")
    done = call("compare", "--strategies", "fedavg,lora-fair", *option)
    assert done.status == 2
    assert "strategy.lambda is set for all" in done.err
    assert "--set compare.NAME.strategy.lambda=..." in done.err
    done = call("compare", "--strategies", "fedavg,lora-fair", "--grid", "strategy.lambda=0.1,0.2")
    assert done.status == 2 and "strategy.lambda is set for all" in done.err
    assert "and fedavg does not know it" in done.err and "compare that one alone" in done.err
    avgm = Config().with_overrides({"strategy.server-optimizer": "avgm"})
    both = Plan(avgm, ("fedavg", "ffa-lora"), (0,), {"strategy.server-lr": [0.1, 0.2]})
    assert len(both.variants()) == 4  # of options that all know, a grid is welcome
    plan = Plan(
        Config().with_overrides({"compare.lora-fair.strategy.lambda": 0.5}),
        ("fedavg", "lora-fair"),
        (0,),
    )
    assert [c.strategy.options for c in plan.variants().values()] == [{}, {"lambda": 0.5}]


@pytest.mark.slow
def test_a_resume_takes_no_other_plan(compared: Path) -> None:
    before = (compared / "comparison.toml").read_bytes()
    for more in (["--set", "train.lr=1"], ["--seeds", "0"], ["--out", "x"], ["my.toml"]):
        done = call("compare", "--resume", compared, *more)
        assert done.status == 2, more
        name = "CONFIG.toml" if len(more) == 1 else more[0]
        assert f"{name} is given as well" in done.err
    done = call("compare", "--resume", compared / "runs" / "fedavg-seed0")
    assert done.status == 2 and "holds no comparison" in done.err
    assert (compared / "comparison.toml").read_bytes() == before


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_a_resume_ends_as_if_nothing_had_happened(
    compared: Path, tmp_path: Path
) -> None:
    """Pressed at a terminal it goes to all processes; the user stands among modules like ours."""
    for name in ("server.py", "client.py", "simulations.py"):
        (tmp_path / name).write_text("raise SystemExit('the user's own')\n")
    process = start(*WANTED, "--out", "my cut", cwd=tmp_path)
    cut = tmp_path / "my cut"
    end = time.monotonic() + 120
    while not any(event["event"] == "reply" for event in events(cut / "runs" / "fedavg-seed0")):
        assert time.monotonic() < end
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.splitlines()[-2:] == [
        "Error: interrupted; everything up to the last checkpoint is kept",
        "       Continue with: fedgraft compare --resume 'my cut'",
    ]
    assert "Traceback" not in err and not (cut / "comparison.json").exists()
    assert workers and psutil.wait_procs(workers, timeout=20)[1] == []

    done = call("compare", "--resume", cut)
    assert done.status == 0, done.err
    found, wanted = (
        without_times(json.loads((path / "comparison.json").read_text()))
        for path in (cut, compared)
    )
    assert found == wanted
    for row in wanted["runs"]:
        assert outcome(cut / row["directory"]) == outcome(compared / row["directory"])
