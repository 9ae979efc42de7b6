"""A round's record, whatever clients report, and the same numbers in TensorBoard."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedgraft.adapter import Adapter, LoraLayer
from fedgraft.errors import ConfigError
from server.tracking import TensorBoard, round_record
from strategies.diagnostics import AggregationBias
from strategies.rounds import ClientReport, RoundOutcome, StrategyState

STATE = StrategyState(3, Adapter({"q": LoraLayer(torch.ones(1, 2), torch.ones(2, 1))}))


def outcome(**fields: Any) -> RoundOutcome:
    return RoundOutcome(STATE, **fields)


FULL = outcome(
    sampled=["2", "3", "10"],
    reports={
        "10": ClientReport(30.0, {"loss": 1.0, "steps": 5.0, "seconds": 0.25}),
        "2": ClientReport(10.0, {"loss": 3.0}),
    },
    failed={"3": "no reply within the deadline"},
    refused={"4": "tensor 'x' holds NaN or Inf"},
    validation={"10": ClientReport(6.0, {"accuracy": 0.5, "loss": 1.5}), "1": ClientReport(2.0)},
    bytes_up=123,
    bytes_down=456,
    bytes_evaluated=789,
    seconds={"train": 0.5},
    bias=AggregationBias(0.24, 0.23, 0.06),
    notes=("q: fell back",),
)


def test_a_record_holds_what_is_documented():
    record = round_record(FULL, {"accuracy": 0.6, "loss": 1.1}, 0.0079)
    assert record == {
        "round": 3,
        "lr": 0.0079,
        "train_loss": (30 * 1.0 + 10 * 3.0) / 40,
        "validation": {"accuracy": 0.6, "loss": 1.1},
        "clients": {
            "1": {"validation": {}},
            "2": {"examples": 10.0, "train_loss": 3.0, "steps": None, "seconds": None},
            "10": {
                "examples": 30.0,
                "train_loss": 1.0,
                "steps": 5.0,
                "seconds": 0.25,
                "validation": {"accuracy": 0.5, "loss": 1.5},
            },
        },
        "sampled": ["2", "3", "10"],
        "failed": {"3": "no reply within the deadline"},
        "refused": {"4": "tensor 'x' holds NaN or Inf"},
        "bytes_up": 123,
        "bytes_down": 456,
        "bytes_evaluated": 789,
        "seconds": {"train": 0.5},
        "aggregation_bias": {"before": 0.24, "after": 0.23, "repairable": 0.06},
        "epsilon": None,
        "privacy": None,
        "notes": ["q: fell back"],
    }
    assert list(record["clients"]) == ["1", "2", "10"]


def test_an_empty_round_has_nulls():
    record = round_record(outcome(), None, None)
    empty = ("lr", "train_loss", "validation", "aggregation_bias", "epsilon")
    assert all(record[key] is None for key in empty)
    assert record["clients"] == {} and record["sampled"] == [] and record["bytes_up"] == 0


def test_what_json_cannot_hold_becomes_null():
    record = round_record(FULL, {"accuracy": math.nan, "loss": math.inf}, 0.1)
    assert record["validation"] == {"accuracy": None, "loss": None}
    json.dumps(record, allow_nan=False)


def test_the_largest_metrics_that_a_client_may_report_do_not_overflow():
    # Messages refuse more than 1e15, validation a weight of more than 1e9.
    most = {"loss": 1e15, "steps": 1e15}
    reports = {str(k): ClientReport(1e9, most) for k in range(1000)}
    record = round_record(outcome(reports=reports), None, 0.1)
    assert record["train_loss"] == pytest.approx(1e15)
    json.dumps(record, allow_nan=False)


def test_tensorboard_holds_the_same_numbers(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoard(tmp_path / "board")
    board.add(round_record(outcome(), {"accuracy": 0.4, "loss": 2.0}, None) | {"round": 0})
    board.add(round_record(FULL, {"accuracy": 0.6, "loss": math.nan}, 0.0079))
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    tags = events.Tags()["scalars"]
    found = {tag: [(e.step, pytest.approx(e.value)) for e in events.Scalars(tag)] for tag in tags}
    assert found == {
        "train/loss": [(3, 1.5)],
        "train/lr": [(3, 0.0079)],
        "bytes/up": [(0, 0), (3, 123)],
        "bytes/down": [(0, 0), (3, 456)],
        "validation/accuracy": [(0, 0.4), (3, 0.6)],
        "validation/loss": [(0, 2.0)],
        "aggregation_bias/before": [(3, 0.24)],
        "aggregation_bias/after": [(3, 0.23)],
        "aggregation_bias/repairable": [(3, 0.06)],
    }


def test_without_tensorboard_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="TensorBoard is not installed") as caught:
        TensorBoard(tmp_path)
    assert "fedgraft[tensorboard]" in caught.value.remedy
