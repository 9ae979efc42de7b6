"""Reading what runs and comparisons left behind, whole and broken."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import tomli_w
from synthetic_runs import write_comparison, write_run

from fedgraft.config import Config
from fedgraft.errors import ConfigError
from server.guarantee import guarantee
from server.progress import FAILED, START, ProgressWriter
from server.report import render
from server.report_sections import incidents
from server.results import read_results
from server.statistics import references_by_strategy
from server.table import strategy_rows
from server.units import NOTHING


def test_a_run(tmp_path: Path) -> None:
    summary = write_run(tmp_path / "run", seed=3, rounds=2)
    results = read_results([tmp_path / "run"])
    (run,) = results.runs
    assert (run.label, run.seed, run.name) == ("fedavg", 3, ".")
    assert results.comparison["runs"] == [summary | {"directory": "."}]
    assert sorted(run.rounds) == [0, 1, 2]
    assert run.versions["torch"] == "2.9.0"
    assert "run" not in run.config  # the run's id belongs to no report
    assert results.command == "fedgraft simulate config.toml --out again"


def test_a_comparison(tmp_path: Path) -> None:
    written = write_comparison(tmp_path / "c", rounds=2)
    results = read_results([tmp_path / "c"])
    assert results.comparison == written
    assert results.labels == ["fedavg", "ffa-lora", "lora-fair"]
    assert [run.seed for run in results.of("lora-fair")] == [0, 1, 2]
    assert "--strategies fedavg,ffa-lora,lora-fair" in results.command
    assert "--seeds 0,1,2" in results.command
    assert results.config["compare"]["ffa-lora"]["train"]["lr"] == 0.016


def test_a_comparisons_own_labels_are_kept(tmp_path: Path) -> None:
    write_comparison(tmp_path / "c", strategies=("fedavg",), seeds=(0, 1), rounds=1)
    file = tmp_path / "c" / "comparison.json"
    listing = json.loads(file.read_text())
    for run in listing["runs"]:
        run["label"] = "fedavg train.lr=0.02"
    file.write_text(json.dumps(listing))
    assert read_results([tmp_path / "c"]).labels == ["fedavg train.lr=0.02"]


def test_runs_and_comparisons_together(tmp_path: Path) -> None:
    write_comparison(tmp_path / "c", strategies=("fedavg",), seeds=(0, 1), rounds=1)
    write_run(tmp_path / "one", strategy="flora", rounds=1)
    write_run(tmp_path / "two", strategy="fedavg", rounds=1)
    folders = [tmp_path / name for name in ("c", "one", "two", "one")]
    results = read_results(folders)
    assert results.labels == ["fedavg (c)", "flora", "fedavg (two)"]
    assert len(results.runs) == 4  # the one that was named twice counts once
    assert results.runs[0].name == "c/runs/fedavg-0"
    assert results.command.splitlines()[-1] == "fedgraft simulate two/config.toml --out again"


@pytest.mark.parametrize("folders", [("c", "d"), ("one/c", "other/c")])
def test_each_run_is_measured_against_its_own_comparisons_rows(
    folders: tuple[str, str], tmp_path: Path
) -> None:
    for name, strategy in zip(folders, ("fedavg", "flora"), strict=True):
        write_comparison(tmp_path / name, strategies=(strategy,), rounds=1)
    write_run(tmp_path / "lone", strategy="krum", rounds=1)
    file = tmp_path / folders[1] / "comparison.json"
    listing = json.loads(file.read_text())
    for row in listing["references"]:
        row["final"] += 0.01 * (row["name"] == "centralised")
    file.write_text(json.dumps(listing))
    results = read_results([tmp_path / name for name in (*folders, "lone")])
    labels = dict.fromkeys(row["label"] for row in results.comparison["references"])
    called = [name if "/" not in name else str(tmp_path / name) for name in folders]
    assert set(labels) == {"base", "alone", *(f"centralised ({name})" for name in called)}
    own = references_by_strategy(results.comparison, "centralised")
    assert own["fedavg"] == pytest.approx({s: 0.79 + 0.005 * s for s in range(3)})
    assert own["flora"] == pytest.approx({s: 0.80 + 0.005 * s for s in range(3)})
    # What belongs to no comparison is measured against none.
    assert own["krum"] == {} == references_by_strategy(results.comparison, "base")["krum"]
    assert "each run is measured against its own" in results.notes[0]
    rows = {row.label: row for row in strategy_rows(results.comparison)}
    assert (rows["krum"].gain, rows["krum"].short) == (NOTHING, NOTHING)
    assert NOTHING not in (rows["flora"].gain, rows["flora"].short)


def test_equal_reference_rows_of_two_comparisons_are_one(tmp_path: Path) -> None:
    for name, strategy in (("c", "fedavg"), ("d", "flora")):
        write_comparison(tmp_path / name, strategies=(strategy,), rounds=1)
    results = read_results([tmp_path / "c", tmp_path / "d"])
    rows = results.comparison["references"]
    assert results.notes == () and len(rows) == 9
    assert all(len(row["runs"]) == 6 for row in rows)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere"):
        read_results([tmp_path / "nowhere"])


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither summary.json nor comparison.json"):
        read_results([tmp_path])


def test_an_unfinished_run_says_how_to_finish_it(tmp_path: Path) -> None:
    write_run(tmp_path / "run", rounds=1)
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(ConfigError, match="has not finished") as caught:
        read_results([tmp_path / "run"])
    assert f"simulate --resume {tmp_path / 'run'}" in caught.value.remedy
    deploy(tmp_path / "run")
    with pytest.raises(ConfigError, match="has not finished") as caught:
        read_results([tmp_path / "run"])
    command = f"fedgraft submit --resume {tmp_path / 'run'} --to server.toml --until-done"
    assert command in caught.value.remedy
    progress = ProgressWriter(tmp_path / "run" / "progress.jsonl")
    progress.write(FAILED, message="client a: policy: largest-rank is 4", remedy="", status=2)
    with pytest.raises(ConfigError, match=r"\(it failed: client a: policy: largest-rank is 4\)"):
        read_results([tmp_path / "run"])
    progress.write(START, round=0)
    progress.close()
    with pytest.raises(ConfigError, match="has not finished: summary"):
        read_results([tmp_path / "run"])


def deploy(run: Path) -> None:
    """Let a run's config say that its clients were machines of their own."""
    file = run / "config.toml"
    tree = tomllib.loads(file.read_text())
    tree["run"]["deployed"] = True
    file.write_text(tomli_w.dumps(tree))


