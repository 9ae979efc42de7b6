"""A real federation on loopback: SuperLink, two clients with resident trainers, runs submitted.

One SuperLink without TLS and two `fedgraft client` processes serve all tests here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from command_line import FEDGRAFT
from flwr.app import Context, Message, MessageType, RecordDict, UserConfig
from waiting import until

from client import relay
from client.resident.protocol import CLIENT, SOCKET
from fedgraft import flower
from fedgraft.adapter import digest, to_arrays
from fedgraft.config import RUN_CONFIG_KEY, Config
from fedgraft.errors import NO_MEMORY
from fedgraft.files import read_tensors
from fedgraft.messages import Reply, TrainRequest
from fedgraft.privacy.accounting import epsilon
from fedgraft.privacy.events import Release
from fedgraft.privacy.figures import rounded_up
from fedgraft.privacy.ledger import Ledger
from fedgraft.resident_model import resident_model, resident_task
from fedgraft.run_directory import OUT_KEY, RunDirectory
from server.report_sections import incidents
from server.results import read_results
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


HUNGRY = """
import torch

from fedgraft.tasks.digits import Digits


class Hungry(Digits):
    name = "hungry"

    def train(self, index):
        return torch.empty(1 << 60)
"""


def write_plugin(folder: Path) -> Path:
    """Write a package with a task that runs out of memory, as an installed one lies on the path."""
    info = folder / "hungry-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "hungry.py").write_text(HUNGRY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hungry\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fedgraft.tasks]\nhungry = hungry:Hungry\n")
    return folder


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
    plugin = str(write_plugin(folder / "plugin"))
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
            path = os.pathsep.join([plugin, os.environ.get("PYTHONPATH", "")])
            its = os.environ | ours | {"PYTHONPATH": path}
            process = stack.enter_context(flower.started(command, said, folder, its))
            clients.append(process)
        flower.wait_for_port(port, link, folder / "flower.log")
        for k in CLIENTS:
            until(lambda k=k: "SuperNode ID" in made.log(k), 300.0, f"client {k} connects")  # type: ignore[misc]
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
    until(lambda: run.summary() is not None, 300.0, f"the run in {run.path} ends")
    return run


def adapter(run: RunDirectory) -> str:
    return digest(read_tensors(run.adapter / "adapter_model.safetensors")[0])


def test_the_adapter_is_the_in_process_one_though_a_trainer_is_killed(
    federation: Federation, tmp_path: Path
) -> None:
    """It is bit for bit the same; the trainer comes back, and its round is not lost."""
    config = Config().with_overrides(RUN)
    run = federation.submit("plain", config)
    until(lambda: "train, round 1" in federation.log("0"), 300.0, "client 0 trains")
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


PRIVATE = {
    "privacy.mode": "example",
    "privacy.noise-multiplier": 1.0,
    "train.optimizer-state": "reset",
}


def spent(rounds: int) -> float:
    """What so many rounds cost either client: two batches of 8 in 390 examples, noise 1."""
    return epsilon([Release((1.0,), 8 / 390, 2)] * rounds, 1e-5)


def test_privacy_is_paid_over_all_runs_until_a_clients_policy_ends_it(
    federation: Federation,
) -> None:
    """Three rounds in two runs; client 1's policy has room for two, and it says why not more."""
    lifetime = (spent(2) + spent(3)) / 2
    federation.policy("1", f"lifetime-epsilon = {lifetime}")
    runs = []
    for name, rounds in (("one", 1), ("two", 2)):
        config = Config().with_overrides(RUN | PRIVATE | {"federation.rounds": rounds})
        runs.append(finished(federation.submit(name, config)))
    for k, paid in (("0", [("one", 1), ("two", 1), ("two", 2)]), ("1", [("one", 1), ("two", 1)])):
        entries = Ledger(federation.kept(k) / "ledger.jsonl").entries
        assert [(entry.run, entry.round) for entry in entries] == [
            (f"lineage of {name}", round) for name, round in paid
        ]
    for run, total in zip(runs, (spent(1), spent(3)), strict=True):
        summary, card = run.summary(), (run.adapter / "README.md").read_text()
        assert summary is not None and summary["epsilon"] == pytest.approx(total, rel=1e-9)
        assert f"| differential privacy | epsilon {rounded_up(total)} at delta 1e-05" in card
        assert "A study" not in card
    assert summary["client_epsilon"] == {
        "0": {"epsilon": pytest.approx(spent(3))},
        "1": {
            "epsilon": pytest.approx(spent(2)),
            "epsilon-left": pytest.approx(lifetime - spent(2)),
        },
    }
    refusal = "policy of client 1, lifetime-epsilon: this round would bring epsilon to"
    (row,) = incidents(read_results([run.path]))
    assert row.client == "1" and row.reason.startswith(refusal)
    # In which rounds it took part stands in no record; the server's log says it.
    assert all(not record["failed"] and not record["clients"] for record in run.rounds())
    assert f"Round 2, client 1: {refusal}" in run.log.read_text()
    assert "Round 1, client" not in run.log.read_text()
    assert "WARNING refused: policy of client 1, lifetime-epsilon" in federation.log("1")


