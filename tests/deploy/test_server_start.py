"""What keeps a server from starting, said before anything runs."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from command_line import call
from real_server import need_nginx, write_server

from deploy import server as server_module
from deploy.certificates import issue_server, read_issued
from deploy.keys import Keys
from deploy.server import check_certificates, check_ports
from deploy.server_config import ServerConfig
from fedgraft.errors import ConfigError


@pytest.fixture
def written(tmp_path: Path) -> Path:
    need_nginx()
    return write_server(tmp_path, ("alice",))


def refused(path: Path, message: str, remedy: str) -> None:
    done = call("server", "--config", path)
    assert done.status == 2 and done.out == ""
    first, second = done.err.splitlines()
    assert message in first and remedy in second, done.err
    assert not ServerConfig.load(path).parts.exists()


@pytest.mark.parametrize("key", ["listen", "superlink-port"])
def test_a_port_that_is_taken(written: Path, key: str):
    config = ServerConfig.load(written)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", config.port if key == "listen" else config.superlink_port))
        taken.listen()
        refused(written, f"{key}: 127.0.0.1:", f"process {os.getpid()}, ")


def test_what_a_killed_server_left_is_given_time_to_end(
    written: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(server_module, "_GRACE_SECONDS", 0.5)
    config = ServerConfig.load(written)
    config.state.mkdir()
    config.parts.write_text("{}")
    with socket.socket() as left:
        left.bind(("127.0.0.1", config.port))
        left.listen()
        with pytest.raises(ConfigError, match="listen: "):
            check_ports(config)
        monkeypatch.setattr(time, "sleep", lambda seconds: left.close())
        check_ports(config)


def test_an_address_of_another_machine(written: Path):
    written.write_text(written.read_text().replace('listen = "127.0.0.1', 'listen = "192.0.2.1'))
    refused(written, "Cannot assign requested address", "Set listen to another one")


def test_no_nginx(written: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    refused(written, "nginx is not installed", "apt-get install nginx")


def test_expired_soon_to_expire_and_missing_certificates(
    written: Path, monkeypatch: pytest.MonkeyPatch
):
    keys = Keys(ServerConfig.load(written).keys)
    assert check_certificates(keys) == []
    keys.renew("alice", days=3)
    keys.renew_server(["localhost"], days=29)
    server, alice = check_certificates(keys)
    assert "the server's certificate expires on" in server and "--renew" in server
    assert "the certificate of client alice expires on" in alice and "--renew" in alice
    authority = read_issued(keys.folder / "ca.crt", keys.folder / "ca.key")
    for then, message, remedy in (
        (-9, "expired on", "fedgraft keys init --dir"),
        (9, "does not hold yet", "Set this machine's clock"),
    ):
        made = datetime.now(UTC) + timedelta(days=then)
        issued = issue_server(authority, ["localhost"], 2, made)
        issued.write(keys.server / "server.crt", keys.server / "server.key")
        refused(written, message, remedy)
    (keys.server / "server.key").unlink()
    refused(written, "there is no", "fedgraft keys")
    keys.renew_server(["localhost"])
    keys.crl.unlink()
    refused(written, "crl.pem", "fedgraft keys")


def test_a_key_that_may_not_be_read():
    need_nginx()
    folder = Path(tempfile.mkdtemp())  # where pytest's own are, no other user may look
    try:
        folder.chmod(0o755)
        path = write_server(folder)
        keys = Keys(ServerConfig.load(path).keys)
        if os.geteuid() != 0:
            (keys.server / "server.key").chmod(0)
            refused(path, "server.key may not be read by this user", "Run as the folder's owner")
            return
        os.seteuid(pwd.getpwnam("nobody").pw_uid)
        try:
            refused(path, "server.key may not be read by this user", "Run as the folder's owner")
        finally:
            os.seteuid(0)
    finally:
        shutil.rmtree(folder)


def test_wrong_usage(tmp_path: Path, written: Path):
    assert "Say --config FILE" in call("server").err
    assert "go together" in call("server", "--init", tmp_path / "x.toml").err
    done = call("server", "--init", tmp_path / "x.toml", "--keys", tmp_path)
    assert done.status == 2 and "holds no keys" in done.err
    done = call("server", "--init", tmp_path / "x.toml", "--keys", tmp_path / "KEYS")
    assert done.status == 0 and "fedgraft server --config" in done.out
    assert ServerConfig.load(tmp_path / "x.toml").keys == tmp_path / "KEYS"
    assert (
        "exists already"
        in call("server", "--init", tmp_path / "x.toml", "--keys", tmp_path / "KEYS").err
    )


def test_a_path_that_nginx_cannot_read(tmp_path: Path):
    need_nginx()
    folder = tmp_path / "a b"
    folder.mkdir()
    refused(write_server(folder), "nginx cannot read from", "without spaces")
    with pytest.raises(ConfigError):
        ServerConfig.load(folder)
