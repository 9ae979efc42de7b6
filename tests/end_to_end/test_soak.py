"""The soak in its short form: three clients, six rounds, every fault at least once."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from deploy.gateway import find_nginx
from fedgraft.errors import ConfigError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_a_run_under_faults_completes_and_nothing_leaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        find_nginx()
    except ConfigError as error:
        pytest.skip(f"{error.message}. {error.remedy}")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    soak = importlib.import_module("soak")
    status = soak.main(["--clients", "3", "--rounds", "6", "--fraction", "1.0"])
    assert status == 0, capsys.readouterr().out
