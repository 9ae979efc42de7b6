"""Server and clients on hosts of their own: a bad network, and a client that is cut off."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from network_namespaces import Hosts, hosts
from real_federation import RealFederation, pause, real_federation

pytestmark = [pytest.mark.soak, pytest.mark.timeout(2400)]
NAMES = ("0", "1", "2")
_CUT_SECONDS = 120.0


@pytest.fixture(scope="module")
def network() -> Iterator[Hosts]:
    with hosts(NAMES) as made:
        yield made


@pytest.fixture(scope="module")
def federation(
    network: Hosts, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealFederation]:
    with real_federation(tmp_path_factory.mktemp("n"), NAMES, network) as one:
        yield one


def test_a_client_cut_off_for_two_minutes_misses_its_round_and_comes_back(
    federation: RealFederation, network: Hosts
) -> None:
    run = federation.submit("cut", {"federation.min-clients": 2})
    run.until_round(2)
    network.cut("2")
    cut = time.monotonic()
    try:
        said = run.done()
        pause(max(0.0, cut + _CUT_SECONDS - time.monotonic()))
    finally:
        network.mend("2")
    records = run.rounds()
    assert [record["round"] for record in records] == [1, 2, 3], said
    assert len(records[0]["clients"]) == 3
    assert all({"0", "1"} <= set(record["clients"]) for record in records), said
    assert "2" not in records[1]["clients"] and records[1]["failed"].keys() == {"2"}, said
    run = federation.submit("back", {"federation.min-clients": 3})
    said = run.done()
    assert [record["failed"] for record in run.rounds()] == [{}] * 3, said


def test_latency_and_loss_cost_time_alone(federation: RealFederation, network: Hosts) -> None:
    for name in NAMES:
        network.worsen(name, 40.0, 0.02)
    run = federation.submit("bad", {"federation.min-clients": 3})
    said = run.done()
    assert [record["failed"] for record in run.rounds()] == [{}] * 3, said
