"""A federation as its users start it: `fedgraft server`, `fedgraft client`, `fedgraft submit`.

Every process is a real one. What tests do to them is here: kill a named part, hold one, cut a
client off, look at what a run has come to.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from command_line import FEDGRAFT, events
from network_namespaces import SERVER, Hosts
from real_server import RealServer, real_server, write_server
from safetensors.torch import load_file
from waiting import until

from deploy.client_config import write_example
from deploy.keys import Keys
from deploy.server_config import ServerConfig

ROOT = Path(__file__).parents[2]
SERVER_PARTS = ("superlink", "gateway", "server-app")
CLIENT_PARTS = ("supernode", "trainer", "client-app")
SMALL: dict[str, Any] = {
    "federation.rounds": 3,
    "train.steps": 2,
    "train.batch-size": 8,
    "model.device": "cpu",
    "threads": 1,
    "evaluate.clients": False,
}
"""A run on the built-in digits whose clients train for a fraction of a second."""


def words(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as `--set` options."""
    return [
        word
        for key, value in settings.items()
        for word in ("--set", f"{key}={json.dumps(value) if isinstance(value, bool) else value}")
    ]


@dataclass
class Submitted:
    """A running `fedgraft submit`.

    Attributes:
        process: the command.
        out: the run directory.
        said: what it has printed.
    """

    process: subprocess.Popen[bytes]
    out: Path
    said: Path

    def sampled(self, round: int) -> bool:
        """Whether a round has begun."""
        return any(e["event"] == "sampled" and e["round"] == round for e in events(self.out))

    def rounds(self) -> list[dict[str, Any]]:
        """Return the records of the finished rounds, without the one before the first."""
        path = self.out / "rounds.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [record for record in map(json.loads, lines) if record["round"]]

    def until_round(self, round: int, seconds: float = 300.0) -> None:
        """Wait until a round has begun."""

        def begun() -> bool:
            assert self.process.poll() is None, self.said.read_text()
            return self.sampled(round)

        until(begun, seconds, f"round {round}")

    def done(self, seconds: float = 600.0) -> str:
        """Wait for its end, which must be a good one, and return what it has said."""
        try:
            assert self.process.wait(seconds) == 0, self.said.read_text()
        finally:
            self.end()
        return self.said.read_text()

    def end(self) -> None:
        """Kill the command; its run goes on."""
        self.process.kill()
        self.process.wait()


