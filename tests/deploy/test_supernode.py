"""The parts of Flower's SuperNode that the launcher touches."""

from __future__ import annotations

import re
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    DeactivateNodeResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest, PushObjectResponse
from flwr.supernode import fleet_http_connection as connection
from flwr.supernode import start_client_internal as loop
from flwr.supernode.fleet_http_client import FleetHttpClient
from test_client_config import certificate

from deploy import kept_superexec, supernode
from deploy.kept_superexec import WORK
from deploy.keys import Keys


def test_the_supernodes_sleeps_are_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loop takes nothing of `time` but the sleep that is replaced."""
    monkeypatch.setattr(loop, "time", loop.time)
    slept: list[float] = []
    monkeypatch.setattr(supernode.time, "sleep", slept.append)
    supernode.wait_less()
    loop.time.sleep(3)
    loop.time.sleep(0.05)
    assert slept == [supernode.LONGEST_SLEEP, 0.05]
    slept.clear()
    for _ in range(supernode.QUIET_AFTER + 2):
        loop.time.sleep(3)  # no message
    loop.time.sleep(0.5)  # one is at work
    loop.time.sleep(3)
    quick, quiet, work = supernode.LONGEST_SLEEP, supernode.QUIET_SLEEP, supernode.SHORTEST_SLEEP
    assert slept == [quick] * supernode.QUIET_AFTER + [quiet, quiet, work, quick]
    text = Path(loop.__file__).read_text()
    assert set(re.findall(r"\btime\.(\w+)\(", text)) == {"sleep"}


def test_the_supernode_starts_our_superexec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loop takes nothing of `subprocess` but the start of flower-superexec."""
    monkeypatch.setattr(loop, "subprocess", loop.subprocess)
    started = Mock(return_value=Mock(wait=threading.Event().wait))  # it never ends
    monkeypatch.setattr(kept_superexec.subprocess, "Popen", started)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        superexec = supernode.start_ours()
        superexec.send_signal(WORK)  # nobody is there yet
        loop.subprocess.Popen(["flower-superexec", "--insecure"])
        # It inherits that the signal is kept until it is waited for.
        assert WORK in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    ours = [sys.executable, "-P", "-m", "deploy.superexec", "--insecure"]
    started.assert_called_once_with(ours)
    superexec.send_signal(WORK)
    started.return_value.send_signal.assert_called_once_with(WORK)
    text = Path(loop.__file__).read_text()
    assert re.findall(r"\bsubprocess\.(\w+)\(", text) == ["Popen"]
    assert 'command = ["flower-superexec"]' in text


@pytest.mark.parametrize("run", [None, 5])
def test_a_message_whose_run_was_over_half_way_leaves_no_clientapp_waiting(
    monkeypatch: pytest.MonkeyPatch, run: int | None
) -> None:
    """Flower's own loop returns None there, and keeps task and message."""
    did: list[tuple[str, Any]] = []
    state: Any = SimpleNamespace(
        create_task=lambda **what: 7,
        store_message=lambda message: "m",
        set_node_id=lambda number: did.append(("node", number)),
        delete_messages=lambda message_ids: did.append(("messages", message_ids)),
        finish_task=lambda task, sub_status, details: did.append((sub_status, task)),
    )
    store: Any = SimpleNamespace(delete=lambda message: did.append(("objects", message)))

    def pull(*, state: Any, object_store: Any, node_config: Any) -> int | None:
        state.set_node_id(3)
        assert state.create_task(task_type="x") == 7
        state.store_message(SimpleNamespace(metadata=SimpleNamespace(message_id="m")))
        return run

    monkeypatch.setattr(loop, "_pull_and_store_message", pull)
    supernode.mind_messages(lambda: did.append(("came", 0)))
    found = loop._pull_and_store_message(state=state, object_store=store, node_config={})
    ended = [("messages", ["m"]), ("objects", "m"), ("failed", 7)]
    assert (found, did) == (run, [("node", 3), *(ended if run is None else [("came", 0)])])


def test_contexts_that_trust_the_federations_ca_present_the_clients_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = certificate(tmp_path / "keys", "north")
    presented: list[tuple[str, str]] = []
    monkeypatch.setattr(
        ssl.SSLContext, "load_cert_chain", lambda self, crt, key: presented.append((crt, key))
    )
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)
    supernode.present(str(keys / "client.crt"), "key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata="x")
    assert presented == [(str(keys / "client.crt"), "key")]
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata="x")
    assert len(presented) == 1


