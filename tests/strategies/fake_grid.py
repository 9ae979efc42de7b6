"""A Grid in memory whose nodes are functions: honest clients, and any kind of bad ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedgraft.adapter import Adapter, LoraLayer, Tensors, to_arrays
from fedgraft.flower import set_identity, set_message_id
from fedgraft.messages import HELLO, Hello, Reply, TrainRequest
from fedgraft.seeds import stream
from strategies.rounds import RoundHooks, RoundOutcome, StrategyState
from strategies.strategy import AdapterStrategy

Answer = RecordDict | Error | None
Node = Callable[[Message], Answer]
"""What a node does with a message; None is silence."""


class FakeGrid(Grid):
    """Nodes by id; replies come one at a time, in an order that a seed shuffles.

    Like Flower's own grid it goes through the pushed messages twice, and returns None as the id of
    a message to a node that is not there.
    """

    def __init__(self, nodes: dict[int, Node], shuffle: int = 0) -> None:
        self.nodes = nodes
        self.sent: list[Message] = []
        self._rng = np.random.default_rng(shuffle)
        self._ids = count(1)
        self._replies: dict[str, Message] = {}
        self._run = Run.create_empty(1)
        set_identity(1)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(self, *_: object, **__: object) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            set_message_id(message, f"m{next(self._ids)}")
        ids = []
        for message in messages:
            self.sent.append(message)
            node = self.nodes.get(message.metadata.dst_node_id)
            ids.append(message.metadata.message_id if node else None)
            answer = node(message) if node else None
            if answer is not None:
                reply = Message(answer, reply_to=message)
                self._replies[message.metadata.message_id] = reply
        return ids  # type: ignore[return-value]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        waiting = sorted(set(message_ids) & self._replies.keys())
        return [self._replies.pop(str(self._rng.choice(waiting)))] if waiting else []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        ids = {i for i in self.push_messages(list(messages)) if i}
        found: list[Message] = []
        while replies := list(self.pull_messages(ids)):
            found += replies
        return found


def small_adapter(*, d: int = 4, r: int = 2, layers: int = 2, extras: bool = True) -> Adapter:
    """An adapter of square layers, and a head unless there is to be none."""
    rng = np.random.default_rng(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).float()

    pairs = {f"m.layers.{k}.q": LoraLayer(normal(r, d), normal(d, r), 2.0) for k in range(layers)}
    return Adapter(pairs, {"m.head.weight": normal(3, d)} if extras else {})


@dataclass
class Client:
    """An honest client: what it answers is a function of its name, the round and what it was sent.

    Attributes:
        name: its own.
        weight: examples.
        whole: what it would know without being told, for tensors that do not travel.
        heard: the requests to train, as they came.
    """

    name: str
    weight: float = 10.0
    whole: Adapter | None = None
    heard: list[TrainRequest] = field(default_factory=list)

    def trained(self, request: TrainRequest) -> Tensors:
        """Return what it was sent with something of its own added, by the factors that train."""
        rng = stream(0, "fake", round=request.round, client=self.name)
        known = self.whole.tensors() if self.whole is not None else {}
        tensors = known | request.tensors()
        made = {}
        for name, tensor in tensors.items():
            own = torch.from_numpy(rng.standard_normal(tensor.shape)).float()
            if not any(f"lora_{f}" in name for f in "AB" if f not in request.train):
                made[name] = tensor + 0.1 * own
        return made

    def reply(self, request: TrainRequest) -> Answer:
        metrics = {"loss": self.weight / 7 / request.round, "steps": 5.0}
        return Reply(to_arrays(self.trained(request)), self.weight, metrics).encode()

    def __call__(self, message: Message) -> Answer:
        kind = message.metadata.message_type
        if kind == HELLO:
            return Hello(self.name, f"data of {self.name}").encode()
        request = TrainRequest.decode(message.content)
        if kind == "evaluate":
            return Reply(weight=self.weight, metrics={"accuracy": 0.1 * len(self.name)}).encode()
        self.heard.append(request)
        return self.reply(request)


@dataclass
class Bad(Client):
    """A client that answers a request to train with whatever `answer` makes of its honest reply.

    Attributes:
        answer: takes the tensors of an honest update.
    """

    answer: Callable[[Tensors], Answer] = lambda tensors: None

    def reply(self, request: TrainRequest) -> Answer:
        return self.answer(self.trained(request))


START = small_adapter()
ARRAYS = to_arrays(START.tensors())
NAMES = ("0", "1", "2", "3")
A0, B1, HEAD = "m.layers.0.q.lora_A.weight", "m.layers.1.q.lora_B.weight", "m.head.weight"


@dataclass
class Seen(RoundHooks):
    """Keeps what the strategy tells."""

    outcomes: list[RoundOutcome] = field(default_factory=list)
    descriptions: dict[str, str] = field(default_factory=dict)
    replies: list[tuple[int, str, str]] = field(default_factory=list)
    stop_after: int = 99
    durable: int = 0

    def durable_round(self) -> int:
        return self.durable

    def on_start(self, outcome: RoundOutcome, descriptions: Mapping[str, str]) -> None:
        self.outcomes.append(outcome)
        self.descriptions = dict(descriptions)

    def on_reply(self, round: int, client: str, trouble: str) -> None:
        self.replies.append((round, client, trouble))

    def on_round(self, outcome: RoundOutcome) -> bool:
        self.outcomes.append(outcome)
        return outcome.state.round >= self.stop_after

    @property
    def last(self) -> RoundOutcome:
        return self.outcomes[-1]


def nodes(names: tuple[str, ...] = NAMES, first: int = 100, **clients: Node) -> dict[int, Node]:
    """Honest clients on nodes 100, 101, ..., and others in place of some of them."""
    return {
        first + k: clients.get(f"c{name}", Client(name, weight=10.0 + k))
        for k, name in enumerate(names)
    }


def run(
    rule: Any = "fedavg",
    *,
    grid: FakeGrid | None = None,
    rounds: int = 1,
    start: Adapter = START,
    resume: StrategyState | None = None,
    **options: Any,
) -> Seen:
    seen = options.pop("hooks", None) or Seen()
    options = {"deadline": 0.3, "scaling": 2.0} | options
    strategy = AdapterStrategy(rule, hooks=seen, **options)
    grid = grid or FakeGrid(nodes())
    strategy.start(grid, to_arrays(start.tensors()), num_rounds=rounds, resume=resume)
    return seen
