"""The rule interface: an aggregation method as its paper states it, as pure functions.

A rule never sees Flower, files, sampling or privacy; the host (`strategies.aggregation`) calls it
layer by layer with named tensors and keeps its state. Two kinds:

- `SumOnlyRule`: a few phases, each saying what one client contributes (to be summed with weights)
  and what the server makes of the weighted mean. It never sees a single client's update, so
  constant memory, secure sums and noise on the sum hold by construction.
- `PerClientRule`: combines the list of all updates of a layer, and is refused wherever only sums
  may be seen.

Notation, as in docs/strategies.md: client k holds A_k (r, d_in) and B_k (d_out, r), its weight p_k
is n_k / sum n, Abar = sum p_k A_k, and the ideal update is DW = sum p_k B_k A_k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fedgraft.adapter import LoraLayer, Tensors
from fedgraft.config import Group

Factors = frozenset[str]
A_AND_B: Factors = frozenset({"A", "B"})
B_ONLY: Factors = frozenset({"B"})


class RuleOptions(Group):
    """The options of one rule, written `strategy.<option>`; a rule without any uses this."""


@dataclass(frozen=True)
class Capabilities:
    """What a rule can do; `fedgraft strategies` prints it and configs are checked against it.

    Attributes:
        sum_only: needs nothing but weighted sums of client messages.
        exact: the next global product B A equals DW.
        mixed_ranks: clients may hold different ranks.
        base_residual: adds what the factors cannot hold to the base.
        personal: a part of the adapter stays on the client.
    """

    sum_only: bool
    exact: bool = False
    mixed_ranks: bool = False
    base_residual: bool = False
    personal: bool = False


@dataclass(frozen=True)
class Plan:
    """What one round asks of the clients.

    Attributes:
        train: the factors that are trained and come back up; extras always are.
        send: the factors that go down, with the extras.
        derive_A: A does not travel: both sides derive it from the run's seed and compare hashes.
    """

    train: Factors = A_AND_B
    send: Factors = A_AND_B
    derive_A: bool = False


@dataclass(frozen=True)
class LayerContext:
    """What clients and server both know about one layer while a round is aggregated.

    Attributes:
        name: the layer's name.
        round: counted from 1.
        current: the global factors that the round started from.
        shared: what the earlier phases of this round made, e.g. {"A": Abar, "B": Bbar}.
        state: the rule's own tensors for this layer, as the last round left them.
    """

    name: str
    round: int
    current: LoraLayer
    shared: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerResult:
    """A layer after aggregation: new factors, the rule's state for it, and notes for the log."""

    factors: LoraLayer
    state: Tensors = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Phase:
    """One weighted sum of a sum-only rule.

    Attributes:
        name: for messages and logs.
        contribute: what one client adds to the sum, from its update and the context.
        finish: what the server makes of the weighted mean; later phases find it in `shared`.
    """

    name: str
    contribute: Callable[[LoraLayer, LayerContext], Tensors]
    finish: Callable[[Tensors, LayerContext], Tensors]


@dataclass(frozen=True)
class WeightedLayer:
    """One client's factors of a layer and the client's share p_k of the round."""

    factors: LoraLayer
    share: float


class Rule(ABC):
    """What every rule declares. Subclass `SumOnlyRule` or `PerClientRule`."""

    name: ClassVar[str]
    title: ClassVar[str]
    citation: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    Options: ClassVar[type[RuleOptions]] = RuleOptions

    def __init__(self, options: RuleOptions | None = None) -> None:
        self.options = options if options is not None else self.Options()

    @classmethod
    def build(cls, options: RuleOptions) -> Rule:
        """Return the rule for these options; a rule with variants picks one here."""
        return cls(options)

    def plan(self, round: int) -> Plan:
        """Return what the clients train and exchange in a round."""
        return Plan()


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