def test_a_deployed_run_is_made_again_by_submit(tmp_path: Path) -> None:
    write_run(tmp_path / "run", rounds=1)
    deploy(tmp_path / "run")
    results = read_results([tmp_path / "run"])
    assert results.command == "fedgraft submit config.toml --to server.toml --out again"


def test_a_private_run_names_who_refused_and_not_when(tmp_path: Path) -> None:
    """Nor does its report say that all replied."""
    refusal = "policy of client 1, lifetime-epsilon: epsilon is at 4"
    privacy = guarantee(
        Config().with_overrides({"privacy.mode": "example", "privacy.noise-multiplier": 1.0}),
        4.0,
        deployed=True,
    )
    write_run(tmp_path / "run", rounds=1, privacy=privacy, policy_refusals={"1": refusal})
    found = incidents(read_results([tmp_path / "run"]))
    assert [(i.client, i.kind, i.reason, i.rounds) for i in found] == [
        ("1", "failed", refusal, NOTHING)
    ]
    write_run(tmp_path / "quiet", rounds=1, privacy=privacy)
    report = render(read_results([tmp_path / "quiet"]))
    assert "a private run names nobody who took part in it" in report
    assert "every sampled client replied" not in report


def test_an_unfinished_comparison_says_how_to_finish_it(tmp_path: Path) -> None:
    write_comparison(tmp_path / "c", rounds=1)
    (tmp_path / "c" / "comparison.json").unlink()
    with pytest.raises(ConfigError, match="comparison that has not finished"):
        read_results([tmp_path / "c"])


@pytest.mark.parametrize("name", ["rounds.jsonl", "config.toml"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write_run(tmp_path / "run", rounds=1)
    (tmp_path / "run" / name).unlink()
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        read_results([tmp_path / "run"])


def test_a_missing_run_of_a_comparison_is_named(tmp_path: Path) -> None:
    write_comparison(tmp_path / "c", rounds=1)
    shutil.rmtree(tmp_path / "c" / "runs" / "ffa-lora-1")
    with pytest.raises(ConfigError, match=r"there is no folder .*ffa-lora-1"):
        read_results([tmp_path / "c"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "summary.json cannot be read"),
        ("[]", "summary.json lacks strategy"),
        ('{"strategy": "a", "seed": 0}', "summary.json lacks task, metric"),
    ],
)
def test_a_broken_summary(tmp_path: Path, content: str, message: str) -> None:
    write_run(tmp_path / "run", rounds=1)
    (tmp_path / "run" / "summary.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_results([tmp_path / "run"])


def test_a_comparison_that_lists_no_folders(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text('{"runs": [{}], "references": []}')
    with pytest.raises(ConfigError, match='a run without its "directory"'):
        read_results([tmp_path])


def test_different_tasks_are_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "a", rounds=1)
    write_run(tmp_path / "b", rounds=1, metric="perplexity", seed=1)
    with pytest.raises(ConfigError, match="differ in task: causal-lm, digits"):
        read_results([tmp_path / "a", tmp_path / "b"])
