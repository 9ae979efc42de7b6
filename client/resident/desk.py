"""One order answered: by the client's policy first, then by the very same `client.app`."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from flwr.app import Context, Message, MessageType, MetricRecord, RecordDict

from client.app import app
from client.node import memory_of
from client.policy import DESCRIPTION, EXAMPLES, MEMORY, Policy, RoundsBegun
from client.resident.orders import Asked, decode, encode
from client.resident.own import Own
from client.resident.trainer_pb2 import Order
from fedgraft.config import RUN_CONFIG_KEY
from fedgraft.devices import is_out_of_memory
from fedgraft.errors import NO_MEMORY, FedGraftError, RunError, StoppedError
from fedgraft.flower import set_identity, set_message_id
from fedgraft.messages import HELLO, KEEP, METRICS, SPENT, WEIGHT, Hello, Reply, TrainRequest
from fedgraft.refusal import CONFIG, REFUSAL

log = logging.getLogger(__name__)
_NODE = 2  # any: the relay's message has the true one


@dataclass(frozen=True)
class Answer:
    """What an order is answered with.

    Attributes:
        content: the reply's records, as they travel.
        out_of_memory: whether memory has run out, after which a new process is better than this.
    """

    content: bytes
    out_of_memory: bool = False


@dataclass(frozen=True)
class Desk:
    """Answers orders for one client, on its own data and base, within its policy."""

    own: Own

    def answer(self, order: Order) -> Answer:
        """Do what an order asks, or say why not; nothing is raised but a stop.

        Raises:
            StoppedError: nobody waits for the answer any more.
        """
        try:
            content = self._do(order)
            reason = _refusal_in(content)
        except StoppedError:
            raise
        except FedGraftError as error:
            reason = error.message
            content = self._refusal(order, reason)
        except Exception as error:
            if is_out_of_memory(error):
                log.error("out of memory: %s", error)
                reason = f"{NO_MEMORY} on this client"
            else:
                log.exception("an order of type %s failed", order.kind)
                reason = f"the trainer failed ({type(error).__name__}); its own log says where"
            content = self._refusal(order, reason)
        if reason:
            what = "only the name was told" if order.kind == HELLO else "refused"
            log.warning("%s: %s", what, reason)
        return Answer(encode(content), reason.startswith(NO_MEMORY))

    def name_only(self) -> Answer:
        """Answer the question who this is with the name alone."""
        return Answer(encode(Hello(self.own.name).encode()))

    def _do(self, order: Order) -> RecordDict:
        asked = decode(order)
        policy = Policy.load(self.own.policy_file)
        if asked.kind == HELLO:
            return self._hello(asked, policy)
        policy.check_run(self.own.name, asked.config)
        if asked.kind == KEEP:
            return self._handle(asked, policy)
        if asked.kind == SPENT:
            return _allowed(self._handle(asked, policy), policy)
        request = TrainRequest.decode(asked.content)
        policy.check_base(self.own.name, request.base_hash)
        if asked.kind == MessageType.TRAIN:
            policy.check_budget(self.own.name, self.own.ledger)
            rounds = RoundsBegun(self.own.rounds)
            rounds.begin(self.own.name, policy.rounds_per_day)
        log.info("%s, round %d of run %d", asked.kind, request.round, asked.run)
        reply = self._handle(asked, policy)
        return _allowed(reply, policy)

    def _hello(self, asked: Asked, policy: Policy) -> RecordDict:
        """Say who this is, and of its data and machine what the policy allows."""
        memory = memory_of({}) if policy.allows(MEMORY) else 0
        description = ""
        if policy.allows(DESCRIPTION):
            policy.check_run(self.own.name, asked.config)
            said = self._handle(asked, policy)
            if reason := _refusal_in(said):
                raise RunError(reason)
            description = Hello.decode(said).description
        return Hello(self.own.name, description, memory).encode()

    def _refusal(self, order: Order, reason: str) -> RecordDict:
        """Say no; to the question who this is there is always an answer."""
        if order.kind == HELLO:
            return Hello(self.own.name).encode()
        return Reply(refusal=reason).encode()

    def _handle(self, asked: Asked, policy: Policy) -> RecordDict:
        """Let the ClientApp answer, in a context of the client's own making."""
        set_identity(asked.run, _NODE)
        message = Message(asked.content, _NODE, asked.kind)
        set_message_id(message, "order")
        config = self.own.config(asked.config)
        context = Context(
            asked.run,
            _NODE,
            self.own.node_config(policy),
            RecordDict(),
            {RUN_CONFIG_KEY: config.to_json()},
        )
        reply: Message = app(message=message, context=context)
        return reply.content


def _allowed(content: RecordDict, policy: Policy) -> RecordDict:
    """Leave out the metrics that may not leave."""
    metrics = content.get(METRICS)
    if isinstance(metrics, MetricRecord):
        kept = {name: value for name, value in metrics.items() if policy.allows(name)}
        kept[WEIGHT] = metrics[WEIGHT] if policy.allows(EXAMPLES) else 1.0
        content[METRICS] = MetricRecord(kept)
    return content


def _refusal_in(content: RecordDict) -> str:
    config = content.config_records.get(CONFIG)
    return "" if config is None else str(config.get(REFUSAL, ""))
