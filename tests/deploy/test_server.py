"""A real server: whom its gateway refuses, and what happens when a part of it dies."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import psutil
import pytest
from command_line import call
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest
from flwr.proto.node_pb2 import Node
from real_server import RealServer, real_server, write_server
from waiting import alive, until

from deploy.certificates import issue_client, make_authority, read_issued
from deploy.keys import Keys
from fedgraft.flower import CONNECTION, flower_environment
from fedgraft.nodes import nodes_of

CLIENTS = ("alice", "bob", "carol", "dave", "erin")


RAN: set[str] = set()
"""The tests of the shared server that this process has run; others may run in another worker."""


@pytest.fixture(scope="module")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealServer]:
    path = write_server(tmp_path_factory.mktemp("server"), CLIENTS, body_mib=1)
    Keys(path.parent / "KEYS").renew("erin", days=20)
    with real_server(path) as one:
        yield one
        check_that_sigterm_leaves_nothing(one)
        if {item.nodeid for item in request.session.items if uses_server(item)} <= RAN:
            check_that_every_documented_line_was_seen(one)


def uses_server(item: pytest.Item) -> bool:
    return item.path == Path(__file__) and "server" in getattr(item, "fixturenames", ())


@pytest.fixture(autouse=True)
def note(request: pytest.FixtureRequest) -> None:
    RAN.add(request.node.nodeid)


EXAMPLES = {
    "...": ".*",
    "4711": r"\d+",
    "4.4": r"\d+\.\d",
    "2027-01-31": r"\d{4}-\d\d-\d\d",
    "0.0.0.0:9443": r"127\.0\.0\.1:\d+",
    "192.0.2.7": r"127\.0\.0\.1",
}
"""What the documentation writes for a number, a date or an address, and what may stand there."""


def check_that_every_documented_line_was_seen(server: RealServer) -> None:
    """The tests below have provoked them all."""
    page = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text()
    _, _, table = page.partition("| line | meaning |")
    lines = re.findall(r"^\| `(.+?)` \|", table, re.M)
    assert len(lines) >= 20
    for line in lines:
        pattern = re.escape(line)
        for example, any_ in EXAMPLES.items():
            pattern = pattern.replace(re.escape(example), any_)
        assert re.search(pattern, server.log()), line


def check_that_sigterm_leaves_nothing(server: RealServer) -> None:
    family = server.family()
    assert len(family) >= 6  # itself, its leash, SuperLink and SuperExec, nginx and its workers
    server.process.send_signal(signal.SIGTERM)
    out, err = server.process.communicate(timeout=90)
    assert (server.process.returncode, out, err) == (0, "", "")
    assert not any(alive(pid) for pid in family)
    assert not server.config.parts.exists() and not server.keys.running.exists()
    for port in (server.config.port, server.config.superlink_port):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert call("keys", "revoke", "bob", "--dir", server.keys.folder).out.count("No server") == 1


def activate(server: RealServer, node: str, certificate: str | None = None, port: int = 0) -> int:
    with server.fleet(node, certificate, port) as client:
        public = server.keys.invited()[node].public_key
        request = ActivateNodeRequest(public_key=public, heartbeat_interval=30)
        return client.ActivateNode(request).node_id


def pull(server: RealServer, name: str, node_id: int) -> int:
    with server.fleet(name) as client:
        return len(
            client.PullMessages(PullMessagesRequest(node=Node(node_id=node_id))).messages_list
        )


def node_key(server: RealServer) -> dict[str, str]:
    """The header that says it is alice's node."""
    public = server.keys.invited()["alice"].public_key
    return {"flwr-public-key": base64.b64encode(public).decode()}


# Let in


def test_an_invited_node_gets_in_and_is_counted(server: RealServer):
    node_id = activate(server, "alice")
    assert node_id == server.keys.invited()["alice"].node_id
    assert pull(server, "alice", node_id) == 0
    with nodes_of(server.config.superlink_port, server.keys.server / "ca.crt") as nodes:
        status = {one.name: one.status for one in nodes.all()}
    assert status["alice"] == "online" and status["bob"] == "registered"
    lines = [json.loads(line) for line in server.config.access_log.read_text().splitlines()]
    mine = [one for one in lines if one["client"] == "alice" and one["status"] == 200]
    last = mine[-1]
    assert "/v1/fleet/pull-messages" in last["request"] and last["certificate"] == "SUCCESS"
    assert last["bytes_in"] > 500 and last["bytes_out"] > 100
    assert datetime.fromisoformat(last["time"]).tzinfo is not None


