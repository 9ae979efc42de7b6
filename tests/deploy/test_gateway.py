"""The gateway by itself: its limits, and that any user may run it."""

from __future__ import annotations

import base64
import json
import os
import pwd
import shlex
import shutil
import socket
import ssl
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from real_server import need_nginx, write_server
from waiting import until

from deploy import gateway, server
from deploy.admission import digest
from deploy.keys import Keys
from deploy.merged_log import MergedLog
from deploy.server_config import ServerConfig
from deploy.supervisor import Supervisor
from fedgraft.errors import ConfigError, RunError


@contextmanager
def alone(config: ServerConfig, *before: str) -> Iterator[None]:
    """A gateway without a SuperLink behind it, perhaps with words before its command."""
    part = gateway.gateway(config)
    if before:
        part = replace(part, command=[*before, shlex.join(part.command) + " 2>&1 | cat"])
    ready = threading.Event()
    one = Supervisor([part], MergedLog(config.log), config.parts)
    thread = threading.Thread(target=one.run, args=(ready.set,))
    thread.start()
    try:
        assert ready.wait(20), config.log.read_text()
        yield
    finally:
        one.stop()
        thread.join(20)


def tls(keys: Keys, name: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(keys.folder / "ca.crt"))
    folder = keys.client_folder(name)
    context.load_cert_chain(folder / "client.crt", folder / "client.key")
    return context


def test_more_requests_and_connections_than_a_client_may_make(tmp_path: Path):
    need_nginx()
    path = write_server(tmp_path, ("alice",), requests_per_second=4, connections=12)
    config = ServerConfig.load(path)
    keys = Keys(config.keys)
    gateway.write_config(config, keys)
    key = base64.b64encode(keys.invited()["alice"].public_key).decode()
    head = ("POST /v1/fleet/x HTTP/1.1", "Host: x", f"flwr-public-key: {key}", "Content-Length: 0")
    request = "\r\n".join((*head, "", ""))
    with alone(config), ExitStack() as links:
        for _ in range(30):  # 4 at once, 16 wait their turn; of 30 some are too many in either case
            plain = socket.create_connection(("127.0.0.1", config.port))
            link = tls(keys, "alice").wrap_socket(plain, server_hostname="localhost")
            links.callback(link.close)
            link.sendall(request.encode())
        until(lambda: config.log.read_text().count("refused 503") >= 5)
        assert "of client alice" in config.log.read_text().split("refused 503")[1]


def test_its_lists_are_read_anew_or_somebody_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    need_nginx()
    config = ServerConfig.load(write_server(tmp_path, ("alice",)))
    keys = Keys(config.keys)
    gateway.reload(config)  # nothing runs, nothing to do
    gateway.write_config(config, keys)
    with alone(config):
        pid = gateway.running_gateway(config)
        assert pid is not None
        before = {one.pid for one in psutil.Process(pid).children()}
        gateway.reload(config)
        accepting = [one for one in psutil.Process(pid).children() if gateway._accepts(one)]
        assert accepting and not before & {one.pid for one in accepting}
        (gateway.folder_of(config) / "nodes.conf").write_text("nonsense")
        monkeypatch.setattr(gateway, "_RELOAD_SECONDS", 0.3)
        with pytest.raises(RunError, match="did not read who is invited anew"):
            gateway.reload(config)
        assert "unexpected end of file" in config.log.read_text()
    with pytest.raises(ConfigError, match=r"nginx refuses its configuration: .*superlink-port"):
        broken = config.model_copy(update={"superlink_port": "superlink-port"})
        gateway.write_config(broken, keys)


def test_a_large_access_log_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    need_nginx()
    config = ServerConfig.load(write_server(tmp_path, ("alice",)))
    keys = Keys(config.keys)
    gateway.write_config(config, keys)

    def ask(path: str) -> None:
        plain = socket.create_connection(("127.0.0.1", config.port))
        with tls(keys, "alice").wrap_socket(plain, server_hostname="localhost") as link:
            link.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert link.recv(12) == b"HTTP/1.1 403"

    with alone(config):
        house = server._Housekeeping(config, keys, MergedLog(config.log), digest(keys))
        ask("/one")
        until(config.access_log.read_text)
        house._put_aside()
        assert "/one" in config.access_log.read_text()  # small yet
        monkeypatch.setattr(server, "_ACCESS_LOG_BYTES", 1)
        for path in ("/two", "/three"):
            house._put_aside()
            ask(path)
            until(config.access_log.read_text)
        found = [config.access_log, *(server._numbered(config.access_log, n) for n in (1, 2))]
        requests = [json.loads(path.read_text())["request"].split()[1] for path in found]
        assert requests == ["/three", "/two", "/one"]


def test_a_user_who_is_not_root_may_run_it(monkeypatch: pytest.MonkeyPatch):
    need_nginx()
    if os.geteuid() != 0:
        pytest.skip("the other tests have shown it")
    nobody = pwd.getpwnam("nobody").pw_uid
    folder = Path(tempfile.mkdtemp())  # where pytest's own are, no other user may look
    try:
        folder.chmod(0o755)
        config = ServerConfig.load(write_server(folder, ("alice",)))
        with monkeypatch.context() as patch:
            patch.setattr(os, "geteuid", lambda: nobody)
            gateway.write_config(config, Keys(config.keys))
        for path in (folder, *folder.rglob("*")):
            os.chown(path, nobody, -1)
        with alone(config, "setpriv", f"--reuid={nobody}", "--clear-groups", "sh", "-c"):
            shell = psutil.Process(gateway.running_gateway(config))
            family = [shell, *shell.children(recursive=True)]
            assert {one.uids().real for one in family} == {nobody} and len(family) >= 4
        assert "alert" not in config.log.read_text() and "emerg" not in config.log.read_text()
    finally:
        shutil.rmtree(folder)
