"""The ClientApp that Flower starts for every message of a deployed client: thin, and soon gone.

It hands the message to the resident trainer over a Unix socket and brings the answer back. It
imports no torch and reads nothing of the client's: whatever runs here counts as the server's code.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import grpc
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from client.resident.protocol import CLIENT, LARGEST_MESSAGE, PROTOCOL, SOCKET, channel
from client.resident.trainer_pb2 import Greeting, Order, Result
from client.resident.trainer_pb2_grpc import ResidentTrainerStub
from fedgraft import __version__
from fedgraft.refusal import CONFIG, refusal

app = ClientApp()
log = logging.getLogger(__name__)
WAIT = "FEDGRAFT_TRAINER_WAIT"
"""Environment variable with the seconds in which a trainer may come back, or become free."""
_WAIT_SECONDS = "60"
_ASK_SECONDS = 0.2
_TRIES = 2  # a trainer killed at work is asked once more when it is back


class AwayError(Exception):
    """No answer can be had; the text says why."""


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Ask the trainer who this client is; where it is away its name is known all the same."""
    try:
        content = ask(message, context)
    except AwayError as error:
        log.error("%s", error)
        name = os.environ.get(CLIENT)
        if not name:
            raise
        content = RecordDict({CONFIG: ConfigRecord({"name": name})})
    return Message(content, reply_to=message)


@app.query("spent")
def spent(message: Message, context: Context) -> Message:
    """Ask the trainer what the client's data have spent."""
    return _relayed(message, context)


@app.query("adapter")
def keep_adapter(message: Message, context: Context) -> Message:
    """Let the trainer keep the adapter that a run has come to."""
    return _relayed(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Let the trainer train."""
    return _relayed(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Let the trainer evaluate."""
    return _relayed(message, context)


def _relayed(message: Message, context: Context) -> Message:
    try:
        content = ask(message, context)
    except AwayError as error:
        log.error("%s", error)
        content = refusal(str(error))
    return Message(content, reply_to=message)


def ask(message: Message, context: Context) -> RecordDict:
    """Hand a message to the trainer and return the records of its answer.

    Raises:
        AwayError: there is no trainer, it is of another version, or at work for somebody else.
    """
    socket = os.environ.get(SOCKET)
    if not socket:
        raise AwayError(f"{SOCKET} is not set; a SuperNode is started by `fedgraft client`")
    order = Order(
        protocol=PROTOCOL,
        fedgraft=__version__,
        run=message.metadata.run_id,
        kind=message.metadata.message_type,
        run_config=json.dumps(dict(context.run_config)),
        content=recorddict_to_proto(message.content).SerializeToString(),
    )
    for last in range(1 - _TRIES, 1):
        result = _try(order, Path(socket), last=last == 0)
        if result is not None:
            return recorddict_from_proto(ProtoRecordDict.FromString(result.content))
    raise AssertionError("the last try returns or raises")


def _try(order: Order, socket: Path, *, last: bool) -> Result | None:
    """Ask once; None where the trainer died at work and may be asked again."""
    who = f"client {os.environ.get(CLIENT, '')}".strip()
    wait = float(os.environ.get(WAIT, _WAIT_SECONDS))
    with channel(socket) as connection:
        trainer = ResidentTrainerStub(connection)
        greeting = Greeting(protocol=PROTOCOL, fedgraft=__version__)
        try:
            there = trainer.Greet(greeting, timeout=wait, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                raise AwayError(f"{who}: its resident trainer is of another version") from None
            raise AwayError(f"{who}: its resident trainer is away ({error.code().name})") from None
        if (there.protocol, there.fedgraft) != (PROTOCOL, __version__):
            raise AwayError(
                f"{who}: its resident trainer is FedGraft {there.fedgraft}, and its SuperNode "
                f"{__version__}; start `fedgraft client` again"
            )
        try:
            return _work(trainer, order, wait)
        except grpc.RpcError as error:
            code = error.code()
            if code == grpc.StatusCode.UNAVAILABLE and not last:
                log.warning("the trainer went away at work; asking once more")
                return None
            raise AwayError(f"{who}: {_reason(error)}") from None


def _work(trainer: ResidentTrainerStub, order: Order, wait: float) -> Result:
    """Hand in an order; one of a run that is over may have to reach its end before.

    Raises:
        grpc.RpcError: the trainer died, refuses, or stays at work for so many seconds.
    """
    end = time.monotonic() + wait
    while True:
        try:
            return trainer.Work(order)  # type: ignore[no-any-return]
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.ABORTED or time.monotonic() > end:
                raise
        time.sleep(_ASK_SECONDS)


def _reason(error: grpc.RpcError) -> str:
    return {
        grpc.StatusCode.ABORTED: "its resident trainer is at work for somebody else",
        grpc.StatusCode.UNAVAILABLE: "its resident trainer ended at work, twice",
        grpc.StatusCode.CANCELLED: "its resident trainer was told to stop",
        grpc.StatusCode.FAILED_PRECONDITION: f"version mismatch: {error.details()}",
        grpc.StatusCode.RESOURCE_EXHAUSTED: (
            f"the message is larger than {LARGEST_MESSAGE // 2**20} MiB"
        ),
    }.get(error.code(), f"its resident trainer failed ({error.code().name})")
