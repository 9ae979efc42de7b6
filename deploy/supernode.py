"""Flower's SuperNode with what it lacks: a client certificate, patience, short waits, an end.

`python -m deploy.supernode OPTIONS` takes flower-supernode's own options. Flower's SuperNode has no
option for a client certificate, which the gateway asks for, looks for messages every 3 s, and
starts a ClientApp for each from nothing (see `deploy.nursery`). A TLS handshake that is cut off
ends its loop for good, and leaves a process behind that does nothing. One that was killed counts
as online for a minute, in which its successor is not let in; so the successor takes leave in its
place. What is touched of Flower is here, with a test.
"""

from __future__ import annotations

import math
import os
import signal
import ssl
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from flwr.app import Message
from flwr.common.constant import SubStatus
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    DeactivateNodeResponse,
    PushMessagesRequest,
)
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supernode import fleet_http_connection as connection
from flwr.supernode import start_client_internal as loop
from flwr.supernode.cli import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient

from deploy.kept_superexec import WORK, KeptSuperExec
from fedgraft.flower import ask_soon_for_objects, leave_out_empty_lines

CERTIFICATE, KEY = "FEDGRAFT_CLIENT_CERTIFICATE", "FEDGRAFT_CLIENT_KEY"
"""Environment variables with the paths of the client's certificate and its key."""
LONGEST_SLEEP = 0.2
"""Seconds between two questions to the server."""
SHORTEST_SLEEP = 0.05
"""Seconds between two looks for the ClientApp's answer, which cost next to nothing."""
QUIET_SLEEP, QUIET_AFTER = 1.0, 50
"""Seconds between two questions to the server after so many, one by one, that brought no message.

A question costs either side some 8 ms of a core: twenty idle clients that asked five times a second
would keep two cores busy with nothing.
"""
ONLINE = "online"
"""File in the SuperNode's folder with its node id, from being let in to taking leave."""
SEEN_SECONDS = 10.0
"""How long a node stays away after a late farewell, so that the ServerApp sees what was lost."""
FAILED, FAILED_SECONDS = 500, 60.0
"""A server that fails is asked again for so long."""
_AWAY = (502, 503, 504)


def wait_less() -> None:
    """Cap the SuperNode's sleeps, and less so while nothing has come for a while."""
    empty = 0

    def sleep(seconds: float) -> None:
        nonlocal empty
        at_work = seconds < 1.0  # Flower's 0.5 s; 3 s: the server has no message
        empty = 0 if at_work else empty + 1
        longest = QUIET_SLEEP if empty > QUIET_AFTER else LONGEST_SLEEP
        time.sleep(min(seconds, SHORTEST_SLEEP if at_work else longest))

    module: Any = loop
    module.time = SimpleNamespace(sleep=sleep)


def start_ours() -> KeptSuperExec:
    """Let the SuperNode start our SuperExec, see `deploy.superexec`, and keep it running."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {WORK})  # which it inherits: to be waited for

    def command(words: list[str]) -> list[str]:
        return [sys.executable, "-P", "-m", "deploy.superexec", *words[1:]]

    return KeptSuperExec(loop, command)


class _Watched:
    """A SuperNode's state, and what has been begun in it for the message that is being pulled."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self.tasks: list[int] = []
        self.messages: list[str] = []

    def create_task(self, **what: Any) -> int | None:
        task: int | None = self._state.create_task(**what)
        self.tasks += [] if task is None else [task]
        return task

    def store_message(self, message: Message) -> Any:
        self.messages.append(message.metadata.message_id)
        return self._state.store_message(message)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


def mind_messages(came: Callable[[], None]) -> None:
    """Say when a message has come, and end the task of one whose run was over before it had.

    Flower leaves that task open, and the ClientApp started for it waits for the rest for ever.

    Args:
        came: called for every message that is there whole.
    """
    module: Any = loop
    pull = module._pull_and_store_message

    def pull_and_mind(state: Any, object_store: Any, **given: Any) -> int | None:
        watched = _Watched(state)
        run: int | None = pull(state=watched, object_store=object_store, **given)
        if run is not None:
            came()
        else:
            state.delete_messages(message_ids=watched.messages)
            for message in watched.messages:
                object_store.delete(message)
            for task in watched.tasks:
                state.finish_task(task, sub_status=SubStatus.FAILED, details="cut off")
        return run

    module._pull_and_store_message = pull_and_mind


def present(certificate: str, key: str) -> None:
    """Let every TLS context that trusts the federation's CA also present a client certificate."""
    trust = ssl.SSLContext.load_verify_locations

    def trust_and_present(context: ssl.SSLContext, *args: Any, **kwargs: Any) -> None:
        trust(context, *args, **kwargs)
        if context.protocol == ssl.PROTOCOL_TLS_CLIENT:
            context.load_cert_chain(certificate, key)

    patched: Any = ssl.SSLContext
    patched.load_verify_locations = trust_and_present


