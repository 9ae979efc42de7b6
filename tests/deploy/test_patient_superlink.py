"""What of Flower's SuperLink the launcher touches."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from flwr.supercore import sql_mixin

from deploy import patient_superlink


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
