"""The rule interface: an aggregation method as its paper states it, as pure functions.

A rule never sees Flower, files, sampling or privacy; the host (`strategies.aggregation` on the
server, `client.app` on the client) calls it with named tensors and keeps its state. Two kinds:

- `SumOnlyRule`: a few phases, each saying what one client contributes (to be summed with weights)
  and what the server makes of the weighted mean. It never sees a single client's update, so
  constant memory, secure sums and noise on the sum hold by construction.
- `PerClientRule`: combines the list of all updates of a layer, and is refused wherever only sums
  may be seen.

The client's half, where a paper has one, is `Rule.local` (see `strategies.local`).

Notation, as in docs/strategies.md: client k holds A_k (r, d_in) and B_k (d_out, r), its weight p_k
is n_k / sum n, Abar = sum p_k A_k, and the ideal update is DW = sum p_k B_k A_k. Clients of a
smaller rank arrive padded with zeros to the server's rank, their own scaling alpha_k / r_k folded
into B_k, so that products are right as they stand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from fedgraft.adapter import Adapter, LoraLayer, Tensors
from fedgraft.config import Config
from strategies.local import A_AND_B, Factors, LocalUpdate, LocalWork
from strategies.means import weighted_mean
from strategies.options import RuleOptions
from strategies.server_optimizer import ServerOptimizer


@dataclass(frozen=True)
class Capabilities:
    """What a rule can do; `fedgraft strategies` prints it and configs are checked against it.

    Attributes:
        sum_only: needs nothing but weighted sums of client messages.
        exact: the next global product, with what joins the base, equals DW.
        mixed_ranks: clients may hold different ranks.
        base_residual: adds what the factors cannot hold to the base.
        personal: a part of the adapter stays on the client.
        quantised_base: works on a base whose weights cannot be written.
        extras: what becomes of trained tensors that are not LoRA: their "mean", "robust", or
            "personal".
        server_optimizer: factors keep their meaning from round to round, so that a server optimiser
            may step from one mean to the next.
        dora: DoRA's magnitudes may train beside the factors: nothing of the weight change
            stands outside the norm that they scale.
        any_start: factors may start from a product that is not zero, with what takes it away
            beside the base: no rule drops a part of it or takes it for something learned.
        noise: goes on as it should from updates that were clipped and noised: nothing that the
            server adds up over rounds has to agree with what clients keep.
        one_training: in a round a client sees its data in one training, and not besides.
    """

    sum_only: bool
    exact: bool = False
    mixed_ranks: bool = False
    base_residual: bool = False
    personal: bool = False
    quantised_base: bool = True
    extras: str = "mean"
    server_optimizer: bool = False
    dora: bool = True
    any_start: bool = True
    one_training: bool = True
    noise: bool = True

    @property
    def client_privacy(self) -> bool:
        """Whether a host that clips and noises sums makes the rule private by client.

        It needs nothing but sums, can take their noise, and is judged by what the server holds:
        what clients measure of parts of their own would be released unnoised.
        """
        return self.sum_only and self.noise and not self.personal


@dataclass(frozen=True)
class Plan:
    """What one round asks of the clients.

    Attributes:
        train: the factors that are trained and come back up.
        send: the factors that go down, with the extras.
        extras: whether extras train and travel up.
        derive_A: A does not travel: both sides derive it from the run's seed and compare hashes.
        sparse: many entries are zero: differences go up instead of values, and zeros take a bit.
    """

    train: Factors = A_AND_B
    send: Factors = A_AND_B
    extras: bool = True
    derive_A: bool = False
    sparse: bool = False


@dataclass(frozen=True)
class LayerUpdate(LoraLayer):
    """One client's layer.

    Attributes:
        own_rank: the rank that the client trained, at most that of the padded factors.
        companions: what the client's half of the rule sent beside the factors, by short name.
    """

    own_rank: int = 0
    companions: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerContext:
    """What clients and server both know about one layer while a round is aggregated.

    Attributes:
        name: the layer's name.
        round: counted from 1.
        current: the global factors that the round started from.
        shared: what the earlier phases of this round made, e.g. {"A": Abar, "B": Bbar}, or the
            survey of the whole adapter.
        state: the rule's own tensors for this layer, as the last round left them.
        residual: the frozen low-rank part that has joined the base so far.
        seed: the run's, for random choices that both sides or a resume must repeat.
        participation: the share of all clients that this round's updates are from.
    """

    name: str
    round: int
    current: LoraLayer
    shared: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    residual: LoraLayer | None = None
    seed: int = 0
    participation: float = 1.0


@dataclass(frozen=True)
class LayerResult:
    """A layer after aggregation.

    Attributes:
        factors: the new global factors.
        state: the rule's own tensors for this layer, for the next round.
        notes: for the log.
        residual: the frozen part beside the base from now on; None for none.
    """

    factors: LoraLayer
    state: Tensors = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    residual: LoraLayer | None = None


@dataclass(frozen=True)
class ExtraContext:
    """One extra (a tensor that is not LoRA) while a round is aggregated; see `LayerContext`."""

    name: str
    round: int
    current: Tensor
    state: Mapping[str, Tensor] = field(default_factory=dict)
    participation: float = 1.0
    shared: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExtraResult:
    """An extra after aggregation, and the rule's own tensors for it."""

    value: Tensor
    state: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class WeightedExtra:
    """One client's value of an extra, its share p_k, and its companions."""

    value: Tensor
    share: float
    companions: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """One weighted sum of a sum-only rule.

    Attributes:
        name: for messages and logs.
        contribute: what one client adds to the sum, from its update and the context.
        finish: what the server makes of the weighted mean; later phases find it in `shared`.
        start: what a client that has not moved adds: a host that clips measures from there. None:
            what `contribute` makes of the current layer.
    """

    name: str
    contribute: Callable[[LayerUpdate, LayerContext], Tensors]
    finish: Callable[[Tensors, LayerContext], Tensors]
    start: Callable[[LayerContext], Tensors] | None = None

    def unmoved(self, context: LayerContext) -> Tensors:
        """Return what a client that has not moved adds, which everybody knows."""
        if self.start is not None:
            return self.start(context)
        current = context.current
        rank = current.rank
        return self.contribute(LayerUpdate(current.A, current.B, current.scaling, rank), context)


