"""A run is a function of its config: two runs leave the same files, but for what clocks say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import call, outcome, records, settings

CLOCK = re.compile(
    r"<!-- measured by the clock: begin -->.*?<!-- measured by the clock: end -->", re.S
)
MEASURED = {"run.log", "rounds.jsonl", "summary.json", "report.html"}
"""Files that hold times; what else they hold is compared, the log's aside."""


def report_without_clock(path: Path) -> str:
    return CLOCK.sub("", (path / "report.html").read_text())


def files(path: Path) -> dict[str, bytes]:
    """Return a run's files that hold no times; checkpoints hold the run's wall-clock seconds."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in MEASURED and file.parent.name != "checkpoints"
    }


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "ffa-lora", "lora-fair"])
def test_two_runs_leave_the_same_files(strategy: str, tmp_path: Path) -> None:
    """Dropout, partial sampling and personal state included; one directory's name is the other's,
    so that what names it (the report's command) is equal too."""
    chosen = settings(
        strategy__name=strategy,
        federation__rounds=3,
        federation__fraction=0.7,
        train__optimizer_state="keep",
        adapter__dropout=0.1,
    )
    runs = [tmp_path / "first" / "run", tmp_path / "second" / "run"]
    for run in runs:
        done = call("simulate", *chosen, "--out", run)
        assert done.status == 0, done.err
    first, second = runs
    assert files(first) == files(second)
    assert {"config.toml", "adapter/adapter_model.safetensors", "plots/metric-by-round.png"} <= set(
        files(first)
    )
    assert outcome(first) == outcome(second)
    texts = [report_without_clock(run).replace(str(run), "RUN") for run in runs]
    assert texts[0] == texts[1]


@pytest.mark.usefixtures("undrawn")
def test_the_seed_changes_everything_random(tmp_path: Path) -> None:
    chosen = settings(federation__rounds=2, federation__fraction=0.4, federation__partition="iid")
    for seed in (0, 1):
        done = call("simulate", *chosen, "--set", f"seed={seed}", "--out", tmp_path / str(seed))
        assert done.status == 0, done.err
    first, second = (records(tmp_path / str(seed)) for seed in (0, 1))
    assert first[1]["train_loss"] != second[1]["train_loss"]