def test_flowers_own_command_reaches_the_superlink(server: RealServer):
    done = subprocess.run(
        ["flwr", "supernode", "ls", CONNECTION, "--format", "json"],
        env=flower_environment(server.config.flower_home),
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(json.loads(done.stdout)["nodes"]) >= len(CLIENTS)


# Refused, with a line in the log, and nothing else happens


def test_no_certificate(server: RealServer):
    line = 'refused 400: "POST /v1/fleet/pull-messages HTTP/1.1" of client - at 127.0.0.1'
    with server.logging(f"{line} (certificate: none"):
        assert server.ask("POST", "/v1/fleet/pull-messages", server.tls(None)) == 400


def test_a_certificate_of_another_authority_or_out_of_date(server: RealServer, tmp_path: Path):
    context = server.tls(None)
    issue_client(make_authority("CA"), "alice").write(tmp_path / "crt", tmp_path / "key")
    context.load_cert_chain(tmp_path / "crt", tmp_path / "key")
    with server.logging("(certificate: FAILED:unable to verify the first certificate"):
        assert server.ask("POST", "/v1/fleet/pull-messages", context) == 400
    authority = read_issued(server.keys.folder / "ca.crt", server.keys.folder / "ca.key")
    past = datetime.now(UTC) - timedelta(days=3)
    issue_client(authority, "alice", 2, past).write(tmp_path / "crt", tmp_path / "key")
    context = server.tls(None)
    context.load_cert_chain(tmp_path / "crt", tmp_path / "key")
    with server.logging("of client alice at 127.0.0.1 (certificate: FAILED:certificate has exp"):
        assert server.ask("POST", "/v1/fleet/pull-messages", context) == 400


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/runtime/pull-messages",
        "/docs",
        "/health",
        "/",
        "/v1/fleet",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol/start-run",
        "//v1//control/start-run",
    ],
)
def test_a_route_that_is_not_the_fleets(server: RealServer, path: str):
    with server.logging(f'refused 403: "POST {path} HTTP/1.1" of client alice'):
        assert server.ask("POST", path, server.tls("alice")) == 403


def test_a_method_that_no_supernode_uses(server: RealServer):
    with server.logging('refused 403: "GET /v1/fleet/pull-messages'):
        tls, key = server.tls("alice"), node_key(server)
        assert server.ask("GET", "/v1/fleet/pull-messages", tls, None, key) == 403


def test_a_body_above_the_limit(server: RealServer):
    link = http.client.HTTPSConnection("localhost", server.config.port, context=server.tls("alice"))
    line = 'refused 413: "POST /v1/fleet/push-object'
    # nginx answers and closes while we are still sending
    with server.logging(line), suppress(ConnectionError, ssl.SSLError):
        link.request("POST", "/v1/fleet/push-object", bytes((1 << 20) + 1), node_key(server))
        assert link.getresponse().status == 413
    link.close()


def test_a_body_that_does_not_say_how_long_it_is(server: RealServer):
    link = http.client.HTTPSConnection("localhost", server.config.port, context=server.tls("alice"))
    with server.logging('refused 411: "POST /v1/fleet/push-object'):
        link.request(
            "POST", "/v1/fleet/push-object", iter([b"x"]), node_key(server), encode_chunked=True
        )
        assert link.getresponse().status == 411
    link.close()


def test_what_doctor_asks_leaves_a_line_that_says_so(server: RealServer):
    key = node_key(server)
    assert server.ask("POST", "/v1/fleet/pull-messages", server.tls("alice"), None, key) == 415
    until(lambda: 'refused 415: "POST /v1/fleet/pull-messages HTTP/1.1"' in server.log())


def test_plain_http(server: RealServer):
    link = http.client.HTTPConnection("localhost", server.config.port)
    with server.logging("(certificate: no TLS"):
        link.request("POST", "/v1/fleet/pull-messages")
        assert link.getresponse().status == 400
    link.close()


def test_old_tls(server: RealServer):
    context = server.tls("alice")
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with server.logging("unsupported protocol"), pytest.raises(ssl.SSLError):
        server.ask("POST", "/v1/fleet/pull-messages", context)
    context = server.tls("alice")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with server.logging("refused 403"):  # as any client may
        assert server.ask("POST", "/", context) == 403


def test_a_node_key_that_is_not_the_certificates(server: RealServer):
    """Whoever has a certificate still speaks for its own node only."""
    line = "(certificate: good; node: bob)"
    with server.logging(line), pytest.raises(httpx.HTTPStatusError, match="401"):
        activate(server, "bob", certificate="alice")