@dataclass(frozen=True)
class WeightedLayer:
    """One client's factors of a layer and the client's share p_k of the round."""

    factors: LayerUpdate
    share: float


@dataclass(frozen=True)
class Weighing:
    """Shares that a rule gives in place of n_k / sum n, in the order of client names.

    What they lack of 1 stays with the current adapter (norm bounding); notes are for the log, and
    `shared` is found in the contexts of all layers and extras that are combined afterwards.
    """

    shares: tuple[float, ...]
    notes: tuple[str, ...] = ()
    shared: Tensors = field(default_factory=dict)


class Rule(ABC):
    """What every rule declares. Subclass `SumOnlyRule` or `PerClientRule`."""

    name: ClassVar[str]
    title: ClassVar[str]
    citation: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    Options: ClassVar[type[RuleOptions]] = RuleOptions
    prunes: ClassVar[bool] = False
    """Whether a client may lower its own rank, by sending factors of a smaller one."""
    opens: bool = False
    """Whether the later rounds stand on what clients do in the first one."""
    server_optimizer: ServerOptimizer | None = None

    def __init__(self, options: RuleOptions | None = None) -> None:
        self.options = options if options is not None else self.Options()

    @classmethod
    def build(cls, options: RuleOptions) -> Rule:
        """Return the rule for these options; a rule with variants picks one here."""
        return cls(options)

    def check(self, config: Config) -> None:  # noqa: B027 - most rules can honour any config
        """Refuse a config that the rule can't honour, naming one that can.

        Raises:
            ConfigError: what in the config does not go with this rule.
        """

    # Both sides

    def plan(self, round: int) -> Plan:
        """Return what the clients train and exchange in a round."""
        return Plan()

    # On the client

    def assemble(self, received: Tensors, companions: Tensors, kept: Tensors) -> Tensors:
        """Return the adapter that a client holds, from what came down and what it kept.

        Args:
            received: the adapter's tensors that travelled (A too, where it was derived).
            companions: what the rule sent beside them, named by `beside`.
            kept: what the rule kept on this client in its last round.
        """
        return received

    def local(self, work: LocalWork) -> LocalUpdate:
        """Do a client's round: train what the plan says and send it."""
        return LocalUpdate(work.train(work.start, work.planned).tensors)

    # On the server

    def outgoing(self, adapter: Adapter, round: int) -> Adapter:
        """Return what is sent to the clients in place of the global adapter."""
        return adapter

    def companions(self, state: Tensors, round: int) -> Tensors:
        """Return what the clients receive beside the adapter, from the rule's state.

        The state and the result are named by `beside`.
        """
        return {}

    def constants(self, state: Tensors, round: int) -> Tensors:
        """Return what every client needs once: it is sent until the client has it, and kept there.

        On the client these tensors are found among the companions.
        """
        return {}

    def companion_shapes(self, adapter: Adapter, round: int) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of what clients send beside the adapter, named by `beside`.

        The host refuses an update whose companions are others.
        """
        return {}

    def cut(self, layer: LoraLayer, rank: int) -> LoraLayer:
        """Return a layer of a smaller rank for a client; the product is `scaling * B A` as it is.

        By default the first `rank` rows of A and columns of B: factors that are averaged must keep
        their rows, so all clients train the first ones. Rules that remake the basis return the best
        approximation.
        """
        return replace(layer, A=layer.A[:rank], B=layer.B[:, :rank])

    def conclude_extra(self, mean: Tensors, context: ExtraContext) -> ExtraResult:
        """Return an extra's new value from the weighted means of "value" and its companions."""
        return ExtraResult(mean["value"])


