"""One client's seat at a round: what it holds when a request has come, and its work for the rule.

The seat decodes a request into the adapter that this client starts from: what travelled, A where
both sides derive it, what the rule sent beside it and what it kept here. `RoundOfWork` then lets
the client's half of the rule train on the resident model and keeps what must outlive the round.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from flwr.app import Context
from torch import Tensor

from client.gradient_sketch import gradient_sketches
from client.local_noise import LocalNoise
from client.node import Node
from client.personal import PersonalStore
from client.private_round import PrivateRound
from client.trainer import Assignment, LocalResult, train
from fedgraft.adapter import Adapter, Tensors, digest, from_arrays, parse_factor
from fedgraft.config import Config
from fedgraft.devices import is_out_of_memory
from fedgraft.errors import (
    ConfigError,
    DiskFullError,
    PrivacyError,
    StoppedError,
    UpdateError,
)
from fedgraft.messages import CONSTANT, RESIDUAL, RULE, TrainRequest
from fedgraft.resident_model import ResidentModel, resident_model, resident_task
from fedgraft.tasks.task import Task
from strategies.fitness import check_privacy
from strategies.local import LocalUpdate, LocalWork, Trained, Training
from strategies.ranks import cut_factor, ranks_of
from strategies.registry import build_rule
from strategies.rule import Rule

log = logging.getLogger(__name__)
OPTIMIZER = "optimizer/"
"""Prefix of the optimizer's state in what a client keeps, beside those of the companions."""


@dataclass(frozen=True)
class Seat:
    """What a client holds in one round.

    Attributes:
        config: the run's.
        request: what the server asks.
        node: this client's place.
        task, model: the resident ones.
        rule: the run's.
        held: the adapter that the client holds, by tensor name, in the client's own rank.
        residual: what has joined the base, by tensor name.
        companions: what the rule sent beside the adapter, its constants included.
        kept: what was kept on this client in its last round, by prefix.
        store: where that lies.
    """

    config: Config
    request: TrainRequest
    node: Node
    task: Task
    model: ResidentModel
    rule: Rule
    held: Tensors
    residual: Tensors
    companions: Tensors
    kept: Tensors
    store: PersonalStore

    @classmethod
    def take(cls, context: Context, config: Config, request: TrainRequest, *, done: bool) -> Seat:
        """Decode a request.

        Args:
            context: Flower's, of this node.
            config: the run's.
            request: what the server asks.
            done: the round is done, so that what it left here counts (an evaluation).

        Raises:
            ConfigError: this node has no place in the federation.
            UpdateError: another base, another A, or an adapter that is not whole.
            RunError: what this client kept is damaged.
        """
        node = Node.of(context, config)
        task = resident_task(config)
        model = resident_model(task, config)
        if request.base_hash and request.base_hash != model.base_hash:
            raise UpdateError(
                f"this client's base {model.base_hash[:12]} is not the server's "
                f"{request.base_hash[:12]}",
                "Let model.base and model.revision name the same weights on both.",
            )
        rule = _rule(config)
        store = PersonalStore(node.personal, request.lineage or str(context.run_id), node.name)
        kept = store.load(request.round + int(done), request.counted) or {}
        beside = from_arrays(request.companions) if request.companions is not None else {}
        constants = _constants(request, beside, kept)
        fixed = _under(RESIDUAL, constants)  # what adapter.init took out of the factors
        companions = _under(RULE, beside) | {
            name: tensor for name, tensor in constants.items() if not name.startswith(RESIDUAL)
        }
        received = _received(model, request, config)
        held = rule.assemble(received, companions, _under(RULE, kept))
        _check_whole(held, model)
        residual = _under(RESIDUAL, beside) | fixed
        return cls(
            *(config, request, node, task, model, rule),
            *(held, residual, companions, kept, store),
        )

    def adapter(self, tensors: Tensors | None = None) -> Adapter:
        """Return the held adapter, or another one of its shapes, with scalings and residual."""
        scaling = self.scalings()
        made = Adapter.from_tensors(self.held if tensors is None else tensors, scaling)
        return made.with_residual(self.residual) if self.residual else made

    def scalings(self) -> dict[str, float]:
        """Return alpha / r of every layer, r the rank that this client holds."""
        model, scaling_at = self.model, self.config.adapter.scaling_at
        return {
            layer: model.scaling[layer] if rank == model.ranks[layer] else scaling_at(rank)
            for layer, rank in _layer_ranks(self.held).items()
        }


