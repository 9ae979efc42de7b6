"""The ClientApp: the same one in process, under Ray and deployed.

It decodes a request, has the resident model trained or evaluated, and encodes the answer. What it
cannot do it answers with a refusal that says why; the server counts it and goes on.
"""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from client.node import ADAPTERS, Node, memory_of
from client.private_round import account_of
from client.received import keep
from client.seat import RoundOfWork, Seat
from fedgraft.adapter import to_arrays
from fedgraft.config import Config
from fedgraft.deployed import is_deployed
from fedgraft.errors import DataError, DiskFullError, FedGraftError, PrivacyError
from fedgraft.generation import evaluate
from fedgraft.messages import FinalAdapter, Hello, Reply, TrainRequest
from fedgraft.parcel import pack
from fedgraft.resident_model import resident_task

app = ClientApp()
log = logging.getLogger(__name__)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Answer with this client's name."""
    config = Config.from_run_config(context.run_config)
    node = Node.of(context, config)
    # Under privacy not even of which labels its data are.
    hidden = config.privacy.against_server
    description = "" if hidden else resident_task(config).describe(node.index)
    answer = Hello(node.name, description, memory_of(context.node_config))
    return Message(answer.encode(), reply_to=message)


@app.query("spent")
def spent(message: Message, context: Context) -> Message:
    """Answer with the epsilon of all that this client's data have ever been asked."""
    config = Config.from_run_config(context.run_config)
    try:
        account = account_of(config, resident_task(config), Node.of(context, config))
        reply = Reply(metrics=account.told())
    except FedGraftError as error:
        reply = _refusal(error)
    return Message(reply.encode(), reply_to=message)


@app.query("adapter")
def keep_adapter(message: Message, context: Context) -> Message:
    """Keep the adapter that a run has come to."""
    folder = str(context.node_config.get(ADAPTERS) or Path.home() / ".fedgraft" / "adapters")
    try:
        path = keep(FinalAdapter.decode(message.content), Path(folder))
        log.info("The final adapter of a run is in %s", path)
        reply = Reply()
    except FedGraftError as error:
        reply = _refusal(error)
    return Message(reply.encode(), reply_to=message)


@app.train()
def train_round(message: Message, context: Context) -> Message:
    """Train the received adapter on this client's data."""
    try:
        reply = _train(message, context)
    except DiskFullError:
        raise  # whoever runs this client decides whether others are concerned
    except FedGraftError as error:
        reply = _refusal(error)
    return Message(reply.encode(), reply_to=message)


@app.evaluate()
def evaluate_round(message: Message, context: Context) -> Message:
    """Evaluate the received adapter on this client's validation data."""
    try:
        reply = _evaluate(message, context)
    except FedGraftError as error:
        reply = _refusal(error)
    return Message(reply.encode(), reply_to=message)


def _train(message: Message, context: Context) -> Reply:
    config = Config.from_run_config(context.run_config)
    request = TrainRequest.decode(message.content)
    seat = Seat.take(context, config, request, done=False)
    work = RoundOfWork(seat)
    update = work.update()
    work.keep(update.kept)
    update = work.outgoing(update)
    tensors = update.tensors
    plan = seat.rule.plan(request.round)
    if plan.sparse:
        tensors = {name: tensor - seat.held[name] for name, tensor in tensors.items()}
    companions = update.companions
    wrapped = pack if request.packed else _as_they_are
    return Reply(
        arrays=wrapped(to_arrays(tensors, compact=plan.sparse)),
        weight=work.weight(),
        metrics=work.metrics(),
        companions=wrapped(to_arrays(companions)) if companions else None,
    )


def _as_they_are(arrays: ArrayRecord) -> ArrayRecord:
    return arrays


def _evaluate(message: Message, context: Context) -> Reply:
    config = Config.from_run_config(context.run_config)
    if config.privacy.against_server:
        raise PrivacyError(
            f"privacy.mode is {config.privacy.mode!r}, and a metric of this client's data would "
            "tell of them without noise",
            "Evaluate on data of the server's own.",
        )
    request = TrainRequest.decode(message.content)
    seat = Seat.take(context, config, request, done=True)
    task = seat.task
    split = "test" if request.split == "test" else "validation"
    metrics = evaluate(seat.model, task, seat.adapter(), split, seat.node.index)
    return Reply(weight=metrics["examples"], metrics=metrics)


def _refusal(error: FedGraftError) -> Reply:
    if isinstance(error, DataError) and is_deployed():
        # It may quote the data.
        log.error("%s", error)
        return Reply(refusal="this client's data do not fit the run; its own log says why")
    return Reply(refusal=f"{error.message} ({error.remedy})" if error.remedy else error.message)
