"""A server and many clients on one machine, as a user starts them, and a link that can be cut."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from leaks import MARK, Look, kind_of, look, marked, on_disk, rows

from deploy import client_config, server_config
from deploy.keys import Keys
from deploy.server_config import ServerConfig
from deploy.status import status
from fedgraft.flower import free_port

ROOT = Path(__file__).parents[1]
START_SECONDS, _END_SECONDS = 300.0, 90.0
_AT_ONCE = 4  # clients that are started side by side: each takes 7 s of a core


class Link:
    """A way from a loopback port to another one that can be cut and mended.

    Cut, it keeps connections open and passes nothing on, like a cable that was pulled out.
    """

    def __init__(self, to: int) -> None:
        self.port = free_port()
        self._to = to
        self._loop = asyncio.new_event_loop()
        self._whole = asyncio.Event()
        self._whole.set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Let nothing pass from now on."""
        self._loop.call_soon_threadsafe(self._whole.clear)

    def mend(self) -> None:
        """Let everything pass again."""
        self._loop.call_soon_threadsafe(self._whole.set)

    @property
    def whole(self) -> bool:
        """Whether it is not cut."""
        return self._whole.is_set()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._joined, "127.0.0.1", self.port)
        await server.serve_forever()

    async def _joined(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._whole.wait()
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pass_on(reader, back), self._pass_on(there, writer))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                await self._whole.wait()
                writer.write(data)
                await writer.drain()
        writer.close()