@dataclass
class RealFederation:
    """A server and its clients on this machine.

    Attributes:
        folder: where all their files are.
        server: the running server.
        on: the hosts that they run on; None for this one.
        clients: by name, the running `fedgraft client`.
    """

    folder: Path
    server: RealServer
    on: Hosts | None = None
    clients: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _submitted: list[Submitted] = field(default_factory=list)

    # Clients

    def config(self, name: str) -> Path:
        """Return a client's client.toml."""
        return self.folder / f"client-{name}.toml"

    def state(self, name: str) -> Path:
        """Return a client's state folder."""
        return self.folder / f"client-{name}-state"

    def policy(self, name: str, text: str) -> None:
        """Replace a client's policy; the next request is judged by it."""
        (self.folder / f"client-{name}-policy.toml").write_text(text)

    def log(self, name: str) -> str:
        """Return a client's log as it is now."""
        path = self.state(name) / "log" / "client.log"
        return path.read_text() if path.exists() else ""

    def _start(self, host: str, words: Sequence[str], said: Path) -> subprocess.Popen[bytes]:
        """Start a command of FedGraft on a host, what it prints going into a file."""
        with said.open("ab") as file:
            return subprocess.Popen(
                [*self._within(host), FEDGRAFT, *words],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def _within(self, host: str) -> list[str]:
        return [] if self.on is None else self.on.within(host)

    def start_client(self, name: str, wait: bool = True) -> None:
        """Start a client, by default until its SuperNode is connected."""
        before = self.log(name).count("SuperNode ID")
        command = ["client", "--config", str(self.config(name))]
        self.clients[name] = self._start(name, command, self.folder / f"client-{name}.out")
        if wait:
            self.wait_for(name, before + 1)

    def wait_for(self, name: str, times: int = 1, seconds: float = 180.0) -> None:
        """Wait until a client has connected so many times."""
        until(
            lambda: self.log(name).count("SuperNode ID") >= times,
            seconds,
            f"connection {times} of client {name}",
        )

    def stop_client(self, name: str) -> int:
        """Stop a client in order and return its exit status."""
        process = self.clients.pop(name)
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(60)
        finally:
            process.kill()

    def crash_client(self, name: str) -> None:
        """Kill all processes of a client at once, as the loss of power does."""
        process = self.clients.pop(name)
        family = psutil.Process(process.pid).children(recursive=True)
        for one in (psutil.Process(process.pid), *family):
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        psutil.wait_procs(family, timeout=30)

    # Parts

    def pid(self, part: str, client: str = "") -> int | None:
        """Return the process id of a part, or None where it does not run just now.

        Args:
            part: one of `SERVER_PARTS`, or of `CLIENT_PARTS` with a client's name.
            client: whose.
        """
        if part == "server-app":
            return self._below(self.pid("superlink"), "flwr-serverapp")
        if part == "client-app":
            return self._below(self.pid("supernode", client), "flwr-clientapp")
        path = self.state(client) / "parts.json" if client else self.server.config.parts
        with suppress(OSError, ValueError, KeyError):
            return json.loads(path.read_text())[part]["pid"] or None
        return None

    def _below(self, pid: int | None, word: str) -> int | None:
        with suppress(psutil.Error):
            for one in psutil.Process(pid).children(recursive=True) if pid else ():
                if any(word in said for said in one.cmdline()) and one.status() != "zombie":
                    return one.pid
        return None

    def kill(self, part: str, client: str = "", number: int = signal.SIGKILL) -> int:
        """Send a part a signal as soon as it runs; return the process id that it had."""

        def struck() -> int | None:
            pid = self.pid(part, client)
            with suppress(ProcessLookupError):
                if pid is not None:
                    os.kill(pid, number)
                    return pid
            return None

        return int(until(struck, 120.0, f"{part} of {client or 'the server'}"))

    # Runs

    def submit(
        self,
        out: str,
        settings: Mapping[str, Any] | None = None,
        *more: str,
        config: Path | None = None,
    ) -> Submitted:
        """Start `fedgraft submit` with settings and options on top of a config file or `SMALL`."""
        clients = {"federation.clients": len(self.server.keys.invited())}
        asked = ({} if config else SMALL) | clients | (settings or {})
        file = [] if config is None else [str(config)]
        return self._submit(self.folder / out, [*file, "--out", out, *words(asked), *more])

    def resume(self, out: Path, *more: str) -> Submitted:
        """Start `fedgraft submit --resume` on a run directory."""
        return self._submit(out, ["--resume", str(out), *more])

    def _submit(self, out: Path, options: Sequence[str]) -> Submitted:
        said = self.folder / f"{out.name}.said"
        command = ["submit", "--to", str(self.server.path), *options]
        process = self._start(SERVER, command, said)
        self._submitted.append(Submitted(process, out, said))
        return self._submitted[-1]

    def close(self) -> None:
        """Stop all clients and submissions, in order."""
        for one in self._submitted:
            one.end()
        for process in self.clients.values():
            process.send_signal(signal.SIGTERM)
        for process in self.clients.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()  # its leash ends the rest
            process.wait()


def write_federation(folder: Path, names: Sequence[str], address: str = "") -> Path:
    """Write keys, server.toml and a client.toml for each name; return server.toml.

    Args:
        folder: where; of a short path, since sockets' paths may not be long.
        names: of the clients, which hold one partition of the digits each.
        address: that the server listens on and clients reach; loopback by default.
    """
    path = write_server(folder, tuple(names))
    keys = Keys(folder / "KEYS")
    if address:
        keys.renew_server(["localhost", address])
        path.write_text(path.read_text().replace('"127.0.0.1:', f'"{address}:'))
    for index, name in enumerate(names):
        write_example(
            folder / f"client-{name}.toml",
            keys.client_folder(name),
            server=ServerConfig.load(path).listen,
            partition=index,
            partitions=len(names),
        )
    return path


@contextmanager
def real_federation(
    folder: Path, names: Sequence[str] = ("0", "1", "2"), on: Hosts | None = None
) -> Iterator[RealFederation]:
    """Run a server with its clients for as long as the block lasts.

    Args:
        folder: where all files go.
        names: who is invited and started.
        on: hosts of these names; all on this one by default.
    """
    path = write_federation(folder, names, "" if on is None else on.address)
    with real_server(path, () if on is None else on.within(SERVER)) as server:
        made = RealFederation(folder, server, on)
        try:
            for name in names:
                made.start_client(name, wait=False)
            for name in names:
                made.wait_for(name)
            yield made
        finally:
            made.close()


def furthest(one: Path, other: Path) -> float:
    """Return the largest difference between two adapter folders' entries."""
    a, b = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def pause(seconds: float) -> None:
    """Let a drawn moment pass: the one wait that waits for nothing."""
    time.sleep(seconds)