class RoundOfWork:
    """One client's training in one round, for its rule.

    Attributes:
        examples: the client's own.
        last: what the last call of training left; None before the first.

    Raises:
        ConfigError: the run's privacy cannot be had with its other settings.
        PrivacyError: the round would spend more than the budget of the client's data.
        LedgerError: the ledger of the client's data is damaged.
    """

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        node = seat.node
        self.examples = seat.task.train(node.index)
        self._keep_optimizer = seat.config.train.optimizer_state == "keep"
        self.last: LocalResult | None = None
        self._loss: float | None = None  # of a round that only looked at gradients
        self._learns = True
        check_privacy(seat.rule, seat.config)
        self._private: PrivateRound | None = None
        self._noise: LocalNoise | None = None
        request, mode = seat.request, seat.config.privacy.mode
        place = (seat.config, seat.task, node.index, request.round, request.lineage, node.ledger)
        if mode == "example":
            self._private = PrivateRound.open(*place, limits=node.limits)
        elif mode == "local":
            self._noise = LocalNoise.pay(*place, limits=node.limits)

    def update(self) -> LocalUpdate:
        """Let the client's half of the rule work, and return what it would send.

        Where a whole update is noised, a failure that may come of the data is told to nobody: the
        client then works as one that learns nothing, and noise alone leaves.

        Raises:
            RunError: the training diverged.
            StoppedError: nobody waits for the update any more.
            DiskFullError: the disk of this client is full.
        """
        rule = self._seat.rule
        if self._noise is None:
            return rule.local(self.for_rule())
        try:
            return rule.local(self.for_rule())
        except (StoppedError, DiskFullError, ConfigError, PrivacyError, UpdateError):
            raise  # none of them comes of the data
        except Exception as error:
            if is_out_of_memory(error):
                raise
            log.warning("%s: this round's update is noise alone", error)
        self._learns = False
        return rule.local(self.for_rule())

    def for_rule(self) -> LocalWork:
        """Return what the rule's client half sees."""
        seat, plan = self._seat, self._seat.rule.plan(self._seat.request.round)
        return LocalWork(
            round=seat.request.round,
            seed=seat.config.seed,
            client=seat.node.name,
            start=seat.held,
            scalings=seat.scalings(),
            scaling_at=seat.config.adapter.scaling_at,
            companions=seat.companions,
            kept=_under(RULE, seat.kept),
            plan_factors=frozenset(seat.request.train),
            plan_extras=plan.extras,
            train=self._train,
            sketch=self._sketch,
        )

    def _train(self, start: Tensors, how: Training) -> Trained:
        seat = self._seat
        if not self._learns:
            return Trained(dict(seat.adapter(start).tensors(how.factors, extras=how.extras)))
        state = _under(OPTIMIZER, seat.kept) if self._keep_optimizer else {}
        config, request = seat.config, seat.request
        work = Assignment(
            settings=config.train,
            seed=config.seed,
            round=request.round,
            rounds=max(config.federation.rounds, request.round),
            client=seat.node.name,
            how=how,
        )
        if self._private is not None:
            work = replace(work, private=self._private.pay(work.steps(len(self.examples))))
        self.last = train(
            seat.model, seat.task, self.examples, seat.adapter(start), work, state or None
        )
        return self.last

    def _sketch(
        self, probes: Mapping[str, tuple[Tensor, Tensor]]
    ) -> Mapping[str, tuple[Tensor, Tensor]]:
        seat = self._seat
        if self._private is not None:
            raise PrivacyError(
                f"{seat.rule.name} asks for the data's gradient as it is, and privacy.mode is "
                '"example"',
                "Use another rule, or another mode.",
            )
        if not self._learns:
            return {
                name: (
                    psi.new_zeros(psi.shape[1], omega.shape[1]),
                    psi.new_zeros(len(psi), len(omega)),
                )
                for name, (omega, psi) in probes.items()
            }
        sketches, self._loss = gradient_sketches(
            seat.model, seat.task, self.examples, seat.adapter(), probes
        )
        return sketches

    def keep(self, kept: Tensors) -> None:
        """Save what the rule and the optimizer keep on this client, and the rule's constants.

        Raises:
            RunError: the disk is full.
        """
        seat = self._seat
        whole = _prefixed(RULE, kept)
        if self._keep_optimizer and self.last is not None:
            whole |= _prefixed(OPTIMIZER, self.last.optimizer)
        if seat.request.constants_hash:
            beside = seat.request.companions
            new = _under(CONSTANT, from_arrays(beside)) if beside is not None else {}
            whole |= _prefixed(CONSTANT, new or _under(CONSTANT, seat.kept))
        if whole:
            seat.store.save(whole, seat.request.round, seat.request.durable_round)

    def outgoing(self, update: LocalUpdate) -> LocalUpdate:
        """Return what leaves of the rule's update: all of it, or what noise has covered."""
        if self._noise is None:
            return update
        return self._noise.cover(update, self._seat.held, self._seat.companions)

    def weight(self) -> float:
        """Return how much this client counts: its examples, or 1 under privacy.

        The number of examples would be a release of its own, and under privacy by client the server
        weighs all alike.
        """
        return float(len(self.examples)) if self._seat.config.privacy.mode == "none" else 1.0

    def metrics(self) -> dict[str, float]:
        """Return the round's agreed numbers: the last training's loss, steps and seconds.

        Under privacy steps, the epsilon of all that these data have ever been asked and what their
        owner leaves of it: a loss, or how long the batches drawn took, would say more than the
        noise lets through. Where a whole update is noised, not even steps, which may tell how many
        examples there are.
        """
        if self._noise is not None:
            return self._noise.account.told()
        if self._private is not None:
            steps = float(self.last.steps) if self.last is not None else 0.0
            return {"steps": steps} | self._private.ledger.told()
        if self.last is None:
            loss = {} if self._loss is None else {"loss": self._loss}
            return {**loss, "steps": 0.0, "seconds": 0.0}
        last = self.last
        return {"loss": last.loss, "steps": float(last.steps), "seconds": last.seconds}


