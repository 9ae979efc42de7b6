"""A server as a user starts it, and clients that speak to its gateway."""

from __future__ import annotations

import http.client
import json
import os
import signal
import ssl
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import FEDGRAFT
from flwr.supernode.cli.flower_supernode import load_ssh_private_key
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from waiting import until

from deploy.gateway import find_nginx
from deploy.keys import Keys
from deploy.server_config import ServerConfig, write_example
from fedgraft.errors import ConfigError
from fedgraft.flower import free_port


def need_nginx() -> None:
    """Skip the test where there is no nginx."""
    try:
        find_nginx()
    except ConfigError as error:
        pytest.skip(f"{error.message}. {error.remedy}")


def write_server(folder: Path, clients: tuple[str, ...] = (), **limits: int) -> Path:
    """Write keys and a server.toml with free ports; return the latter."""
    keys = Keys.create(folder / "KEYS", ["localhost"])
    for name in clients:
        keys.invite(name)
    path = folder / "server.toml"
    write_example(path, folder / "KEYS")
    text = path.read_text().replace("9443", str(free_port())).replace("8000", str(free_port()))
    for name, value in limits.items():
        key = name.replace("_", "-")
        text = "\n".join(
            f"{key} = {value}" if line.startswith(f"{key} =") else line
            for line in text.splitlines()
        )
    path.write_text(text)
    return path


@dataclass
class RealServer:
    """A running `fedgraft server`."""

    path: Path
    config: ServerConfig
    keys: Keys
    process: subprocess.Popen[str]

    def log(self) -> str:
        """Return the readable log as it is now."""
        return self.config.log.read_text()

    def parts(self) -> dict[str, Any]:
        """Return what parts.json says."""
        found: dict[str, Any] = json.loads(self.config.parts.read_text())
        return found

    def family(self) -> list[int]:
        """Return the ids of all its processes."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [self.process.pid, *(one.pid for one in children)]

    @contextmanager
    def logging(self, line: str) -> Iterator[None]:
        """Expect a new line in the log that holds a text, and no line of the SuperLink's."""
        before = len(self.log())
        yield
        until(lambda: line in self.log()[before:], what=f"the log line {line!r}")
        new = self.log()[before:]
        assert "superlink" not in new, new

    def tls(self, name: str | None) -> ssl.SSLContext:
        """Return a context that trusts the CA and, with a name, presents that certificate."""
        context = ssl.create_default_context(cafile=str(self.keys.folder / "ca.crt"))
        if name is not None:
            folder = self.keys.client_folder(name)
            context.load_cert_chain(folder / "client.crt", folder / "client.key")
        return context

    def ask(
        self,
        method: str,
        path: str,
        context: ssl.SSLContext,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> int:
        """Send one request to the gateway and return the status."""
        link = http.client.HTTPSConnection("localhost", self.config.port, context=context)
        try:
            link.request(method, path, body, headers or {})
            return link.getresponse().status
        finally:
            link.close()

    def fleet(self, node: str, certificate: str | None = None, port: int = 0) -> FleetHttpClient:
        """Return Flower's own client, as a SuperNode with a node key and a certificate."""
        text = (self.keys.client_folder(node) / "node").read_bytes()
        private = load_ssh_private_key(text, None)
        return FleetHttpClient(
            f"https://localhost:{port or self.config.port}",
            interceptors=[NodeAuthHttpInterceptor(private, private.public_key())],
            verify=self.tls(certificate or node),
        )


@contextmanager
def real_server(path: Path, within: Sequence[str] = ()) -> Iterator[RealServer]:
    """Run `fedgraft server --config PATH` for as long as the block lasts.

    Args:
        path: server.toml.
        within: what starts the command: `ip netns exec NAME`, say.
    """
    need_nginx()
    config = ServerConfig.load(path)
    process = subprocess.Popen(
        [*within, FEDGRAFT, "server", "--config", str(path), "--quiet"],
        cwd=path.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        text=True,
        start_new_session=True,
    )
    server = RealServer(path, config, Keys(config.keys), process)

    def ready() -> bool:
        assert process.poll() is None, process.communicate()
        return config.log.exists() and "the server is ready" in server.log()

    try:
        until(ready, 180.0, "the server's start")
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=90)
        finally:
            process.kill()  # its leash ends the rest
