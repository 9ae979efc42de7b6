"""The benchmarks run, and what they compare is the same work; times are for BENCHMARKS.md."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from strategies.registry import rule_names

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """Import a benchmark as running it from its folder does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def test_fedgraft_ends_with_the_plain_loops_adapter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(monkeypatch, "simulation").main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "FedGraft's adapter is (a)'s, within 1e-06: met" in printed


def test_every_rule_is_measured_and_is_its_dense_form(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ["--parts", "rules", "dense", "growth", "ridge"]
    assert load(monkeypatch, "aggregation").main(["--quick", "--threads", "1", *parts]) == 0
    printed = capsys.readouterr().out
    for name in rule_names():
        assert f"│ {name} " in printed
    assert "FAILED" not in printed
    assert "target: all apart by less than 0.001: met" in printed
    assert "target: error < 1e-05: met" in printed


def test_a_block_stands_for_the_whole_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: seconds and what is left by 32 blocks, a layer's work once; entries for the rest."""
    rules = load(monkeypatch, "aggregation_rules")
    args = load(monkeypatch, "aggregation").arguments(["--quick"])
    found = {"seconds": 2.0, "extra": 7.0, "made": 5.0, "update": 5.0}
    monkeypatch.setattr(rules, "measure", lambda *_: found)
    cost = rules.cost_of("fedavg", {}, args)
    assert (cost.whole_seconds, cost.whole_made, cost.whole_extra) == (64.0, 160.0, 162.0)
    assert not cost.missed
    cost = rules.cost_of("coordinate-median", {}, args)  # the middle is 172, a layer 64 x 64
    assert cost.whole_seconds == pytest.approx(2.0 * 32 * (4 + 3 * 172 / 64))
    assert "seconds" in cost.missed


def test_the_plain_loop_trains_what_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By hand: one client, one step, on rows 1 and 0, from the adapter given."""
    workload = load(monkeypatch, "simulation_workload")
    size = workload.Size(
        clients=2,
        rounds=1,
        steps=1,
        batch=2,
        length=6,
        hidden=16,
        layers=1,
        heads=2,
        mlp=24,
        rank=2,
    )
    workload.write(tmp_path, size)
    workload.write_plan(tmp_path, size, [[[[1, 0]], [[2, 3]]]])
    work = workload.Work.read(tmp_path)
    assert [len(ids) for ids in work.tokens] == [2, 4]
    model = workload.build_model(tmp_path, size)
    start = {name: p.detach() + 0.05 for name, p in workload.trainable(model).items()}
    beside = workload.Beside(model, work, start)
    beside.round()
    ends = []
    for ids in (work.tokens[0], work.tokens[1][2:]):
        parameters = workload.trainable(model)
        for name, parameter in parameters.items():
            parameter.data.copy_(start[name])
            parameter.grad = None
        labels = ids.clone()
        model(input_ids=ids, labels=labels).loss.backward()
        # AdamW's first step, without decay: lr * g / (|g| + eps)
        ends.append(
            {n: start[n] - size.lr * p.grad / (p.grad.abs() + 1e-8) for n, p in parameters.items()}
        )
    for name, value in beside.adapter.items():
        torch.testing.assert_close(value, ends[0][name] / 3 + 2 * ends[1][name] / 3)


def test_checks_notice_another_adapter_and_a_slow_run(monkeypatch: pytest.MonkeyPatch) -> None:
    table = load(monkeypatch, "simulation_table")

    def row(seconds: float, value: float) -> object:
        return table.Row("", [seconds], [1.0], adapter={"x": torch.tensor([value])})

    good = {"a": row(1.0, 1.0), "b": row(1.05, 1.0), "c": row(2.0, 1.0), "d": row(4.0, 1.0)}
    assert all(met for met, _ in table.check_adapters(good) + table.check_times(good))
    far = [met for met, _ in table.check_adapters(good | {"b": row(1.0, 1.001)})]
    assert far == [False, False, False]
    rival = [met for met, _ in table.check_adapters(good | {"d": row(4.0, 1.001)})]
    assert rival == [True, True, False]
    slow = good | {"b": row(1.5, 1.0)}
    assert [met for met, _ in table.check_times(slow)] == [False, False]
    assert table.table(slow | {"e": table.Row("(e) unavailable")}).row_count == 5
