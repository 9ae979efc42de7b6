"""The soak in its short forms: faults of every kind, and in CI those that are over in seconds."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from deploy.gateway import find_nginx
from fedgraft.errors import ConfigError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SECONDS = ("SuperLink", "gateway", "SuperNode", "trainer", "stopped", "garbage", "cut off")
"""Kinds of faults; who misses a ClientApp waits for a minute."""


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark."""
    try:
        find_nginx()
    except ConfigError as error:
        pytest.skip(f"{error.message}. {error.remedy}")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("soak")


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_a_run_under_faults_completes_and_nothing_leaks(
    soak: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    status = soak.main(["--clients", "3", "--rounds", "6", "--fraction", "1.0"])
    assert status == 0, capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_under_quick_faults_completes_and_nothing_leaks(
    soak: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = importlib.import_module("soak_faults")
    monkeypatch.setattr(faults, "FAULTS", dict.fromkeys(SECONDS, 1))
    monkeypatch.setattr(soak, "FAULTS", faults.FAULTS)
    monkeypatch.setattr(faults, "CUT_SECONDS", 5.0)
    monkeypatch.setattr(faults, "STOPPED_SECONDS", (1.0, 2.0))
    monkeypatch.setattr(faults, "MOMENT_SECONDS", 1.0)
    monkeypatch.setattr(soak, "REST_SECONDS", 5.0)
    status = soak.main(["--clients", "2", "--rounds", "4", "--fraction", "1.0"])
    assert status == 0, capsys.readouterr().out
