"""The ClientApp: the same one in process, under Ray and deployed.

It decodes a request, has the resident model trained or evaluated, and encodes the answer. What it
cannot do it answers with a refusal that says why; the server counts it and goes on.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.personal import PersonalStore
from client.trainer import Assignment, train
from fedgraft.adapter import Adapter, Tensors, digest, parse_factor, to_arrays
from fedgraft.config import Config
from fedgraft.errors import ConfigError, DiskFullError, FedGraftError, UpdateError
from fedgraft.messages import Hello, Reply, TrainRequest
from fedgraft.resident_model import ResidentModel, resident_model, resident_task
from fedgraft.run_directory import PERSONAL_KEY
from fedgraft.tasks.task import Task

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Answer with this client's name."""
    config = Config.from_run_config(context.run_config)
    index = _partition(context, config)
    description = resident_task(config).describe(index)
    return Message(Hello(str(index), description).encode(), reply_to=message)


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
    index = _partition(context, config)
    request = TrainRequest.decode(message.content)
    task, model = _resident(config, request)
    store = _personal_store(context, request, str(index))
    keep = config.train.optimizer_state == "keep"
    examples = task.train(index)
    trained = train(
        model,
        task,
        examples,
        _start(model, request, config),
        Assignment(
            settings=config.train,
            seed=config.seed,
            round=request.round,
            rounds=max(config.federation.rounds, request.round),
            client=str(index),
            factors=frozenset(request.train),
        ),
        optimizer_state=store.load(before=request.round) if keep else None,
    )
    if keep:
        store.save(trained.optimizer, request.round, request.durable_round)
    return Reply(
        arrays=to_arrays(trained.tensors),
        weight=float(len(examples)),
        metrics={
            "loss": trained.loss,
            "steps": float(trained.steps),
            "seconds": trained.seconds,
        },
    )


def _evaluate(message: Message, context: Context) -> Reply:
    config = Config.from_run_config(context.run_config)
    index = _partition(context, config)
    request = TrainRequest.decode(message.content)
    task, model = _resident(config, request)
    examples = task.validation(index)
    adapter = Adapter.from_tensors(_start(model, request, config), config.adapter.scaling)
    metrics = model.evaluate(task, adapter, examples)
    return Reply(weight=float(len(examples)), metrics=metrics)


def _refusal(error: FedGraftError) -> Reply:
    return Reply(refusal=f"{error.message} ({error.remedy})" if error.remedy else error.message)


def _resident(config: Config, request: TrainRequest) -> tuple[Task, ResidentModel]:
    task = resident_task(config)
    model = resident_model(task, config)
    if request.base_hash and request.base_hash != model.base_hash:
        raise UpdateError(
            f"this client's base {model.base_hash[:12]} is not the server's "
            f"{request.base_hash[:12]}",
            "Let model.base and model.revision name the same weights on both.",
        )
    return task, model


def _start(model: ResidentModel, request: TrainRequest, config: Config) -> Tensors:
    """Return every trainable tensor: those that travelled, and A where both sides derive it."""
    start = request.tensors()
    if request.a_hash:
        derived = model.derived_A(config.seed)
        if digest(derived) != request.a_hash:
            raise UpdateError(
                "the A factors derived from the seed are not the server's",
                "Let both sides run the same FedGraft and numpy versions.",
            )
        start |= derived
    unknown = [name for name in start if name not in model.parameters]
    missing = [name for name in model.parameters if name not in start]
    if unknown or missing:
        name = (missing or unknown)[0]
        kind = "factor" if parse_factor(name) else "extra"
        raise UpdateError(
            f"the server's adapter {'lacks' if missing else 'has an unknown'} {kind} {name!r}",
            "Let adapter.targets and the task be the same on both sides.",
        )
    return start


def _partition(context: Context, config: Config) -> int:
    """Return which partition of the data this client holds; in a simulation that is its name."""
    partition = context.node_config.get("partition-id")
    of = context.node_config.get("num-partitions", config.federation.clients)
    if partition is None:
        raise ConfigError("this node has no partition-id", "Start it with --node-config.")
    if int(of) != config.federation.clients:
        raise ConfigError(
            f"the federation has {of} nodes, but federation.clients is {config.federation.clients}",
            f"Set federation.clients={of}, or start as many nodes as it says.",
        )
    return int(partition)


def _personal_store(context: Context, request: TrainRequest, client: str) -> PersonalStore:
    given = str(context.run_config.get(PERSONAL_KEY) or "")
    folder = Path(given) if given else Path.home() / ".fedgraft" / "personal"
    return PersonalStore(folder, request.lineage or str(context.run_id), client)