def hang_up(client: socket.socket) -> None:
    """End a connection in the middle of its handshake, as a gateway that is killed."""
    client.recv(65536)
    client.close()


def say_nothing(client: socket.socket) -> None:
    """Take what comes, as a link that was cut."""
    while client.recv(4096):
        pass


def answer_as_a_stranger(client: socket.socket, keys: Path) -> None:
    """Present a certificate of a CA that the client does not know."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(keys / "server.crt", keys / "server.key")
    with suppress(OSError):
        context.wrap_socket(client, server_side=True)


@pytest.mark.parametrize(
    ("server", "given_up"), [(hang_up, False), (say_nothing, False), (answer_as_a_stranger, True)]
)
def test_a_handshake_that_is_cut_off_is_tried_again_and_a_refused_one_is_not(
    server: Callable[..., None], given_up: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower itself gives all three up."""
    more = [Keys.create(tmp_path / "keys", ["localhost"]).server] if given_up else []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"https://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=lambda: server(listener.accept()[0], *more))
        thread.start()
        with pytest.raises(httpx.TransportError) as raised:
            httpx.post(address, timeout=0.5)
        thread.join()
    make = connection.make_simple_http_retry_invoker
    monkeypatch.setattr(connection, "make_simple_http_retry_invoker", make)
    supernode.be_patient()
    ours = connection.make_simple_http_retry_invoker().should_giveup
    theirs = make().should_giveup
    assert ours is not None and theirs is not None and theirs(raised.value)
    assert ours(raised.value) == given_up


def test_a_server_that_fails_is_asked_again_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(supernode.time, "monotonic", lambda: now[0])
    patience = supernode.Patience(lambda error: True)

    def gives_up(status: int, later: float) -> bool:
        now[0] += later
        answer = httpx.Response(status, request=httpx.Request("POST", "https://x"))
        return patience(httpx.HTTPStatusError("", request=answer.request, response=answer))

    assert [gives_up(500, 20.0) for _ in range(5)] == [False, False, False, True, True]
    assert not gives_up(500, 61.0)  # another failure, long after
    assert gives_up(404, 0.0)


class Server:
    """What a SuperLink does with an answer and its objects, over a line that is cut at times.

    Attributes:
        cut: before ("down") or after ("up") the server has heard of what, the line is cut once.
    """

    def __init__(self, cut: dict[str, str]) -> None:
        self.cut = cut
        self.stored: list[str] = []
        self.pending: set[str] | None = None

    def push_messages(self, client: Any, request: PushMessagesRequest) -> PushMessagesResponse:
        fresh = self._passed("answer", lambda: self.pending is None)
        if fresh:
            self.pending = {"a", "b", "root"}
        self._heard("answer")
        ids = self.pending if fresh else ()
        return PushMessagesResponse(session_id="s" if fresh else "", objects_to_push=ids)

    def push_object(self, client: Any, request: PushObjectRequest) -> PushObjectResponse:
        assert self.pending is not None
        fresh = self._passed(request.object_id, lambda: request.object_id in self.pending)
        if fresh:
            self.pending.remove(request.object_id)
            self.stored.append(request.object_id)
        self._heard(request.object_id)
        return PushObjectResponse(stored=fresh)

    def _passed(self, what: str, fresh: Callable[[], bool]) -> bool:
        if self.cut.get(what) == "down":
            del self.cut[what]
            raise httpx.ConnectError("no gateway is there")
        return fresh()

    def _heard(self, what: str) -> None:
        if self.cut.get(what) == "up":
            del self.cut[what]
            raise httpx.RemoteProtocolError("the gateway is gone")


