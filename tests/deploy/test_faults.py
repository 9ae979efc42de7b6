"""Faults on a whole federation of real processes: whatever dies, the run ends as it should.

The reference of every run is the same config in process, where nothing dies.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from real_federation import SMALL, RealFederation, furthest, pause, real_federation

from fedgraft.config import Config
from simulations.simulate import simulate

pytestmark = [pytest.mark.soak, pytest.mark.timeout(2400)]
NAMES = ("0", "1", "2")
_ROUND_SECONDS = 3.0
"""About what a round takes here: a kill's moment is drawn from it."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealFederation]:
    with real_federation(tmp_path_factory.mktemp("f"), NAMES) as one:
        yield one


def undisturbed(path: Path, rounds: int) -> Path:
    """The adapter of the same run in process."""
    keys = {"federation.clients": len(NAMES), "federation.rounds": rounds}
    simulate(Config().with_overrides(SMALL | keys), out=path)
    return path / "adapter"


@pytest.mark.parametrize("seed", [0])
def test_every_part_killed_one_after_another_costs_no_finished_round_and_no_client(
    federation: RealFederation, tmp_path: Path, seed: int
) -> None:
    """Each at a random moment of a round of its own; what was lost in a round is asked again."""
    draw = np.random.default_rng(seed)
    victims = ["superlink", "server-app", "gateway", "supernode", "trainer", "client-app"]
    draw.shuffle(victims)
    settings = {"federation.rounds": len(victims), "federation.min-clients": len(NAMES)}
    run = federation.submit("killed", settings, "--until-done")
    for round, part in enumerate(victims, 1):
        run.until_round(round)
        pause(float(draw.uniform(0.0, _ROUND_SECONDS)))
        of = str(draw.choice(NAMES)) if part in ("supernode", "trainer", "client-app") else ""
        federation.kill(part, of)
    said = run.done()
    records = run.rounds()
    assert [record["round"] for record in records] == list(range(1, len(victims) + 1)), said
    assert [record["failed"] for record in records] == [{}] * len(victims), said
    assert furthest(run.out / "adapter", undisturbed(tmp_path / "here", len(victims))) <= 1e-5
