"""The host of a sum-only rule under privacy by client: it clips and noises every phase's sum.

It does so once for all rules, see `strategies.client_privacy` for the mechanism. What a client adds
to a phase is measured from what a client that has not moved would add (`Phase.unmoved`), which
everybody knows, and is one vector over all layers; the extras belong to the first phase's. Norms
over all layers need a pass of their own, so each phase reads the updates twice, layer by layer, and
memory stays that of the adapter, whatever the number of clients. A later phase sees what the
earlier ones released and nothing else.

A client is bounded here, on the server, whatever it sends; one whose contribution is not finite
adds nothing. Sums and noise are float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedgraft.adapter import Adapter, Tensors
from fedgraft.privacy.randomness import Randomness, add_noise
from strategies.aggregation import Aggregated, RoundHost
from strategies.client_privacy import ClientPrivacy
from strategies.local import Factors, of_layer
from strategies.rule import (
    ExtraContext,
    ExtraResult,
    LayerContext,
    LayerResult,
    Phase,
    Rule,
    SumOnlyRule,
)
from strategies.signal import SignalToNoise, signal_to_noise
from strategies.spool import UpdateSpool


@dataclass(frozen=True)
class PrivateAggregate:
    """What a private round makes of its updates.

    Attributes:
        made: as of any other round.
        clips: the next round's, one a phase.
        signal: by layer, how much of its change is noise; empty unless the run is a study.
    """

    made: Aggregated
    clips: tuple[float, ...]
    signal: Mapping[str, SignalToNoise]


@torch.no_grad()
def aggregate_privately(
    rule: Rule,
    spool: UpdateSpool,
    current: Adapter,
    state: Tensors,
    round: int,
    privacy: ClientPrivacy,
    clips: Sequence[float] = (),
    *,
    seed: int = 0,
) -> PrivateAggregate:
    """Aggregate the updates of a round, of which there may be none, with noise on every sum.

    Args:
        rule: a sum-only rule.
        spool: the validated updates; their weights do not count.
        current: the global adapter that the round started from.
        state: the rule's tensors, as the last round left them.
        round: counted from 1.
        privacy: the mechanism.
        clips: this round's, one a phase, as the last round left them; `privacy.clip` for others.
        seed: the run's.

    Raises:
        TypeError: the rule is no SumOnlyRule.
    """
    if not isinstance(rule, SumOnlyRule):
        raise TypeError(f"{type(rule).__name__} is no SumOnlyRule")
    host = _PrivateRound(
        rule=rule,
        spool=spool,
        current=current,
        state=state,
        round=round,
        seed=seed,
        participation=privacy.rate,  # fixed: how many took part is nobody's business
        privacy=privacy,
        noise=privacy.randomness("noise", round),
        clips=clips,
    )
    made = host.aggregate()
    return PrivateAggregate(made, tuple(host.next_clips), host.signal)


@dataclass(kw_only=True)
class _PrivateRound(RoundHost):
    rule: SumOnlyRule
    privacy: ClientPrivacy
    noise: Randomness
    clips: Sequence[float]
    next_clips: list[float] = field(default_factory=list)
    signal: dict[str, SignalToNoise] = field(default_factory=dict)
    _layers: dict[str, LayerContext] = field(default_factory=dict)  # with what phases shared
    _means: dict[str, Tensors] = field(default_factory=dict)  # of extras

    def aggregate(self) -> Aggregated:
        """Answer all phases over the whole adapter, then conclude layer by layer."""
        plan = self.rule.plan(self.round)
        self._layers = {name: self._context(name) for name in self.current.layers}
        extras = list(self.current.extras) if plan.extras else []
        for index, phase in enumerate(self.rule.phases(self.round)):
            self._answer(index, phase, plan.train, extras if index == 0 else [])
        return super().aggregate()

    def _layer(self, context: LayerContext, factors: Factors) -> LayerResult:
        return self.rule.conclude(self._layers[context.name])

    def _extra(self, context: ExtraContext) -> ExtraResult:
        return self.rule.conclude_extra(self._means[context.name], context)

    # One phase

    def _answer(self, index: int, phase: Phase, factors: Factors, extras: Sequence[str]) -> None:
        """Release one phase: what each layer shares from now on, and the means of the extras."""
        clip = self.clips[index] if index < len(self.clips) else self.privacy.clip
        norms = self._norms(phase, factors, extras)
        scales = [_scale(norm, clip) for norm in norms]
        for name, context in self._layers.items():
            start = _double(phase.unmoved(context))
            clean = self._sum(start, self._moves(phase, context, factors), scales)
            mean, noise = self._noised(start, clean, clip)
            if self.privacy.study and not {"A", "B"}.isdisjoint(mean):
                self.signal[name] = signal_to_noise(context.current, mean, noise)
            made = {key: tensor.float() for key, tensor in phase.finish(mean, context).items()}
            self._layers[name] = replace(context, shared={**context.shared, **made})
        for name in extras:
            start = self._unmoved_extra(name)
            clean = self._sum(start, self._extra_moves(name, start), scales)
            self._means[name], _ = self._noised(start, clean, clip)
        self.next_clips.append(self._next_clip(clip, norms))

    def _norms(self, phase: Phase, factors: Factors, extras: Sequence[str]) -> list[float]:
        """Return each client's norm over the whole adapter, in the order of names."""
        squares = torch.zeros(len(self.spool.clients), dtype=torch.float64)
        for context in self._layers.values():
            for client, move in enumerate(self._moves(phase, context, factors)):
                squares[client] += _square(move)
        for name in extras:
            start = self._unmoved_extra(name)
            for client, move in enumerate(self._extra_moves(name, start)):
                squares[client] += _square(move)
        # what is no number counts as infinite, too
        return [float(norm) for norm in squares.sqrt().nan_to_num(nan=math.inf)]

    def _moves(self, phase: Phase, context: LayerContext, factors: Factors) -> Iterator[Tensors]:
        """Yield how far each client's contribution to a layer is from an unmoved one's."""
        start = _double(phase.unmoved(context))
        for update in self._updates(context, factors):
            added = phase.contribute(update.factors, context)
            yield {key: added[key].double() - tensor for key, tensor in start.items()}

    def _extra_moves(self, name: str, start: Tensors) -> Iterator[Tensors]:
        for update in self._extras(name):
            added = {"value": update.value, **update.companions}
            yield {key: added[key].double() - tensor for key, tensor in start.items()}

    def _unmoved_extra(self, name: str) -> Tensors:
        shapes = self.rule.companion_shapes(self.current, self.round)
        zeros = {key: torch.zeros(shape) for key, shape in shapes.items()}
        return _double({"value": self.current.extras[name], **of_layer(name, zeros)})

    def _sum(
        self, start: Tensors, moves: Iterator[Tensors], scales: Sequence[float | None]
    ) -> Tensors:
        """Return the clipped sum: of zeros, where nobody came."""
        total = {key: torch.zeros_like(tensor) for key, tensor in start.items()}
        for scale, move in zip(scales, moves, strict=True):
            if scale is None:
                continue
            for key, sum_ in total.items():
                sum_.add_(move[key], alpha=scale)
        return total

    def _noised(self, start: Tensors, clean: Tensors, clip: float) -> tuple[Tensors, Tensors]:
        """Return the mean that is released, and the noise on it: z C / (q N) by coordinate."""
        scale = self.privacy.vector_multiplier * clip
        mean, noise = {}, {}
        for key, sum_ in clean.items():
            noised = add_noise(sum_, scale, self.noise)
            mean[key] = start[key] + noised / self.privacy.denominator
            noise[key] = (noised - sum_) / self.privacy.denominator
        return mean, noise

    def _next_clip(self, clip: float, norms: Sequence[float]) -> float:
        if not self.privacy.adaptive:
            return clip
        below = sum(0.5 if norm <= clip else -0.5 for norm in norms)
        noise = float(self.noise.normal((1,), self.privacy.count_scale))
        return self.privacy.next_clip(clip, below + noise)


def _scale(norm: float, clip: float) -> float | None:
    """Return what a vector of this norm is multiplied by; None for one that is not finite."""
    if norm <= clip:
        return 1.0
    return clip / norm if math.isfinite(norm) else None


def _double(tensors: Tensors) -> Tensors:
    return {key: tensor.double() for key, tensor in tensors.items()}


def _square(move: Tensors) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for tensor in move.values():
        total += tensor.square().sum()
    return total
