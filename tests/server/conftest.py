"""Shared by the tests of the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from small_runs import Summary, go, new

from fedgraft.adapter import Adapter
from fedgraft.config import Config
from fedgraft.run_directory import RunDirectory
from server.run import FederatedRun


@pytest.fixture
def validations(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lets a test say what validation gives, evaluation by evaluation."""
    evaluate = FederatedRun._evaluate

    def script(*values: float) -> None:
        left = list(values)

        def scripted(
            self: FederatedRun, adapter: Adapter, *, test: bool = False
        ) -> dict[str, float]:
            if test:
                return evaluate(self, adapter, test=True)
            return {"accuracy": left.pop(0), "loss": 1.0}

        monkeypatch.setattr(FederatedRun, "_evaluate", scripted)

    yield script


@pytest.fixture(scope="module")
def whole(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, Summary]:
    path = tmp_path_factory.mktemp("whole") / "run"
    directory = new(path, tiny, evaluate__clients=True, federation__fraction=0.5)
    return directory, go(directory)
