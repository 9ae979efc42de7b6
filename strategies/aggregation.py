"""The layer-wise host of a rule: from a round's spooled updates to the next global adapter.

Layers are taken one at a time and sums are folded one client at a time, in the order of client
names, so that the order of arrival changes nothing and, for a sum-only rule, memory does not grow
with the number of clients. Factors are read as float32 whatever travelled, sums run in float64, and
results are float32: the mean of equal updates is that update, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedgraft.adapter import Adapter, LoraLayer, Tensors
from fedgraft.errors import RunError
from strategies.means import weighted_mean
from strategies.rule import (
    Factors,
    LayerContext,
    LayerResult,
    PerClientRule,
    Rule,
    SumOnlyRule,
)
from strategies.spool import UpdateSpool

_SEPARATOR = "::"
"""Between layer and name in the host's flat state; no module path holds it."""


@dataclass(frozen=True)
class Aggregated:
    """What a round makes of its updates.

    Attributes:
        adapter: the next global adapter, in float32.
        state: the rule's own tensors, named "<layer>::<tensor>", for the next round.
        notes: what the rule has to say for the log, each naming its layer.
    """

    adapter: Adapter
    state: Tensors
    notes: tuple[str, ...]


@torch.no_grad()
def aggregate(
    rule: Rule, spool: UpdateSpool, current: Adapter, state: Tensors, round: int
) -> Aggregated:
    """Aggregate the updates of a round, layer by layer; extras become their weighted means.

    Args:
        rule: the rule; only the factors that its plan trains are taken from the updates.
        spool: the validated updates.
        current: the global adapter that the round started from.
        state: the rule's tensors, as the last round's `Aggregated.state` left them.
        round: counted from 1.

    Raises:
        RunError: there is no update.
        TypeError: the rule is neither a SumOnlyRule nor a PerClientRule.
    """
    if not spool.clients:
        raise RunError(f"round {round} has no update to aggregate", "See which clients failed.")
    factors = rule.plan(round).train
    layers: dict[str, LoraLayer] = {}
    next_state: Tensors = {}
    notes: list[str] = []
    for name, layer in current.layers.items():
        context = LayerContext(name, round, _float32(layer), state=_state_of(name, state))
        if isinstance(rule, SumOnlyRule):
            result = _by_sums(rule, spool, context, factors)
        elif isinstance(rule, PerClientRule):
            updates = list(spool.updates(name, context.current, factors))
            result = rule.combine(updates, context)
        else:
            raise TypeError(f"{type(rule).__name__} is neither a SumOnlyRule nor a PerClientRule")
        layers[name] = _float32(result.factors)
        next_state |= {f"{name}{_SEPARATOR}{key}": value for key, value in result.state.items()}
        notes += [f"{name}: {note}" for note in result.notes]
    extras = {name: _mean_extra(spool, name) for name in current.extras}
    return Aggregated(Adapter(layers, extras), next_state, tuple(notes))


def _by_sums(
    rule: SumOnlyRule, spool: UpdateSpool, context: LayerContext, factors: Factors
) -> LayerResult:
    """Run a sum-only rule's phases; what a phase shares is rounded as if it were broadcast."""
    for phase in rule.phases(context.round):
        mean = weighted_mean(
            (update.share, phase.contribute(update.factors, context))
            for update in spool.updates(context.name, context.current, factors)
        )
        made = {name: tensor.float() for name, tensor in phase.finish(mean, context).items()}
        context = replace(context, shared={**context.shared, **made})
    return rule.conclude(context)


def _mean_extra(spool: UpdateSpool, name: str) -> Tensor:
    terms = ((share, {name: spool.extra(client, name)}) for client, share in spool.shares.items())
    return weighted_mean(terms)[name].float()


def _float32(layer: LoraLayer) -> LoraLayer:
    return layer.with_factors({"A": layer.A.float(), "B": layer.B.float()})


def _state_of(layer: str, state: Tensors) -> Tensors:
    prefix = layer + _SEPARATOR
    return {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
