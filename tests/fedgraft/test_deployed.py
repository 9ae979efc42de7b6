"""Only the machine itself says that it simulates."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fedgraft.deployed import is_deployed, simulation


def test_a_process_is_deployed_unless_it_says_otherwise() -> None:
    before = dict(os.environ)
    assert is_deployed()
    with simulation():
        with simulation():
            assert not is_deployed()
        assert not is_deployed()
    with pytest.raises(ZeroDivisionError), simulation():
        raise ZeroDivisionError
    assert is_deployed() and dict(os.environ) == before


def test_what_a_simulation_starts_simulates() -> None:
    code = "from fedgraft.deployed import is_deployed; assert not is_deployed()"
    with simulation():
        subprocess.run([sys.executable, "-c", code], check=True)
