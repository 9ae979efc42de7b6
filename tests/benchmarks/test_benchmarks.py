"""The benchmarks run, and what they compare is the same work; times are for BENCHMARKS.md."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fedgraft import simulate
from server.units import Unit
from simulations.check import check
from simulations.plan import Plan
from strategies.fitness import check_rule
from strategies.registry import build_rule, rule_names

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


def test_packed_rows_train_as_padded_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(monkeypatch, "packing").main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "packed rows are scored row by row" in printed
    assert "losses a token apart by" in printed and printed.count(": met") == 1


def test_a_bases_bytes_are_told_before_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = load(monkeypatch, "base_memory")
    assert memory.main(["--quick", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "nf4" in printed and "not measured on a GPU yet" in printed


def test_local_training_has_the_plain_loops_loss(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = load(monkeypatch, "training")
    assert training.main(["--quick"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "float32" in line]
    assert len(rows) == 2
    for row in rows:
        assert float(row.split("within ")[1].split()[0]) < 1e-5


def test_private_training_is_timed_beside_plain_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(monkeypatch, "private_training").main(["--quick"]) == 0
    rows = [row for row in capsys.readouterr().out.splitlines() if "1 thread" in row]
    assert len(rows) == 2
    for row in rows:
        plain, private, ratio = map(float, row.strip("| ").split(" | ")[3:6])
        assert plain > 0.0 and private > 0.0 and ratio > 0.0


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


def test_every_experiment_could_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule honours the settings that it is compared with, and has a label of its own."""
    comparison = load(monkeypatch, "comparison")
    for name in comparison.EXPERIMENTS:
        local = "task.name" not in comparison.EXPERIMENTS[name].settings
        for variant in plan_of(comparison, name).variants().values():
            if local:  # the others need a model and data that are not here
                check(variant)
    compared = {v.strategy.name for v in plan_of(comparison, "domain").variants().values()}
    assert compared == set(rule_names())


def plan_of(comparison: ModuleType, name: str) -> Plan:
    plan: Plan = comparison.planned(comparison.EXPERIMENTS[name], comparison.arguments([name]))
    return plan


@pytest.mark.slow
def test_a_comparison_prints_its_table_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small = ["--set", "federation.rounds=1", "--set", "federation.clients=2", "--seeds", "0", "1"]
    small += ["--strategies", "fedavg", "fedprox", "ffa-lora", "--out", str(tmp_path)]
    comparison = load(monkeypatch, "comparison")
    assert comparison.main(["rank-1", *small]) == 0
    first = capsys.readouterr().out
    assert "| `fedprox` | " in first and first.count("\n| `") == 3
    assert comparison.main(["rank-1", *small]) == 0
    assert capsys.readouterr().out == first  # seconds, too: nothing ran again
    assert comparison.main(["best"]) == 2
    assert "many-clients" in capsys.readouterr().out


def test_the_privacy_study_could_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rule at every budget is honoured, with the learning rate that did best."""
    study = load(monkeypatch, "privacy_study")
    for name, experiment in study.EXPERIMENTS.items():
        args = study.arguments([name, "--base", "FOLDER", "--data", "FOLDER"])
        variants = experiment.variants(experiment.budgets)
        rates = {variant: 0.1 * (n + 1) for n, variant in enumerate(variants)}
        plan = study.planned(experiment, experiment.budgets, args, rates)
        configs = plan.variants()
        assert list(configs) == list(variants) and plan.seeds == (0, 1, 2)
        for variant, config in configs.items():
            rule, budget = variants[variant]
            assert config.strategy.name == rule and config.privacy.target_epsilon == budget
            assert config.train.lr == rates[variant]
            check_rule(build_rule(rule), config)
        for budget in experiment.budgets:
            tuning = study.planned(experiment, [budget], args)
            assert tuning.seeds == (100,)
            assert len(tuning.variants()) == len(experiment.rules) * len(experiment.rates[budget])


def test_the_privacy_study_says_how_far_a_rule_is_from_fedavg(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By hand: 10 and 20 points ahead; t of one degree of freedom is 12.706."""
    study = load(monkeypatch, "privacy_study")
    unit, first = Unit("accuracy"), {0: 0.5, 1: 0.6}
    assert study.told(unit, first, first) == "55.0 ± 7.1%"
    assert study.told(unit, first, {0: 0.6, 1: 0.8}) == "70.0 ± 14.1%; +15.0 [−48.5, +78.5]"
    assert study.ranged([0.5, 2.0, 1.0]) == "1 (0.5 to 2)"


def test_noise_is_told_from_signal_layer_by_layer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = load(monkeypatch, "privacy_study")
    small = {"federation.rounds": 1, "federation.clients": 2, "privacy.mode": "example"}
    found = {}
    for rule in ("fedavg", "ffa-lora"):
        more = {"strategy.name": rule, "privacy.noise-multiplier": 2.0, "evaluate.clients": False}
        run = simulate(study.DIGITS | small | more, out=tmp_path / rule)
        found[rule] = study.signal(run.path)
    layers = len(run.adapter().layers)
    both, frozen = found["fedavg"], found["ffa-lora"]
    assert len(both.A) == len(both.B) == len(frozen.B) == layers and frozen.A == []
    assert all(0.0 < share < 1.0 for share in both.share)
    assert frozen.share == [0.0] * layers
    # with A frozen the product's noise is B's, seen through A
    assert all(0.0 < ratio < 10.0 for ratio in (*both.product, *frozen.product))


@pytest.mark.slow
def test_hostile_clients_hurt_the_mean_and_not_multi_krum(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    robustness = load(monkeypatch, "robustness")
    few = ["--rules", "fedavg", "multi-krum", "--rounds", "4", "--seeds", "0", "--quick"]
    assert robustness.main([*few, "--plot", str(tmp_path / "plot.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    (clean, flipped, *_), (clean_krum, flipped_krum, *_) = (
        [float(cell) for cell in line.strip("| ").split(" | ")[1:]] for line in lines[2:4]
    )
    assert clean - flipped > 10.0 and clean_krum - flipped_krum < 10.0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


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
