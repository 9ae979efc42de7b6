"""A federation on real processes, started by the shell lines that the documentation prints.

A server with its gateway and three clients over TLS with node keys, all on loopback; a run whose
adapter is the simulation's; and a run whose ServerApp and SuperLink are killed.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import FEDGRAFT, Done, call
from safetensors.torch import load_file
from waiting import until

from deploy.gateway import find_nginx
from fedgraft.errors import ConfigError
from fedgraft.flower import free_port

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "submitting.md"]
WAIT_SECONDS = 900.0


def printed(page: Path) -> str:
    (block,) = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    return str(block)


def test_readme_and_page_print_the_same_lines() -> None:
    assert printed(PAGES[0]) == printed(PAGES[1])


def shell_lines() -> list[list[str]]:
    """The block's commands, loops unrolled, as lists of words; a last "&" stays."""
    block = printed(PAGES[0])
    lines = []
    for line in block.splitlines():
        loop = re.fullmatch(r"for k in ([\d ]+); do (.*?);? done", line)
        bodies = [line] if loop is None else [loop[2].replace("$k", k) for k in loop[1].split()]
        lines += [shlex.split(body) for body in bodies]
    return [words for words in lines if words[0] == "fedgraft"]


@dataclass
class Federation:
    """The folder that the lines were run in, and the last of them: submit."""

    folder: Path
    submit: list[str]

    def submitted(self, out: str, *more: str) -> Done:
        words = list(self.submit)
        words[words.index("--out") + 1] = out
        return call(*words[1:], *SMALL, *more)

    def parts(self) -> dict[str, Any]:
        """What the server's supervisor runs; {} while it writes that down."""
        path = self.folder / "server-state" / "parts.json"
        try:
            return json.loads(path.read_text())  # type: ignore[no-any-return]
        except (OSError, ValueError):
            return {}

    def traffic(self) -> tuple[int, int]:
        """Bytes that the gateway's log has counted for messages' arrays, up and down."""
        up = down = 0
        for line in (self.folder / "server-state" / "log" / "access.jsonl").read_text().split("\n"):
            if line:
                told = json.loads(line)
                up += told["bytes_in"] * ("/push-object" in told["request"])
                down += told["bytes_out"] * ("/pull-object" in told["request"])
        return up, down


