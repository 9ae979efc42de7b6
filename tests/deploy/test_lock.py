from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.config_file import House
from deploy.lock import holder, only_one
from fedgraft.errors import ConfigError

HOLD = "import sys; from pathlib import Path; from deploy.lock import only_one\n"
HOLD += "with only_one(Path(sys.argv[1]), 'server'):\n  print('held', flush=True); input()"


def test_the_second_is_told_who_is_the_first_and_a_dead_one_holds_nothing(tmp_path: Path):
    path = tmp_path / "state" / "server.lock"
    assert holder(path) is None
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert first.stdout is not None and first.stdout.readline() == b"held\n"
        assert holder(path) == first.pid
        told = rf"runs already on .*state \(process {first.pid}\)"
        with pytest.raises(ConfigError, match=told), only_one(path, "server"):
            pass
    finally:
        first.kill()
        first.communicate()
    assert holder(path) is None
    with only_one(path, "server"):
        assert holder(path) == os.getpid()
        assert path.read_text() == f"{os.getpid()}\n"
    assert holder(path) is None


@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "nonsense", "depth"])
def test_what_another_user_put_in_its_place_is_no_holder(kind: str, tmp_path: Path):
    house = House(tmp_path, "client")
    (tmp_path / "elsewhere").write_text('{"trainer": {"ready": true}}')
    for path in (house.lock, house.parts):
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to(tmp_path / "elsewhere")
        elif kind == "folder":
            path.mkdir()
        else:
            path.write_text("no number, no JSON" if kind == "nonsense" else 100_000 * "[")
    assert holder(house.lock) is None and house.running() == {}
    if kind in ("nonsense", "depth"):
        with house.lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert holder(house.lock) is None
