"""The parts of Flower's SuperNode that the launcher touches."""

from __future__ import annotations

import re
import ssl
from pathlib import Path

import pytest
from flwr.supernode import start_client_internal as loop
from test_client_config import certificate

from deploy import supernode


def test_the_supernodes_sleeps_are_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loop takes nothing of `time` but the sleep that is replaced."""
    monkeypatch.setattr(loop, "time", loop.time)
    slept: list[float] = []
    monkeypatch.setattr(supernode.time, "sleep", slept.append)
    supernode.wait_less()
    loop.time.sleep(3)
    loop.time.sleep(0.05)
    assert slept == [supernode.LONGEST_SLEEP, 0.05]
    text = Path(loop.__file__).read_text()
    assert set(re.findall(r"\btime\.(\w+)\(", text)) == {"sleep"}


def test_contexts_that_trust_the_federations_ca_present_the_clients_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = certificate(tmp_path / "keys", "north")
    presented: list[tuple[str, str]] = []
    monkeypatch.setattr(
        ssl.SSLContext, "load_cert_chain", lambda self, crt, key: presented.append((crt, key))
    )
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)
    supernode.present(str(keys / "client.crt"), "key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata="x")
    assert presented == [(str(keys / "client.crt"), "key")]
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata="x")
    assert len(presented) == 1