SMALL = [
    word
    for setting in (
        *("train.steps=2", "train.batch-size=8", "model.device=cpu", "threads=1"),
        *("evaluate.clients=false", "adapter.rank=64", "federation.rounds=2"),
    )
    for word in ("--set", setting)
]
"""What makes the printed run one of seconds, with an adapter whose arrays outweigh headers."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    try:
        find_nginx()
    except ConfigError as error:
        pytest.skip(f"{error.message}. {error.remedy}")
    folder = tmp_path_factory.mktemp("f")  # short, since sockets' paths may not be long
    ports = {"9443": str(free_port()), "8000": str(free_port())}
    lines = shell_lines()
    running: list[subprocess.Popen[bytes]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("server.session.draw", lambda path: None)  # not the subject here
        try:
            for words in lines:
                if words[1] == "submit":
                    yield Federation(folder, words)
                    break
                if words[-1] == "&":
                    running.append(_start(words, folder))
                    continue
                done = call(*words[1:])
                assert done.status == 0, f"{shlex.join(words)}\n{done.err}"
                for path in folder.glob("*.toml"):
                    text = path.read_text()
                    for port, free in ports.items():
                        text = text.replace(port, free)
                    path.write_text(text)
        finally:
            family = [p for one in running for p in _family(one)]
            for one in running:
                one.send_signal(signal.SIGTERM)
            for one in running:
                one.wait(60)
            assert [p for p in family if p.is_running()] == []


def _start(words: list[str], folder: Path) -> subprocess.Popen[bytes]:
    shown = [word for word in words[1:-1] if word != "2>"]
    shown = [word for word in shown if not word.endswith(".log")]
    with (folder / "out").open("ab") as out:
        return subprocess.Popen(
            [FEDGRAFT, *shown], cwd=folder, stdout=out, stderr=out, start_new_session=True
        )


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="module")
def simulated(federation: Federation) -> Path:
    """The same config in process."""
    words = federation.submit[1:]
    given = [word for word in words[words.index("--set") :] if word != "&"]
    done = call("simulate", "--out", "simulated", *given, *SMALL)
    assert done.status == 0, done.err
    return federation.folder / "simulated"


def status() -> dict[str, Any]:
    return json.loads(call("status", "--to", "server.toml", "--json").out)  # type: ignore[no-any-return]


def furthest(one: Path, other: Path) -> float:
    a, b = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_printed_lines_end_with_the_simulations_adapter_on_every_client(
    federation: Federation, simulated: Path
) -> None:
    done = federation.submitted("first")
    assert done.status == 0, done.err
    folder = federation.folder
    assert furthest(folder / "first" / "adapter", simulated / "adapter") <= 1e-5
    for name in "012":
        (kept,) = (folder / f"client-{name}-state" / "trainer" / "adapters").iterdir()
        assert furthest(folder / "first" / "adapter", kept) == 0.0
        settings = json.loads((kept / "adapter_config.json").read_text())
        assert (settings["peft_type"], settings["r"]) == ("LORA", 64)
    summary = json.loads((folder / "first" / "summary.json").read_text())
    assert (summary["adapter_kept_by"], summary["adapter_missed_by"]) == (["0", "1", "2"], {})
    assert "3 clients keep the final adapter" in done.err

    up, down = federation.traffic()
    sent = summary["bytes_down"] + summary["bytes_evaluated"] + summary["bytes_handed_out"]
    assert abs(up - summary["bytes_up"]) <= 0.1 * up
    assert abs(down - sent) <= 0.1 * down

    # Flower notices a moment later that its ServerApp has ended.
    until(lambda: status()["run"]["state"] == "completed", WAIT_SECONDS, "the run's end")
    told = status()
    assert {c["name"]: c["state"] for c in told["clients"]} == dict.fromkeys("012", "idle")
    run = told["run"]
    assert (run["round"], run["rounds"]) == (2, 2)
    assert run["bytes_up"] >= summary["bytes_up"]
    assert told["parts"]["superlink"]["ready"] and told["parts"]["gateway"]["ready"]

    checked = json.loads(call("doctor", "--server", "server.toml", "--json").out)
    assert checked["good"]
    checked = json.loads(call("doctor", "--client", "client-0.toml", "--json").out)
    found = {finding["subject"]: finding for finding in checked["findings"]}
    assert checked["good"] and "lets this client in" in found["server"]["text"]
    own, others = (folder / "KEYS" / "clients" / name / "node" for name in "01")
    kept = own.read_bytes()
    own.write_bytes(others.read_bytes())
    mistaken = json.loads(call("doctor", "--client", "client-0.toml", "--json").out)
    own.write_bytes(kept)
    assert not mistaken["good"] and "as this client's node key" in str(mistaken["findings"])
    assert "260 training examples" in found["data"]["text"]


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_killed_server_app_and_superlink_lose_no_finished_round(
    federation: Federation, simulated: Path
) -> None:
    """With --until-done the run ends as if nothing had happened."""
    words = [*federation.submit, *SMALL, "--until-done"]
    words[words.index("--out") + 1] = "killed"
    said = federation.folder / "said"
    with said.open("wb") as file:
        submit = subprocess.Popen(
            [FEDGRAFT, *words[1:]], cwd=federation.folder, stdout=file, stderr=file
        )
    try:
        progress = federation.folder / "killed" / "progress.jsonl"
        until(lambda: _sampled(progress, 1), WAIT_SECONDS, "round 1")
        (server_app,) = _server_apps(federation)
        server_app.kill()
        until(lambda: _sampled(progress, 2), WAIT_SECONDS, "round 2")
        psutil.Process(federation.parts()["superlink"]["pid"]).kill()
        assert submit.wait(WAIT_SECONDS) == 0, said.read_text()
    finally:
        submit.kill()
        submit.wait()
    text = said.read_text()
    assert "the ServerApp died; trying again after round 0" in text
    assert "trying again after round 1" in text
    killed = federation.folder / "killed"
    rounds = [json.loads(line) for line in (killed / "rounds.jsonl").read_text().splitlines()]
    assert [record["round"] for record in rounds] == [0, 1, 2]
    assert all(len(record["clients"]) == 3 for record in rounds[1:])
    assert furthest(killed / "adapter", simulated / "adapter") <= 1e-5


def _sampled(progress: Path, round: int) -> bool:
    mark = json.dumps({"event": "sampled", "round": round})[:-1]
    return progress.exists() and mark in progress.read_text()


def _server_apps(federation: Federation) -> list[psutil.Process]:
    superlink = psutil.Process(federation.parts()["superlink"]["pid"])
    return [
        child
        for child in superlink.children(recursive=True)
        if any("flwr-serverapp" in word for word in child.cmdline())
    ]