def until(check: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait until a check gives something true, and return that.

    Raises:
        TimeoutError: it does not, in so many seconds.
    """
    end = time.monotonic() + seconds
    while not (found := check()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not happen in {seconds:g} s")
        time.sleep(0.1)
    return found


@dataclass
class Federation:
    """A server and its clients, running in one folder.

    Attributes:
        folder: of everything.
        config: the server's.
        link: what the last client reaches the gateway by.
        mark: in the environment of all processes.
        server: the server's process.
        clients: the clients' processes, by name.
    """

    folder: Path
    config: ServerConfig
    link: Link
    mark: str
    server: subprocess.Popen[bytes]
    clients: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """Return the environment of all that is started."""
        return environment(self.folder, self.mark)

    def state(self, client: str) -> Path:
        """Return a client's state folder."""
        return self.folder / f"c{client}-state"

    def part(self, owner: str, name: str) -> int | None:
        """Return the process of a part of the server's ("") or of a client's, if it runs."""
        path = self.config.parts if not owner else self.state(owner) / "parts.json"
        found = _read(path).get(name, {})
        return found.get("pid") if found.get("ready") else None

    def ready(self) -> bool:
        """Whether every part of everybody answers."""
        parts = [("", "superlink"), ("", "gateway")]
        parts += [(name, part) for name in self.clients for part in ("trainer", "supernode")]
        return all(self.part(owner, name) is not None for owner, name in parts)

    def apps(self, kind: str) -> list[int]:
        """Return the processes of a kind that come and go."""
        return [pid for pid in marked(self.mark) if kind_at(pid) == kind]

    def online(self) -> int:
        """Return how many clients the server has heard of lately."""
        told = status(self.config).clients
        return sum(one.state in ("idle", "training") for one in told)

    def unfinished(self) -> int:
        """Return how many runs the SuperLink takes for running, or else has not cleared away."""
        status(self.config)  # it notices when it is asked
        database = f"file:{self.config.state / 'superlink.db'}?mode=ro"
        with closing(sqlite3.connect(database, uri=True)) as connection:
            query = "select count(*) from task where finished_at is null"
            return int(connection.execute(query).fetchone()[0])

    def look(self) -> Look:
        """Count everything, at rest."""
        roots = [self.server.pid, *(one.pid for one in self.clients.values())]
        database = self.config.state / "superlink.db"
        half_written = sum(1 for _ in self.folder.glob("**/.*.tmp"))
        counts = {
            "messages and objects": rows(database, ("message_", "object", "run_objects")),
            "temporary files": on_disk(self.folder / "tmp")[0] + half_written,
        }
        sizes = {}
        for name, pattern in PLACES.items():
            counts[name], sizes[name] = on_disk(self.folder, pattern)
        return look(self.mark, roots, counts, sizes)


PLACES = {
    "server: database": "server-state/superlink.db*",
    "server: logs": "server-state/log/*",
    "server: Flower's bundles": "server-state/flower/**/*",
    "clients: logs": "c*-state/log/*",
    "clients: Flower's bundles": "c*-state/node/**/*",
    "clients: kept by trainers": "c*-state/trainer/**/*",
    "run directory": "run/**/*",
}
"""What lies on disk, as patterns below the federation's folder."""


def environment(folder: Path, mark: str) -> dict[str, str]:
    """Return the environment of all that is started."""
    ours = {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
    return os.environ | ours | {MARK: mark}


@contextmanager
def federation(folder: Path, clients: int) -> Iterator[Federation]:
    """Run a server and clients for as long as the block lasts.

    Raises:
        TimeoutError: one of them does not get ready.
    """
    names = [str(k) for k in range(clients)]
    (folder / "tmp").mkdir()
    keys = Keys.create(folder / "KEYS", ["localhost"])
    for name in names:
        keys.invite(name)
    path = folder / "server.toml"
    server_config.write_example(path, folder / "KEYS")
    _replace(path, {"9443": str(free_port()), "8000": str(free_port())})
    config = ServerConfig.load(path)
    link, mark = Link(config.port), uuid.uuid4().hex
    with ExitStack() as stack:
        said = stack.enter_context((folder / "said").open("ab"))

        def start(*words: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                [sys.executable, "-m", "fedgraft", *words],
                cwd=folder,
                env=environment(folder, mark),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
            stack.callback(process.kill)  # its leash ends the rest
            return process

        made = Federation(
            folder, config, link, mark, start("server", "--config", str(path), "--quiet")
        )
        log = config.log
        ready = "the server is ready"
        until(lambda: log.exists() and ready in log.read_text(), START_SECONDS, ready)
        for first in range(0, clients, _AT_ONCE):
            for name in names[first : first + _AT_ONCE]:
                port = link.port if name == names[-1] else config.port
                file = folder / f"c{name}.toml"
                client_config.write_example(
                    file,
                    keys.client_folder(name),
                    server=f"localhost:{port}",
                    partition=int(name),
                    partitions=clients,
                )
                made.clients[name] = start("client", "--config", str(file))
            until(made.ready, START_SECONDS, "the start of the clients")
        yield made


def stop(made: Federation) -> list[str]:
    """Stop everything as an operator does; return what is left then, a line each."""
    everybody = [*made.clients.values(), made.server]
    for process in everybody:
        process.send_signal(signal.SIGTERM)
    left = []
    for process in everybody:
        try:
            if code := process.wait(_END_SECONDS):
                left.append(f"{process.args!r} ended with exit status {code}")
        except subprocess.TimeoutExpired:
            left.append(f"{process.args!r} does not stop")
    left += [f"process {pid} ({kind_at(pid)}) is left over" for pid in sorted(marked(made.mark))]
    for port in (made.config.port, made.config.superlink_port):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            left.append(f"something listens on port {port} still")
    left += [
        f"{path.relative_to(made.folder)} is left over"
        for pattern in ("*-state/parts.json", "*-state/node/**/*.sock", "tmp/*")
        for path in made.folder.glob(pattern)
        if not path.name.startswith("torchinductor_")  # torch's cache, one for all
    ]
    return left


def kind_at(pid: int) -> str:
    """Return what a process is called; "" where there is none."""
    with suppress(psutil.Error):
        return kind_of(psutil.Process(pid).cmdline())
    return ""


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    return {}


def _replace(path: Path, words: dict[str, str]) -> None:
    text = path.read_text()
    for old, new in words.items():
        text = text.replace(old, new)
    path.write_text(text)
