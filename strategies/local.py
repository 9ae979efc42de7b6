"""The client's half of a rule: what it trains from, how, and what it sends and keeps.

Most rules leave all of it as it is: train what came, send what was trained. A rule that differs
overrides `Rule.local`, a function of a `LocalWork` that may call `work.train` as often as its paper
does. The client's host gives it a resident model behind that call; the rule never sees a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedgraft.adapter import Tensors

Factors = frozenset[str]
A_AND_B: Factors = frozenset({"A", "B"})
A_ONLY: Factors = frozenset({"A"})
B_ONLY: Factors = frozenset({"B"})

_SEPARATOR = "::"
"""Between a layer (or an extra) and a name of the rule's own; no module path holds it."""


def beside(layer: str, name: str) -> str:
    """Return the name of a rule's own tensor that belongs to a layer or an extra."""
    return f"{layer}{_SEPARATOR}{name}"


def of_layer(layer: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return a layer's own of the tensors named by `beside`, under their short names."""
    prefix = layer + _SEPARATOR
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def owner_of(name: str) -> str:
    """Return the layer or extra that a tensor named by `beside` belongs to; "" for any other."""
    owner, separator, _ = name.partition(_SEPARATOR)
    return owner if separator else ""


@dataclass(frozen=True)
class Training:
    """How one call of local training differs from the plain loop.

    Attributes:
        factors: the factors that train, of "A" and "B".
        extras: whether the extras train.
        penalty: a term added to the loss at every step, as a function of the parameters by name;
            its gradient joins the batch's before clipping.
        masks: by tensor name, 1 where an entry may move and 0 where it stays.
        rates: by factor ("A", "B"), what its learning rate is multiplied by.
        bases: by tensor name, a fixed matrix U (d, m): the tensor is U C and C (m, r) trains.
        epochs: passes over the client's data instead of the config's steps or epochs.
    """

    factors: Factors = A_AND_B
    extras: bool = True
    penalty: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    bases: Mapping[str, Tensor] = field(default_factory=dict)
    epochs: float | None = None


@dataclass(frozen=True)
class Trained:
    """What one call of local training leaves.

    Attributes:
        tensors: what was trained, float32, on the CPU.
        rate: the learning rates of all its steps, added up.
        cores: C (m, r) of every tensor that trained behind a basis.
    """

    tensors: Tensors
    rate: float = 0.0
    cores: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class LocalWork:
    """One client's round, as a rule sees it.

    Attributes:
        round: counted from 1.
        seed: the run's.
        client: the client's name.
        start: the adapter that the client holds, by tensor name, in the client's own rank.
        scalings: alpha / r of every layer, r the client's own rank.
        scaling_at: the scaling that any other rank has, for a client that lowers its own.
        companions: what the rule sent beside the adapter, named by `beside`.
        kept: what the rule kept on this client in its last round; empty in its first.
        plan_factors: the factors that the round's plan trains.
        plan_extras: whether the plan trains extras.
        train: trains on the client's examples from the given tensors.
        sketch: returns linear sketches of the loss's gradient G (d_out, d_in) by the frozen weight
            of every LoRA layer, at the start: from Omega (d_in, m) and Psi (l, d_out), by layer
            name, the pair (G Omega, Psi G), means over the client's examples.
    """

    round: int
    seed: int
    client: str
    start: Tensors
    scalings: Mapping[str, float]
    scaling_at: Callable[[int], float]
    companions: Tensors
    kept: Tensors
    plan_factors: Factors
    plan_extras: bool
    train: Callable[[Tensors, Training], Trained]
    sketch: Callable[[Mapping[str, tuple[Tensor, Tensor]]], Mapping[str, tuple[Tensor, Tensor]]]

    @property
    def planned(self) -> Training:
        """The training that the round's plan asks for."""
        return Training(factors=self.plan_factors, extras=self.plan_extras)


@dataclass(frozen=True)
class LocalUpdate:
    """What a client sends and keeps after a round.

    Attributes:
        tensors: the trained adapter tensors that go up, by name.
        companions: the rule's own tensors that go up beside them, named by `beside`.
        kept: the rule's own tensors that stay on this client until its next round.
    """

    tensors: Tensors
    companions: Tensors = field(default_factory=dict)
    kept: Tensors = field(default_factory=dict)
