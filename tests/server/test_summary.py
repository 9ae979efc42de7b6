"""What summary.json says of the clients, by hand."""

from __future__ import annotations

from typing import Any

import pytest
from small_runs import Summary

from fedgraft.config import Config
from fedgraft.run_directory import RunDirectory
from fedgraft.tasks.digits import Digits
from server.summary import client_metric


def record(round: int, **values: float | None) -> dict[str, Any]:
    clients: dict[str, Any] = {
        name: {"validation": {"accuracy": value, "loss": 1.0 - (value or 0.0)}}
        for name, value in values.items()
    }
    return {"round": round, "clients": clients | {"silent": {"examples": 9}}}


def test_the_worst_client_and_the_spread(tiny: Config) -> None:
    records = [record(0, a=0.1), record(1, a=0.5, b=0.9, c=0.7), record(2, a=0.0)]
    found = client_metric(records, 1, Digits(tiny))
    assert found is not None
    # mean 0.7; deviations 0.2, 0.2, 0: sd sqrt(0.08 / 3)
    assert (found["worst_client"], found["worst"]) == ("a", 0.5)
    assert (found["best_client"], found["best"], found["clients"]) == ("b", 0.9, 3)
    assert found["mean"] == pytest.approx(0.7)
    assert found["sd"] == pytest.approx((0.08 / 3) ** 0.5)
    loss = client_metric(records, 1, Digits(tiny.with_overrides({"evaluate.metric": "loss"})))
    assert loss is not None and (loss["worst_client"], loss["best_client"]) == ("a", "b")
    assert loss["worst"] == pytest.approx(0.5)


@pytest.mark.parametrize("values", [{}, {"a": None}, {"a": float("nan")}])
def test_without_numbers_there_is_no_worst_client(tiny: Config, values: dict[str, Any]) -> None:
    assert client_metric([record(1, **values)], 1, Digits(tiny)) is None
    assert client_metric([record(1, a=0.5)], 2, Digits(tiny)) is None


def test_a_run_names_its_worst_client_and_counts_its_data(
    whole: tuple[RunDirectory, Summary],
) -> None:
    directory, summary = whole
    clients = directory.rounds()[summary["best_round"]]["clients"]
    own = {name: client["validation"]["accuracy"] for name, client in clients.items()}
    assert summary["client_metric"]["worst"] == min(own.values())
    assert own[summary["client_metric"]["worst_client"]] == min(own.values())
    assert summary["client_metric"]["best"] == max(own.values())
    # 780 training digits on two clients, half of which train in a round
    assert set(summary["client_examples"].values()) == {390}
    # 357 test and 60 validation digits, each through six scanners
    assert summary["test"]["final"]["examples"] == 6 * 357
    assert summary["validation_examples"] == 6 * 60
    assert summary["test"]["initial"]["accuracy"] == summary["initial"]
    assert {"macro_f1", "f1[0]", "loss"} <= summary["test"]["final"].keys()


def test_another_metric_is_watched(tiny: Config, tmp_path: Any) -> None:
    from small_runs import go, new

    directory = new(tmp_path / "run", tiny, evaluate__metric="macro-f1", evaluate__clients=True)
    summary = go(directory, federation__rounds=2)
    by_round = [record["validation"]["macro_f1"] for record in directory.rounds()]
    assert (summary["metric"], summary["direction"]) == ("macro_f1", "max")
    assert summary["validation_best"] == max(by_round)
    assert summary["best_round"] == by_round.index(max(by_round))
    assert summary["final"] == summary["test"]["final"]["macro_f1"]
    assert "| test macro F1, this adapter |" in (directory.adapter / "README.md").read_text()