@lru_cache(maxsize=8)
def _rule_of(text: str) -> Rule:
    strategy = Config.from_run_config({"fedgraft.config": text}).strategy
    return build_rule(strategy.name, strategy.options)


def _rule(config: Config) -> Rule:
    """Build the run's rule once and not with every message."""
    return _rule_of(config.to_json())


def _received(model: ResidentModel, request: TrainRequest, config: Config) -> Tensors:
    """Return the tensors that travelled, and A where both sides derive it from the seed."""
    received = request.tensors()
    if request.a_hash:
        derived = model.derived_A(config.seed)
        if digest(derived) != request.a_hash:
            raise UpdateError(
                "the A factors derived from the seed are not the server's",
                "Let both sides run the same FedGraft and numpy versions.",
            )
        own = _layer_ranks(received)
        received |= {
            name: cut_factor(name, A, own.get(_layer(name))) for name, A in derived.items()
        }
    return received


def _constants(request: TrainRequest, beside: Tensors, kept: Tensors) -> Tensors:
    """Return what the rule sends only once: from this message, or from an earlier one.

    Raises:
        UpdateError: neither has them; the server sends them again after such an answer.
    """
    if not request.constants_hash:
        return {}
    constants = _under(CONSTANT, beside) or _under(CONSTANT, kept)
    if digest(constants) != request.constants_hash:
        raise UpdateError(
            "this client no longer has what the rule sends once",
            "The server sends it again in the next round.",
        )
    return constants


def _layer_ranks(tensors: Tensors) -> dict[str, int]:
    """Return the rank of every layer that has factors here."""
    return {_layer(name): rank for name, rank in ranks_of(tensors).items()}


def _layer(name: str) -> str:
    parsed = parse_factor(name)
    return parsed[0] if parsed is not None else ""


def _check_whole(held: Tensors, model: ResidentModel) -> None:
    unknown = [name for name in held if name not in model.parameters]
    missing = [name for name in model.parameters if name not in held]
    if unknown or missing:
        name = (missing or unknown)[0]
        kind = "factor" if parse_factor(name) else "extra"
        raise UpdateError(
            f"the server's adapter {'lacks' if missing else 'has an unknown'} {kind} {name!r}",
            "Let adapter.targets and the task be the same on both sides.",
        )


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}