@pytest.fixture
def to_client_0(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the relay here lead to the first client's trainer, under a policy that allows all."""
    federation.policy("0", "")
    monkeypatch.setenv(SOCKET, str(federation.folder / "state0" / "socket" / "trainer.sock"))
    monkeypatch.setenv(CLIENT, "0")


def test_memory_that_runs_out_is_said_and_a_fresh_trainer_serves_the_next_message(
    federation: Federation, to_client_0: None
) -> None:
    """The hungry task asks torch for more than any machine has, which fills nothing."""
    config = Config().with_overrides(RUN)
    start = resident_model(resident_task(config), config).initial_adapter(0).tensors()
    content = TrainRequest(round=1, arrays=to_arrays(start)).encode()
    first = federation.pid("0", "trainer")
    hungry = config.with_overrides({"task.name": "hungry"})
    assert asked(hungry, content).refusal == f"{NO_MEMORY} on this client"
    said = "trainer ended with exit status 75; starting it again"
    until(lambda: said in federation.log("0"), 300.0, "the trainer ends")
    reply = asked(config, content)  # waits until the new one is there
    assert reply.arrays is not None, reply.refusal
    assert federation.pid("0", "trainer") != first
    assert "out of memory: " in federation.log("0")


def test_a_client_whose_starter_of_apps_is_killed_takes_part(federation: Federation) -> None:
    """Nothing but its SuperNode could see that it has gone."""
    for k in CLIENTS:
        federation.policy(k, "")
    node = psutil.Process(federation.pid("0", "supernode"))
    (starter,) = (one for one in node.children() if "deploy.superexec" in one.cmdline())
    starter.kill()
    config = Config().with_overrides(RUN | {"federation.rounds": 1, "federation.min-clients": 2})
    run = finished(federation.submit("starter", config))
    assert run.rounds()[-1]["clients"].keys() == {"0", "1"}
    assert "The SuperExec has ended (status -9); starting it again" in federation.log("0")


def test_a_client_on_another_base_is_refused(federation: Federation, to_client_0: None) -> None:
    """By the client itself, and by its policy where the server's is not on the list."""
    config = Config().with_overrides(RUN)
    model = resident_model(resident_task(config), config)
    start = to_arrays(model.initial_adapter(0).tensors())

    def reply(base_hash: str) -> Reply:
        content = TrainRequest(round=1, arrays=start, base_hash=base_hash).encode()
        return asked(config, content)

    other = "0" * 64
    refused = reply(other)
    said = f"this client's base {model.base_hash[:12]} is not the server's {other[:12]}"
    assert said in refused.refusal and refused.arrays is None
    federation.policy("0", f'bases = ["{other}"]')
    refused = reply(model.base_hash)
    said = f"policy of client 0, bases: the base {model.base_hash[:12]} is not on its list"
    assert said in refused.refusal and refused.arrays is None
    federation.policy("0", f'bases = ["{model.base_hash}"]')
    assert reply(model.base_hash).arrays is not None


def asked(config: Config, content: RecordDict) -> Reply:
    """Let the relay ask a client's trainer to train, as in one of Flower's processes."""
    flower.set_identity(7)
    message = Message(content, 2, MessageType.TRAIN)
    flower.set_message_id(message, "m")
    run_config: UserConfig = {RUN_CONFIG_KEY: config.to_json()}
    reply = relay.app(message, Context(7, 2, {}, RecordDict(), run_config))
    return Reply.decode(reply.content)


def test_a_second_client_on_the_same_state_is_refused(federation: Federation) -> None:
    done = subprocess.run(
        [FEDGRAFT, "client", "--config", str(federation.folder / "client0.toml")],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert done.returncode == 2 and "a client runs already on" in done.stderr
