"""The layer-wise host of a rule: from a round's spooled updates to the next global adapter.

Layers are taken one at a time and sums are folded one client at a time, in the order of client
names, so that the order of arrival changes nothing and, for a sum-only rule, memory does not grow
with the number of clients. Factors are read as float32 whatever travelled, sums run in float64, and
results are float32: the mean of equal updates is that update, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedgraft.adapter import Adapter, LoraLayer, Tensors
from fedgraft.errors import RunError
from strategies.local import Factors, beside, of_layer
from strategies.means import weighted_mean
from strategies.rule import (
    ExtraContext,
    ExtraResult,
    LayerContext,
    LayerResult,
    PerClientRule,
    Rule,
    SumOnlyRule,
    SurveyingRule,
    WeightedExtra,
    WeightedLayer,
)
from strategies.server_optimizer import ServerOptimizer
from strategies.spool import UpdateSpool

_STEP = "server-optimizer."
"""Prefix of the server optimiser's buffers in a layer's state, beside the rule's own tensors."""


@dataclass(frozen=True)
class Aggregated:
    """What a round makes of its updates.

    Attributes:
        adapter: the next global adapter, in float32.
        state: the rule's own tensors, named by `strategies.local.beside`, for the next round.
        notes: what the rule has to say for the log, each naming its layer.
    """

    adapter: Adapter
    state: Tensors
    notes: tuple[str, ...]


@torch.no_grad()
def aggregate(
    rule: Rule,
    spool: UpdateSpool,
    current: Adapter,
    state: Tensors,
    round: int,
    *,
    seed: int = 0,
    participation: float = 1.0,
) -> Aggregated:
    """Aggregate the updates of a round, layer by layer.

    Args:
        rule: the rule; only what its plan trains is taken from the updates.
        spool: the validated updates.
        current: the global adapter that the round started from.
        state: the rule's tensors, as the last round's `Aggregated.state` left them.
        round: counted from 1.
        seed: the run's.
        participation: the share of all clients that the updates are from.

    Raises:
        RunError: there is no update.
        TypeError: the rule is neither a SumOnlyRule nor a PerClientRule.
    """
    if not spool.clients:
        raise RunError(f"round {round} has no update to aggregate", "See which clients failed.")
    return RoundHost(rule, spool, current, state, round, seed, participation).aggregate()