def test_a_node_key_that_nobody_registered(server: RealServer, tmp_path: Path):
    """The gateway refuses it; and so does the SuperLink, behind the gateway's back."""
    stranger = Keys.create(tmp_path / "KEYS", ["localhost"])
    stranger.invite("alice")
    for name in ("client.crt", "client.key"):
        shutil.copy(
            server.keys.client_folder("alice") / name, stranger.client_folder("alice") / name
        )
    shutil.copy(server.keys.folder / "ca.crt", stranger.folder / "ca.crt")
    other = RealServer(server.path, server.config, stranger, server.process)
    line = "(certificate: good; node: ?)"
    with server.logging(line), pytest.raises(httpx.HTTPStatusError, match="401"):
        activate(other, "alice")
    with pytest.raises(httpx.HTTPStatusError, match=r"4\d\d "):
        activate(other, "alice", port=server.config.superlink_port)


def test_a_second_node_with_the_same_key(server: RealServer):
    """While one is online Flower activates no other; the refusal is in the SuperLink's log."""
    before = len(server.log())
    node_id = activate(server, "carol")
    with pytest.raises(httpx.HTTPStatusError):
        activate(server, "carol")
    assert pull(server, "carol", node_id) == 0  # the first is none the worse
    until(lambda: "could not be activated" in server.log()[before:])
    with server.fleet("carol") as client:
        client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
    assert activate(server, "carol") == node_id


# Invited and revoked while it runs


def test_a_new_client_gets_in_at_once_and_a_revoked_one_is_out_at_once(server: RealServer):
    done = call("keys", "client", "frank", "--dir", server.keys.folder, "--json")
    assert done.status == 0, done.err
    node_id = json.loads(done.out)["node_id"]
    with server.fleet("frank") as client:  # one connection, held open over the revocation
        public = server.keys.invited()["frank"].public_key
        request = ActivateNodeRequest(public_key=public, heartbeat_interval=30)
        assert client.ActivateNode(request).node_id == node_id
        done = call("keys", "revoke", "frank", "--dir", server.keys.folder)
        assert done.status == 0 and "shuts it out from now on" in done.out
        ask = PullMessagesRequest(node=Node(node_id=node_id))
        with pytest.raises(httpx.HTTPStatusError, match=r"40[01]"):
            client.PullMessages(ask)
    with server.logging("of client frank at 127.0.0.1 (certificate: FAILED:certificate revoked"):
        assert server.ask("POST", "/v1/fleet/pull-messages", server.tls("frank")) == 400
    with nodes_of(server.config.superlink_port, server.keys.server / "ca.crt") as nodes:
        assert [one.status for one in nodes.all() if one.name == "frank"] == ["unregistered"]
    assert server.keys.clients()[-1].node_id is None


# Deaths


@pytest.mark.parametrize("part", ["superlink", "gateway"])
def test_a_part_that_is_killed_comes_back(server: RealServer, part: str):
    node_id = activate(server, {"superlink": "dave", "gateway": "erin"}[part])
    name = {"superlink": "dave", "gateway": "erin"}[part]
    before = server.parts()[part]
    os.kill(before["pid"], signal.SIGKILL)

    def back() -> bool:
        now = server.parts()[part]
        return bool(now["starts"] == before["starts"] + 1 and now["ready"])

    until(back)
    assert pull(server, name, node_id) == 0  # the database remembers the node
    assert f"{part} was killed by signal 9; starting it again in 0.5 s" in server.log()


def test_flowers_starter_of_apps_is_started_again(server: RealServer):
    """Without it no run begins, and nothing else shows that."""

    def superexecs() -> set[int]:
        superlink = psutil.Process(server.parts()["superlink"]["pid"])
        with suppress(psutil.Error):  # one has just ended
            return {
                one.pid
                for one in superlink.children(recursive=True)
                if any("flower-superexec" in word for word in one.cmdline())
            }
        return set()

    (killed,) = until(superexecs)
    os.kill(killed, signal.SIGKILL)
    until(lambda: superexecs() - {killed})
    assert "The SuperExec has ended (status -9); starting it again" in server.log()


@pytest.mark.soak
def test_a_superlink_that_hangs_is_started_again(tmp_path: Path):
    path = write_server(tmp_path, ("alice",))
    path.write_text(path.read_text().replace("silent-seconds = 120.0", "silent-seconds = 15.0"))
    with real_server(path) as one:
        hung = one.parts()["superlink"]["pid"]
        os.kill(hung, signal.SIGSTOP)
        until(lambda: one.parts()["superlink"]["starts"] == 2 and one.parts()["superlink"]["ready"])
        assert not alive(hung)
        assert "superlink did not answer for 15 s; starting it again in 0.5 s" in one.log()
        activate(one, "alice")


def test_a_second_server_on_the_same_state_is_refused(server: RealServer):
    done = call("server", "--config", server.path)
    assert done.status == 2
    assert f"runs already on {server.config.state} (process {server.process.pid})" in done.err
