"""A real federation on loopback: SuperLink, two clients with resident trainers, runs submitted.

One SuperLink without TLS and two `fedgraft client` processes serve all tests here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from command_line import FEDGRAFT

from fedgraft import flower
from fedgraft.adapter import digest
from fedgraft.config import RUN_CONFIG_KEY, Config
from fedgraft.files import read_tensors
from fedgraft.privacy.ledger import Ledger
from fedgraft.run_directory import OUT_KEY, RunDirectory
from simulations.simulate import simulate

pytestmark = pytest.mark.slow
CLIENTS = ("0", "1")
RUN = {
    "federation.clients": 2,
    "federation.min-clients": 1,
    "federation.rounds": 2,
    "federation.partition": "iid",
    "train.steps": 2,
    "train.batch-size": 8,
    "train.optimizer-state": "keep",
    "evaluate.clients": False,
    "model.device": "cpu",
    "threads": 1,
}


def until(check: Callable[[], bool], what: str, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)


@dataclass
class Federation:
    """What runs: a SuperLink and two clients, in one folder."""

    folder: Path
    environment: dict[str, str]

    def log(self, client: str) -> str:
        path = self.folder / f"state{client}" / "log" / "client.log"
        return path.read_text() if path.exists() else ""

    def policy(self, client: str, text: str) -> None:
        (self.folder / f"policy{client}.toml").write_text(text)

    def pid(self, client: str, part: str) -> int:
        parts = json.loads((self.folder / f"state{client}" / "parts.json").read_text())
        return int(parts[part]["pid"] or 0)

    def kept(self, client: str) -> Path:
        return self.folder / f"state{client}" / "trainer"

    def submit(self, name: str, config: Config) -> RunDirectory:
        """Hand a run to the SuperLink, as a bundle of one file."""
        run = RunDirectory.create(self.folder / name, config, lineage=f"lineage of {name}")
        keys = {RUN_CONFIG_KEY: config.to_json(), OUT_KEY: str(run.path)}
        app = self.folder / f"{name}-app"
        flower.write_app(app, keys, client_app="client.relay:app")
        done = subprocess.run(
            ["flwr", "run", str(app), flower.CONNECTION],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return run


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("f")
    port, mark = flower.free_port(), str(folder)
    ours = {"FEDGRAFT_TEST": mark, "OMP_NUM_THREADS": "1"}
    environment = flower.flower_environment(folder / "home") | ours
    environment["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = "0.05"
    flower.write_connection(folder / "home", port)
    superlink = [
        *("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)),
        "--disable-runtime-dependency-installation",
    ]
    made = Federation(folder, environment)
    for k in CLIENTS:
        made.policy(k, "")
        (folder / f"client{k}.toml").write_text(
            f'server = "127.0.0.1:{port}"\nname = "{k}"\n'
            f'state = "state{k}"\npolicy = "policy{k}.toml"\n'
            f"[data]\npartition = {k}\npartitions = 2\n"
            '[model]\ndevice = "cpu"\n'
        )
    with ExitStack() as stack:
        log = stack.enter_context((folder / "flower.log").open("a"))
        link = stack.enter_context(flower.started(superlink, log, folder / "home", environment))
        clients = []
        for k in CLIENTS:
            said = stack.enter_context((folder / f"client{k}.out").open("a"))
            command = [FEDGRAFT, "client", "--config", str(folder / f"client{k}.toml")]
            process = stack.enter_context(flower.started(command, said, folder, os.environ | ours))
            clients.append(process)
        flower.wait_for_port(port, link, folder / "flower.log")
        for k in CLIENTS:
            until(lambda k=k: "SuperNode ID" in made.log(k), f"client {k} connects")  # type: ignore[misc]
        yield made
        for process in clients:
            process.terminate()
        for process in clients:
            assert process.wait(60) == 0
    left = [p for p in psutil.process_iter() if _marked(p, mark)]
    assert left == []


def _marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get("FEDGRAFT_TEST") == mark
    except psutil.Error:
        return False


def finished(run: RunDirectory) -> RunDirectory:
    until(lambda: run.summary() is not None, f"the run in {run.path} ends")
    return run


def adapter(run: RunDirectory) -> str:
    return digest(read_tensors(run.adapter / "adapter_model.safetensors")[0])


def test_the_adapter_is_the_in_process_one_though_a_trainer_is_killed(
    federation: Federation, tmp_path: Path
) -> None:
    """It is bit for bit the same; the trainer comes back, and its round is not lost."""
    config = Config().with_overrides(RUN)
    run = federation.submit("plain", config)
    until(lambda: "train, round 1" in federation.log("0"), "client 0 trains")
    first = federation.pid("0", "trainer")
    os.kill(first, signal.SIGKILL)
    finished(run)
    records = run.rounds()
    assert [r.get("failed", {}) for r in records if r["round"]] == [{}, {}]
    assert federation.pid("0", "trainer") not in (first, 0)
    assert "trainer was killed by signal 9; starting it again" in federation.log("0")
    simulate(config, out=tmp_path / "here")
    assert adapter(run) == adapter(RunDirectory.open(tmp_path / "here"))
    for k in CLIENTS:
        assert len(list((federation.kept(k) / "personal").rglob("round-*"))) == 2
        assert not (federation.folder / f"state{k}" / "node" / "personal").exists()


def test_private_training_leaves_a_ledger_on_each_client_until_a_policy_ends_it(
    federation: Federation,
) -> None:
    """Client 1's policy has room for one more round of training, and is refused by name."""
    counted = federation.kept("1") / "rounds.json"
    begun = len(json.loads(counted.read_text())) if counted.exists() else 0
    federation.policy("1", f"rounds-per-day = {begun + 1}")
    private = {"privacy.mode": "example", "privacy.noise-multiplier": 1.0}
    reset = {"train.optimizer-state": "reset"}
    run = finished(federation.submit("private", Config().with_overrides(RUN | reset | private)))
    for k, rounds in (("0", [1, 2]), ("1", [1])):
        entries = Ledger(federation.kept(k) / "ledger.jsonl").entries
        assert [entry.round for entry in entries] == rounds
        assert {entry.run for entry in entries} == {"lineage of private"}
    summary = run.summary()
    assert summary is not None and summary["epsilon"] > 0
    # Who took part in a private round stands in no record; the server's log says it.
    refused = "Round 2, client 1: policy of client 1, rounds-per-day: "
    assert refused in run.log.read_text() and "Round 1, client" not in run.log.read_text()
    assert "WARNING refused: policy of client 1, rounds-per-day" in federation.log("1")


def test_a_second_client_on_the_same_state_is_refused(federation: Federation) -> None:
    done = subprocess.run(
        [FEDGRAFT, "client", "--config", str(federation.folder / "client0.toml")],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert done.returncode == 2 and "a client runs already on" in done.stderr