@dataclass
class RoundHost:
    """One round of a rule; see `aggregate` for the fields."""

    rule: Rule
    spool: UpdateSpool
    current: Adapter
    state: Tensors
    round: int
    seed: int
    participation: float
    shares: tuple[float, ...] | None = None  # where the rule gives others than n_k / sum n
    surveyed: Tensors = field(default_factory=dict)  # what its survey shares with every layer

    def aggregate(self) -> Aggregated:
        """Take layer by layer, then extra by extra."""
        plan, notes = self.rule.plan(self.round), self._weigh()
        layers: dict[str, LoraLayer] = {}
        residual: dict[str, LoraLayer] = {}
        next_state: Tensors = {}
        for name in self.current.layers:
            context = self._context(name)
            result = self._stepped(self._layer(context, plan.train), context, plan.train)
            layers[name] = _float32(result.factors)
            beside_base = self.current.residual.get(name)  # fixed, unless the rule adds to it
            if self.rule.capabilities.base_residual:
                beside_base = result.residual and _float32(result.residual)
            if beside_base is not None:
                residual[name] = beside_base
            next_state |= {beside(name, key): value for key, value in result.state.items()}
            notes += [f"{name}: {note}" for note in result.notes]
        extras: Tensors = {}
        for name, value in self.current.extras.items():
            own = of_layer(name, self.state)
            made = ExtraResult(value, own)
            if plan.extras:
                at = self._extra_context(name)
                made = self._stepped_extra(self._extra(at), at, own)
            extras[name] = made.value.float()
            next_state |= {beside(name, key): tensor for key, tensor in made.state.items()}
        return Aggregated(Adapter(layers, extras, residual), next_state, tuple(notes))

    # One layer

    def _context(self, name: str) -> LayerContext:
        residual = self.current.residual.get(name)
        return LayerContext(
            name,
            self.round,
            _float32(self.current.layers[name]),
            shared=self.surveyed,
            state={k: t for k, t in of_layer(name, self.state).items() if not k.startswith(_STEP)},
            residual=None if residual is None else _float32(residual),
            seed=self.seed,
            participation=self.participation,
        )

    def _updates(self, context: LayerContext, factors: Factors) -> Iterator[WeightedLayer]:
        updates = self.spool.updates(context.name, context.current, factors)
        if self.shares is None:
            yield from updates
            return
        for update, share in zip(updates, self.shares, strict=True):
            yield replace(update, share=share)

    def _layer(self, context: LayerContext, factors: Factors) -> LayerResult:
        rule = self.rule
        if isinstance(rule, PerClientRule):
            return rule.combine(list(self._updates(context, factors)), context)
        if isinstance(rule, SumOnlyRule):
            return self._by_sums(rule, context, factors)
        raise TypeError(f"{type(rule).__name__} is neither a SumOnlyRule nor a PerClientRule")

    def _by_sums(self, rule: SumOnlyRule, context: LayerContext, factors: Factors) -> LayerResult:
        """Run a sum-only rule's phases; what a phase shares is rounded as if it were broadcast."""
        for phase in rule.phases(context.round):
            mean = weighted_mean(
                (update.share, phase.contribute(update.factors, context))
                for update in self._updates(context, factors)
            )
            made = {name: tensor.float() for name, tensor in phase.finish(mean, context).items()}
            context = replace(context, shared={**context.shared, **made})
        return rule.conclude(context)

    def _stepped(self, result: LayerResult, context: LayerContext, factors: Factors) -> LayerResult:
        """Let the server optimiser, if there is one, step every factor that the round trained."""
        optimizer = self.rule.server_optimizer
        if optimizer is None:
            return result
        old = of_layer(context.name, self.state)
        buffers = {key: t for key, t in old.items() if key.startswith(_STEP)}
        stepped: Tensors = {}
        held = self.spool.largest_rank(context.current.rank)
        for factor in sorted(factors):
            mean, current = getattr(result.factors, factor), getattr(context.current, factor)
            value, new = _step(optimizer, mean, current, old, factor)
            # momentum would move the ranks that no client of this round has
            stepped[factor] = _only_held(value, current, held, factor)
            buffers |= {
                key: _only_held(tensor, old.get(key, tensor), held, factor)
                for key, tensor in new.items()
            }
        factors_made = result.factors.with_factors(stepped)
        return replace(result, factors=factors_made, state=result.state | buffers)

    # Extras

    def _extra_context(self, name: str) -> ExtraContext:
        own = of_layer(name, self.state)
        rest = {key: tensor for key, tensor in own.items() if not key.startswith(_STEP)}
        value = self.current.extras[name].float()
        return ExtraContext(name, self.round, value, rest, self.participation, self.surveyed)

    def _extra(self, context: ExtraContext) -> ExtraResult:
        updates = self._extras(context.name)
        if isinstance(self.rule, PerClientRule):
            return self.rule.combine_extra(list(updates), context)
        terms = ((u.share, {"value": u.value, **u.companions}) for u in updates)
        return self.rule.conclude_extra(weighted_mean(terms), context)

    def _extras(self, name: str) -> Iterator[WeightedExtra]:
        updates = self.spool.extras(name)
        if self.shares is None:
            yield from updates
            return
        for update, share in zip(updates, self.shares, strict=True):
            yield replace(update, share=share)

    def _stepped_extra(
        self, made: ExtraResult, context: ExtraContext, old: Mapping[str, Tensor]
    ) -> ExtraResult:
        optimizer = self.rule.server_optimizer
        if optimizer is None:
            return made
        value, buffers = _step(optimizer, made.value, context.current, old, "value")
        return ExtraResult(value, made.state | buffers)

    # The whole adapter, before any layer

    def _weigh(self) -> list[str]:
        """Let a rule that weighs clients by their whole updates do so; return its notes."""
        rule = self.rule
        if not isinstance(rule, SurveyingRule) or not rule.surveys:
            return []
        plan = rule.plan(self.round)
        total: Tensor | None = None
        for name in self.current.layers:
            context = self._context(name)
            measure = rule.survey(list(self._updates(context, plan.train)), context)
            total = measure if total is None else total + measure
        if plan.extras:
            for name, value in self.current.extras.items():
                at = ExtraContext(name, self.round, value.float())
                measure = rule.survey_extra(list(self._extras(name)), at)
                total = measure if total is None else total + measure
        assert total is not None
        weighing = rule.weigh(total, list(self.spool.shares.values()))
        self.shares, self.surveyed = weighing.shares, weighing.shared
        return list(weighing.notes)


def _step(
    optimizer: ServerOptimizer,
    mean: Tensor,
    current: Tensor,
    state: Mapping[str, Tensor],
    name: str,
) -> tuple[Tensor, Tensors]:
    """Step one tensor; its buffers are "server-optimizer.<name>.<buffer>" in the state."""
    prefix = f"{_STEP}{name}."
    own = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
    value, buffers = optimizer.step(mean, current, own)
    return value, {prefix + key: tensor for key, tensor in buffers.items()}


def _only_held(new: Tensor, old: Tensor, held: int, factor: str) -> Tensor:
    """Return the first `held` rows of A, or columns of B, of the new tensor, and the old rest."""
    along = 0 if factor == "A" else 1
    rest = new.shape[along] - held
    if rest == 0:
        return new
    kept = old.narrow(along, held, rest).to(new.dtype)
    return torch.cat([new.narrow(along, 0, held), kept], dim=along)


def _float32(layer: LoraLayer) -> LoraLayer:
    return layer.with_factors({"A": layer.A.float(), "B": layer.B.float()})
