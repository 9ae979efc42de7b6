"""What the resident trainer's process does before it listens."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from deploy import trainer


def test_what_a_killed_trainer_left_half_written_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kill -9 during a write would leave a file of an adapter's size behind for ever."""
    (tmp_path / "policy.toml").write_text("")
    (tmp_path / "client.toml").write_text(
        'server = "127.0.0.1:9"\nname = "0"\nstate = "state"\npolicy = "policy.toml"\n'
        "[data]\npartition = 0\npartitions = 1\n"
    )
    home = tmp_path / "state" / "trainer" / "personal" / "0123"
    home.mkdir(parents=True)
    (tmp_path / "state" / "socket").mkdir()
    (home / ".round-000003.safetensors.4711.tmp").write_bytes(b"half")
    (home / "round-000002.safetensors").write_bytes(b"whole")
    monkeypatch.setattr(sys, "argv", ["trainer", str(tmp_path / "client.toml")])
    monkeypatch.setattr("signal.signal", lambda *given: None)
    monkeypatch.setattr(trainer.Worker, "work", lambda self: False)
    mask = os.umask(0o077)
    try:
        assert trainer.main() == 0
    finally:
        os.umask(mask)
    assert [path.name for path in home.iterdir()] == ["round-000002.safetensors"]
