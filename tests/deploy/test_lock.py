from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
