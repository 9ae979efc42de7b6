"""Whether the supervisor sees that a client's trainer or SuperNode hangs; both are real."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from waiting import until

from deploy import client_parts
from deploy.client_config import ClientConfig
from deploy.config_file import NODE, TRAINER
from deploy.isolation import prepare
from deploy.supervisor import Part


@contextmanager
def running(part: Part) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        list(part.command),
        env=dict(part.environment),
        cwd=part.folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until(part.ready, 60)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("name", [TRAINER, NODE])
def test_a_part_that_hangs_answers_no_more(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "policy.toml").write_text("")
    (tmp_path / "client.toml").write_text(
        'server = "127.0.0.1:9"\nname = "0"\nstate = "state"\npolicy = "policy.toml"\n'
        "[data]\npartition = 0\npartitions = 1\n"
    )
    config = ClientConfig.load(tmp_path / "client.toml")
    prepare(config)
    (part,) = client_parts.parts(config, tmp_path / "client.toml", name)
    assert part.answers is not None and not part.answers()
    with running(part) as process:
        assert part.answers()
        monkeypatch.setattr(client_parts, "_ANSWER_SECONDS", 0.5)
        os.kill(process.pid, signal.SIGSTOP)
        until(lambda: not part.answers(), 30)
        os.kill(process.pid, signal.SIGCONT)
        until(part.answers, 30)