@pytest.mark.parametrize(
    "cut",
    [
        {},
        {"answer": "down", "a": "down"},
        {"answer": "up"},
        {"a": "up"},
        {"answer": "up", "b": "up"},
    ],
)
def test_an_answer_is_sent_to_its_end_though_the_servers_word_was_lost(
    cut: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's server takes answer and object once, and says no to it the second time."""
    server = Server(dict(cut))
    monkeypatch.setattr(
        FleetHttpClient, "PushMessages", lambda *given: server.push_messages(*given)
    )
    monkeypatch.setattr(FleetHttpClient, "PushObject", lambda *given: server.push_object(*given))
    supernode.finish_answers()
    client = FleetHttpClient.__new__(FleetHttpClient)
    tree = ObjectTree(
        object_id="root", children=[ObjectTree(object_id="a"), ObjectTree(object_id="b")]
    )

    def insisted(call: Callable[[Any], Any], request: Any) -> Any:
        with suppress(httpx.HTTPError):
            return call(request)
        return call(request)

    said = insisted(client.PushMessages, PushMessagesRequest(message_object_trees=[tree]))
    assert set(said.objects_to_push) == {"a", "b", "root"}
    for id in ("a", "b", "root"):
        request = PushObjectRequest(session_id=said.session_id, object_id=id)
        assert insisted(client.PushObject, request).stored
    assert sorted(server.stored) == ["a", "b", "root"] and not server.cut
    if not cut:  # a no without such a reason stays one
        assert not client.PushObject(PushObjectRequest(session_id="s", object_id="a")).stored
        again = client.PushMessages(PushMessagesRequest(message_object_trees=[tree]))
        assert not again.objects_to_push


@pytest.mark.parametrize("raised", [None, RuntimeError("it broke")])
def test_a_supernode_whose_loop_has_ended_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: Exception | None
) -> None:
    """Though its web server's thread goes on."""
    for name in (
        *("wait_less", "ask_soon_for_objects", "be_patient", "finish_answers"),
        *("start_ours", "mind_messages", "take_leave_late", "leave_out_empty_lines"),
    ):
        monkeypatch.setattr(supernode, name, Mock())
    monkeypatch.setattr(sys, "argv", [""])
    monkeypatch.delenv(supernode.CERTIFICATE, raising=False)
    monkeypatch.setattr(supernode, "flower_supernode", Mock(side_effect=raised))
    monkeypatch.setattr(supernode.os, "_exit", Mock(side_effect=SystemExit))
    with pytest.raises(SystemExit):
        supernode.main()
    supernode.os._exit.assert_called_once_with(1)  # type: ignore[attr-defined]
    said = "loop has ended" if raised is None else "it broke"
    assert said in capsys.readouterr().err


def test_a_supernode_takes_leave_for_the_one_that_was_killed_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    away: list[int] = [503]

    def activate(client: FleetHttpClient, request: ActivateNodeRequest) -> ActivateNodeResponse:
        asked.append(("arrive", 7))
        return ActivateNodeResponse(node_id=7)

    def deactivate(
        client: FleetHttpClient, request: DeactivateNodeRequest
    ) -> DeactivateNodeResponse:
        asked.append(("leave", request.node_id))
        if asked[0] == ("away", 0) and away:
            answer = httpx.Response(away.pop(), request=httpx.Request("POST", "https://x"))
            raise httpx.HTTPStatusError("away", request=answer.request, response=answer)
        return DeactivateNodeResponse()

    monkeypatch.setattr(FleetHttpClient, "ActivateNode", activate)
    monkeypatch.setattr(FleetHttpClient, "DeactivateNode", deactivate)
    monkeypatch.setattr(supernode, "SEEN_SECONDS", 0.0)
    file, client = tmp_path / "online", FleetHttpClient.__new__(FleetHttpClient)
    supernode.take_leave_late(file)
    client.ActivateNode(ActivateNodeRequest())
    assert asked == [("arrive", 7)] and file.read_text() == "7"
    client.ActivateNode(ActivateNodeRequest())  # after a kill
    assert asked[1:] == [("leave", 7), ("arrive", 7)]
    client.DeactivateNode(DeactivateNodeRequest(node_id=7))
    assert not file.exists()
    client.ActivateNode(ActivateNodeRequest())
    asked[:] = [("away", 0)]
    with pytest.raises(httpx.HTTPStatusError):  # the server is away, too: Flower tries again
        client.ActivateNode(ActivateNodeRequest())
    assert file.read_text() == "7"
    client.ActivateNode(ActivateNodeRequest())
    assert asked[1:] == [("leave", 7), ("leave", 7), ("arrive", 7)]