def be_patient() -> None:
    """Let what may pass be tried again, as every other lost connection is.

    Flower takes all that has "ssl" in its text for a certificate that is refused, and gives up; and
    a reply that the server failed to take, since too much was going on there, it drops.
    """
    module: Any = connection
    make = module.make_simple_http_retry_invoker

    def patient() -> Any:
        invoker = make()
        invoker.should_giveup = Patience(invoker.should_giveup)
        return invoker

    module.make_simple_http_retry_invoker = patient


class Patience:
    """Whether to give a request up.

    Args:
        gives_up: Flower's own answer to that, for what is not patience's.
    """

    def __init__(self, gives_up: Callable[[Exception], bool]) -> None:
        self._gives_up = gives_up
        self._first = self._last = -math.inf  # monotonic seconds of failures in a row

    def __call__(self, error: Exception) -> bool:
        """Return whether this failure is the last."""
        if was_cut_off(error):
            return False
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == FAILED:
            now = time.monotonic()
            if now - self._last > FAILED_SECONDS:
                self._first = now
            self._last = now
            if now - self._first < FAILED_SECONDS:
                return False
        return self._gives_up(error)


def was_cut_off(error: BaseException | None) -> bool:
    """Whether a connection ended with no verdict on anybody's certificate."""
    while error is not None:
        if isinstance(error, TimeoutError | ConnectionError | ssl.SSLEOFError):
            return True
        error = error.__cause__ or error.__context__
    return False


def finish_answers() -> None:
    """Send an answer to its end where a try was cut off that had reached the server after all.

    A gateway that is killed takes the server's word along. Asked again, the server takes neither
    an answer nor an object a second time: it names no objects to be sent, or says that one was not
    stored. Flower then drops what is left of the answer, for which the ServerApp waits in vain.
    """
    announce, push = FleetHttpClient.PushMessages, FleetHttpClient.PushObject
    tried: set[str] = set()  # ids of answers and objects whose sending was cut off

    def minded(send: Callable[[], Any], what: str) -> tuple[Any, bool]:
        """Return what the server says, and whether an earlier try may have reached it."""
        try:
            said = send()
        except httpx.HTTPError:
            tried.add(what)
            raise
        again = what in tried
        tried.discard(what)
        return said, again

    def push_messages(client: FleetHttpClient, request: PushMessagesRequest) -> Any:
        (tree,) = request.message_object_trees
        said, again = minded(lambda: announce(client, request), tree.object_id)
        if again and not said.objects_to_push:
            # Without a session an object belongs to whichever session still waits for it.
            said.session_id = ""
            said.objects_to_push.extend({one.object_id for one in iterate_object_tree(tree)})
        return said

    def push_object(client: FleetHttpClient, request: PushObjectRequest) -> Any:
        said, again = minded(lambda: push(client, request), request.object_id)
        said.stored |= again or not request.session_id
        return said

    patched: Any = FleetHttpClient
    patched.PushMessages, patched.PushObject = push_messages, push_object


def take_leave_late(file: Path) -> None:
    """Let a SuperNode take leave for the one before it on this machine, where that was killed.

    Args:
        file: holds the node's id for as long as it is online.
    """
    activate, deactivate = FleetHttpClient.ActivateNode, FleetHttpClient.DeactivateNode

    def arrive(client: FleetHttpClient, request: ActivateNodeRequest) -> ActivateNodeResponse:
        if file.exists():
            try:
                deactivate(client, DeactivateNodeRequest(node_id=int(file.read_text())))
            except ValueError:  # cut off while it was written
                pass
            except httpx.HTTPStatusError as error:
                if error.response.status_code in _AWAY:
                    raise  # Flower asks again
            else:
                time.sleep(SEEN_SECONDS)
            file.unlink(missing_ok=True)
        response = activate(client, request)
        file.write_text(str(response.node_id))
        return response

    def leave(client: FleetHttpClient, request: DeactivateNodeRequest) -> DeactivateNodeResponse:
        response = deactivate(client, request)
        file.unlink(missing_ok=True)
        return response

    patched: Any = FleetHttpClient
    patched.ActivateNode, patched.DeactivateNode = arrive, leave


def main() -> None:
    """Run the SuperNode in this process, in the folder that is its own."""
    wait_less()
    ask_soon_for_objects()
    be_patient()
    finish_answers()
    superexec = start_ours()
    mind_messages(lambda: superexec.send_signal(WORK))
    take_leave_late(Path(ONLINE).absolute())
    leave_out_empty_lines()
    if CERTIFICATE in os.environ:
        present(os.environ[CERTIFICATE], os.environ[KEY])
    sys.argv[0] = "flower-supernode"
    try:
        flower_supernode()
        print("The SuperNode's loop has ended", file=sys.stderr, flush=True)
    except Exception:
        traceback.print_exc()
    # Its web server's thread would keep this process; the supervisor starts another one.
    os._exit(1)


if __name__ == "__main__":
    main()
