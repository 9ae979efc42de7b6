"""A federation of FedGraft's own on loopback: `fedgraft server`, and `fedgraft client` for each.

Gateway, TLS, client certificates and node keys are on, as `docs/deployment.md` sets them up.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import tomli_w

from deploy.server_config import ServerConfig
from deploy.submission import CLIENT_APP, Submission, prepare
from fedgraft.config import Config
from fedgraft.flower import free_port, started
from server.progress import FINISHED, SAMPLED, ProgressReader

FEDGRAFT = Path(sys.executable).with_name("fedgraft")
RELAY, RELOADING = CLIENT_APP, "deployment_apps:reloading_client"
"""What the SuperNodes start for a message."""
_POLL_SECONDS = 0.02


def python_path() -> str:
    """The path on which processes find the benchmark's apps."""
    given = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join([str(Path(__file__).parent), *filter(None, given.split(os.pathsep))])


def make_keys(folder: Path, clients: int) -> Path:
    """Make the keys of a federation whose clients are called "0", "1", ..., if not there yet."""
    commands = [["init", "--dir", str(folder), "--host", "localhost"]]
    commands += [["client", str(k), "--dir", str(folder)] for k in range(clients)]
    if not folder.exists():
        for words in commands:
            command = [str(FEDGRAFT), "keys", *words]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


@dataclass(frozen=True)
class Round:
    """One round's cost.

    Attributes:
        whole: seconds from its start to the next one's.
        training: seconds of local training, of the client that took longest.
    """

    whole: float
    training: float

    @property
    def rest(self) -> float:
        return self.whole - self.training


@dataclass(frozen=True)
class Federation:
    """A server and its clients, running.

    Attributes:
        folder: where all of it lies; short, since sockets' paths may not be long.
        server: the server's settings.
    """

    folder: Path
    server: ServerConfig

    def rounds(self, config: Config, name: str, client_app: str = RELAY) -> list[Round]:
        """Submit a run; return its rounds but the last, whose end nothing marks."""
        directory = prepare(config, self.folder / name)
        submission = Submission(self.server, config, directory, _quiet, client_app)
        starts, done = [], threading.Event()

        def follow() -> None:
            reader = ProgressReader(directory.progress)
            while not done.wait(_POLL_SECONDS):
                for event in reader.events():
                    if event["event"] == SAMPLED:
                        starts.append(time.monotonic())
                    elif event["event"] == FINISHED:
                        return

        watch = threading.Thread(target=follow)
        watch.start()
        try:
            submission.run()
        finally:
            done.set()
            watch.join()
        records = {record["round"]: record for record in directory.rounds()}
        return [
            Round(after - before, _training(records[number]))
            for number, (before, after) in enumerate(pairwise(starts), 1)
        ]


def _training(record: Mapping[str, Any]) -> float:
    return max(float(one["seconds"]) for one in record["clients"].values())


def _quiet(line: str) -> None:
    pass


@contextmanager
def federation(folder: Path, clients: int, own: Mapping[str, Any]) -> Iterator[Federation]:
    """Run a server and its clients for as long as the block lasts.

    Args:
        folder: a new one.
        clients: how many; the k-th is called str(k) and holds that partition of the data.
        own: what every client.toml says of `data` and `model` beside the partition.
    """
    folder.mkdir(exist_ok=True)
    make_keys(folder / "keys", clients)
    ports = free_port(), free_port()
    server = folder / "server.toml"
    settings = {"keys": "keys", "state": "server", "listen": f"127.0.0.1:{ports[0]}"}
    server.write_text(tomli_w.dumps({**settings, "superlink-port": ports[1]}))
    (folder / "policy.toml").write_text("")
    environment = os.environ | {"PYTHONPATH": python_path()}
    with ExitStack() as stack:
        out = stack.enter_context((folder / "screen.log").open("w"))

        def run(*words: str) -> None:
            stack.enter_context(started([str(FEDGRAFT), *words], out, folder, environment))

        run("server", "--config", str(server), "--quiet")
        for k in range(clients):
            mine = {
                "server": f"localhost:{ports[0]}",
                "keys": f"keys/clients/{k}",
                "policy": "policy.toml",
                "state": f"c{k}",
                "data": {"partition": k, "partitions": clients, **own.get("data", {})},
                "model": {"device": "cpu", **own.get("model", {})},
            }
            (folder / f"{k}.toml").write_text(tomli_w.dumps(mine))
            run("client", "--config", f"{k}.toml")
        yield Federation(folder, ServerConfig.load(server))