class SumOnlyRule(Rule):
    """A rule that needs nothing but weighted means over clients."""

    @abstractmethod
    def phases(self, round: int) -> tuple[Phase, ...]:
        """Return the round's phases, in order."""

    def conclude(self, context: LayerContext) -> LayerResult:
        """Return the layer's new factors from what the phases shared ("A" and "B" by default)."""
        return LayerResult(context.current.with_factors(context.shared))


class PerClientRule(Rule):
    """A rule that needs every client's own factors."""

    @abstractmethod
    def combine(self, updates: Sequence[WeightedLayer], context: LayerContext) -> LayerResult:
        """Return the layer's new factors from all clients', in the order of client names."""

    def combine_extra(self, updates: Sequence[WeightedExtra], context: ExtraContext) -> ExtraResult:
        """Return an extra's new value from all clients'; by default from the weighted mean."""
        return self.conclude_extra(mean_of_extras(updates, context.current), context)


class SurveyingRule(PerClientRule):
    """A rule that weighs clients by their whole updates before it combines any layer."""

    @property
    def surveys(self) -> bool:
        """Whether it does so with these options: reading all updates twice has its cost."""
        return True

    @abstractmethod
    def survey(self, updates: Sequence[WeightedLayer], context: LayerContext) -> Tensor:
        """Measure one layer of all updates; measures are added up over layers and extras."""

    @abstractmethod
    def survey_extra(self, updates: Sequence[WeightedExtra], context: ExtraContext) -> Tensor:
        """Measure one extra of all updates, in the shape of `survey`'s."""

    @abstractmethod
    def weigh(self, survey: Tensor, shares: Sequence[float]) -> Weighing:
        """Return the clients' shares from the measures of the whole adapter."""


def mean_of_extras(updates: Sequence[WeightedExtra], current: Tensor) -> Tensors:
    """Return the weighted means of "value" and companions.

    What the shares lack of 1 stays with the current value.
    """
    mean = weighted_mean((u.share, {"value": u.value, **u.companions}) for u in updates)
    rest = 1.0 - sum(update.share for update in updates)
    if abs(rest) > 1e-9:  # of shares that are meant to add up to 1 only rounding is left
        mean["value"] = mean["value"] + rest * current.double()
    return mean
