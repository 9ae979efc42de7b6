"""The runbook's blocks, one after the other in one shell, after the README's ten lines."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import psutil
import pytest
from command_line import FEDGRAFT, call

from deploy.gateway import find_nginx
from fedgraft.errors import ConfigError
from fedgraft.flower import free_port

ROOT = Path(__file__).parents[2]
RUNBOOK = ROOT / "docs" / "runbook.md"
OPERATIONS = [ROOT / "docs" / name for name in ("runbook.md", "containers.md", "deployment.md")]
QUICK = "--set train.steps=2 --set train.batch-size=8 --set evaluate.clients=false --set threads=1"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", OPERATIONS, ids=lambda page: page.name)
def test_blocks_are_shell_and_name_commands_and_options_that_there_are(page: Path) -> None:
    known: dict[str, str] = {}
    text = "\n".join([*blocks(page, "bash"), *blocks(page, "sh")])
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    lines = [line.split("#")[0] for line in text.replace("\\\n", " ").splitlines()]
    calls = [
        one
        for line in lines
        for one in re.findall(r"fedgraft ((?:keys )?[a-z]+\b.*?)(?=[;|&>)]|$)", line)
    ]
    calls = [one for one in calls if not one.startswith(("user", "group"))]
    assert calls
    for one in calls:
        words = one.split()
        name = " ".join(words[:2]) if words[0] == "keys" else words[0]
        if name not in known:
            done = call(*name.split(), "--help")
            assert done.status == 0, one
            known[name] = done.out
        for option in re.findall(r"(?<!\S)--[a-z-]+", one):
            assert option in known[name], one


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_the_runbook_works_line_by_line(tmp_path: Path) -> None:
    try:
        find_nginx()
    except ConfigError as error:
        pytest.skip(f"{error.message}. {error.remedy}")
    (ten,) = blocks(ROOT / "README.md", "bash")
    start = [line for line in ten.splitlines() if not line.startswith("kill")]
    ports = f"s/9443/{free_port()}/;s/8000/{free_port()}/"
    # Nothing is changed but ports, and how long the run trains.
    script = [
        "set -e",
        f'fedgraft() {{ {FEDGRAFT} "$@" $([ "$1" = submit ] && echo {QUICK}) || return;',
        f'case " $* " in *" --init "*) sed -i "{ports}" "$3";; esac; }}',
        *start,
        *blocks(RUNBOOK, "bash"),
        "fedgraft status --to server.toml --json > last.json",
    ]
    with (tmp_path / "said").open("w") as said:
        shell = subprocess.Popen(
            ["bash", "-c", "\n".join(script)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
        try:
            assert shell.wait(1800) == 0, (tmp_path / "said").read_text()[-4000:]
            last = (tmp_path / "last.json").read_text()
            assert last.count('"state": "idle"') == 4
            kept = tmp_path / "client-0-state" / "trainer" / "adapters"
            assert len(list(kept.iterdir())) == 1  # through all that was done to it
        finally:
            shell.kill()
            shell.wait()
            for lock in tmp_path.glob("*-state/*.lock"):
                pid = int(lock.read_text())
                if psutil.pid_exists(pid) and str(tmp_path) == _folder(pid):
                    psutil.Process(pid).terminate()
                    psutil.Process(pid).wait(60)


def _folder(pid: int) -> str:
    try:
        return psutil.Process(pid).cwd()
    except psutil.Error:
        return ""
