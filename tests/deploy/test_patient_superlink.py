"""What of Flower's SuperLink the launcher touches."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from threading import Event
from unittest.mock import Mock

import pytest
from flwr.supercore import sql_mixin
from waiting import alive, until

from deploy import kept_superexec, patient_superlink


def test_a_write_waits_for_those_before_it_longer_than_flowers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)

    def settings(name: str) -> dict[str, str]:
        with closing(sqlite3.connect(tmp_path / name)) as connection:
            sql_mixin._set_sqlite_pragmas(connection, None)
            asked = [key for key, _ in sql_mixin.SQLITE_PRAGMAS]
            return {key: connection.execute(f"PRAGMA {key}").fetchone()[0] for key in asked}

    theirs = settings("theirs")
    patient_superlink.wait_for_the_database()
    ours = settings("ours")
    assert ours.pop("busy_timeout") == 1000 * patient_superlink.BUSY_SECONDS
    assert theirs.pop("busy_timeout") == 5000
    assert ours == theirs


def test_a_superexec_that_died_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's SuperLink takes nothing else of `subprocess` than what it is given."""
    command = patient_superlink.command
    monkeypatch.setattr(command, "subprocess", command.subprocess)
    monkeypatch.setattr(kept_superexec, "AGAIN_SECONDS", 0.01)
    kept_superexec.KeptSuperExec(command)
    births = tmp_path / "births"
    script = f"echo $$ >> {births}; [ $(wc -l < {births}) = 2 ] && exec sleep 600"
    first = command.subprocess.Popen(["sh", "-c", script])
    assert first.wait(10) == 1
    until(lambda: len(births.read_text().split()) == 2)
    one, other = map(int, births.read_text().split())
    assert one == first.pid and alive(other)
    never = Mock(return_value=Mock(wait=Event().wait))
    monkeypatch.setattr(kept_superexec.subprocess, "Popen", never)
    os.kill(other, signal.SIGKILL)
    until(lambda: never.called)
    text = Path(command.__file__).read_text()
    assert set(re.findall(r"\bsubprocess\.(\w+)", text)) == {"Popen", "TimeoutExpired"}
