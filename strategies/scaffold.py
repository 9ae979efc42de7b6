"""SCAFFOLD: control variates against client drift, under another rule.

"SCAFFOLD: Stochastic Controlled Averaging for Federated Learning"
Sai Praneeth Karimireddy, Satyen Kale, Mehryar Mohri, Sashank J. Reddi, Sebastian U. Stich, Ananda
Theertha Suresh. ICML 2020. https://arxiv.org/abs/1910.06378 (algorithm 1, option II)

On its own data a client runs towards its own optimum. So it corrects every step by the difference
between where all clients would go and where it would go: c estimates the gradient of the whole
federation, c_k that of client k, both zero at the start, and with learning rate eta

    w <- w - eta (g - c_k + c)                      (the penalty <c - c_k, w> in the loss).

After its steps, from x to y, the client's own gradient has been on average

    c_k+ = c_k - c + (x - y) / sum eta,             sum eta over its steps (K eta in the paper);

it keeps c_k+ and sends y and c_k+ - c_k. The server does with y what the rule under it does, and
adds participation * sum p_k (c_k+ - c_k) to c, the participation being the share of clients that
took part. Everything is a sum. Both ways twice as much travels.

This reads a gradient off a difference, so local training must be plain SGD: no momentum, no
clipping, no AdamW, whose steps are not gradients times a rate. A learning rate that changes over
the steps weighs them by their rates, and weight decay counts as part of the gradient.

`strategy.under` names the rule below; its options are written beside it (`strategy.lambda` for
lora-fair, say). It must need sums only, leave local training as it is, and keep the meaning of its
factors from round to round, or c would be a gradient by something else. Weights p_k are used
throughout, where the paper weighs all clients alike.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import ConfigDict
from torch import Tensor

from fedgraft.adapter import Adapter, Tensors, parse_factor
from fedgraft.config import Config
from fedgraft.errors import ConfigError
from strategies.fedavg import keep_mean
from strategies.local import LocalUpdate, LocalWork, beside, owner_of
from strategies.options import RuleOptions
from strategies.registry import build_rule, option_names, rule_names
from strategies.rule import (
    Capabilities,
    ExtraContext,
    ExtraResult,
    LayerContext,
    LayerResult,
    LayerUpdate,
    Phase,
    Plan,
    Rule,
    SumOnlyRule,
)

_CONTROL = "control"
"""The short name of an extra's control variate; a factor's is "control.A" or "control.B"."""


class ScaffoldOptions(RuleOptions):
    """Options of SCAFFOLD, and those of the rule under it.

    Attributes:
        under: the rule that aggregates: fedavg, ffa-lora, lora-fair, rolora, or any other that can.
    """

    model_config = ConfigDict(extra="allow")

    under: str = "fedavg"

    @property
    def of_under(self) -> dict[str, Any]:
        """The options of the rule below."""
        return dict(self.model_extra or {})


class Scaffold(SumOnlyRule):
    """Correct local steps by control variates; aggregate by the rule below."""

    name = "scaffold"
    title = "SCAFFOLD"
    citation = "Karimireddy et al., ICML 2020, arXiv:1910.06378"
    # c adds up every round's noise, and no longer is the mean of what clients keep
    capabilities = Capabilities(sum_only=True, server_optimizer=True, noise=False)
    Options = ScaffoldOptions
    options: ScaffoldOptions

    def __init__(self, options: ScaffoldOptions | None = None) -> None:
        super().__init__(options)
        self.under = _rule_below(self.options)
        self.server_optimizer = self.under.server_optimizer
        self.opens = self.under.opens

    def check(self, config: Config) -> None:
        """Refuse local training that is not plain SGD.

        Raises:
            ConfigError: an optimizer, a momentum, a clip, two rates or a proximal term: steps that
                are not the data's gradients times one rate.
        """
        self.under.check(config)
        train = config.train
        if train.optimizer != "sgd":
            found = f"train.optimizer is {train.optimizer!r}"
        elif train.momentum:
            found = f"train.momentum is {train.momentum:g}"
        elif train.grad_clip:
            found = f"train.grad-clip is {train.grad_clip:g}"
        elif train.lr_ratio != 1.0:
            found = f"train.lr-ratio is {train.lr_ratio:g}"
        elif train.proximal_mu:
            found = f"train.proximal-mu is {train.proximal_mu:g}"
        else:
            return
        raise ConfigError(
            f"scaffold reads gradients off plain SGD steps, and {found}",
            "Set train.optimizer=sgd, train.momentum=0, train.grad-clip=0, train.lr-ratio=1 and "
            "train.proximal-mu=0; or use "
            f"{self.under.name} with train.proximal-mu, which holds drift under any optimizer.",
        )

    def plan(self, round: int) -> Plan:
        """Return the plan of the rule below."""
        return self.under.plan(round)

    # On the client

    def local(self, work: LocalWork) -> LocalUpdate:
        """Train with corrected steps; send what was trained and how this client's c_k moved."""
        names = [name for name in work.start if _trains(name, work)]
        zero = {name: torch.zeros_like(work.start[name]) for name in names}
        c = {name: work.companions.get(_control(name), zero[name]) for name in names}
        own = {name: work.kept.get(_control(name), zero[name]) for name in names}
        how = work.planned
        if work.companions or work.kept:  # else there is nothing to correct by
            how = replace(how, penalty=_Tilt({name: c[name] - own[name] for name in names}))
        trained = work.train(work.start, how)
        change = zero
        if trained.rate > 0.0:  # a schedule may end at 0, where no gradient was seen
            moved = {name: work.start[name] - trained.tensors[name] for name in names}
            change = {name: moved[name] / trained.rate - c[name] for name in names}
        new = {_control(name): own[name] + change[name] for name in names}
        sent = {_control(name): tensor for name, tensor in change.items()}
        return LocalUpdate(trained.tensors, sent, work.kept | new)

    # On the server

    def companions(self, state: Tensors, round: int) -> Tensors:
        """Return c for all that the round trains."""
        factors = {f"{_CONTROL}.{factor}" for factor in self.plan(round).train}
        return {
            name: tensor
            for name, tensor in state.items()
            if (short := name.removeprefix(beside(owner_of(name), ""))) in factors
            or (short == _CONTROL and self.plan(round).extras)
        }

    def companion_shapes(self, adapter: Adapter, round: int) -> Mapping[str, tuple[int, ...]]:
        """Return that a control variate comes up beside every trained tensor, of its shape."""
        plan = self.plan(round)
        trained = adapter.tensors(plan.train, extras=plan.extras)
        return {_control(name): tuple(tensor.shape) for name, tensor in trained.items()}

    def phases(self, round: int) -> tuple[Phase, ...]:
        """Return the phases of the rule below, and the mean of the changes of c_k."""
        names = [f"{_CONTROL}.{factor}" for factor in sorted(self.plan(round).train)]

        def contribute(update: LayerUpdate, context: LayerContext) -> Tensors:
            """What a client adds: how its control variates of the layer moved."""
            return {name: update.companions[name] for name in names}

        return (*self.under.phases(round), Phase("control variates", contribute, keep_mean))

    def conclude(self, context: LayerContext) -> LayerResult:
        """Return what the rule below does, and c in the state."""
        below = self.under.conclude(context)
        moved = {k: t for k, t in context.shared.items() if k.startswith(_CONTROL)}
        old = {k: t for k, t in context.state.items() if k.startswith(_CONTROL)}
        new = {k: _moved(old.get(k), t, context.participation) for k, t in moved.items()}
        return LayerResult(below.factors, below.state | old | new, below.notes, below.residual)

    def conclude_extra(self, mean: Tensors, context: ExtraContext) -> ExtraResult:
        """Return what the rule below does with an extra, and c in the state."""
        below = self.under.conclude_extra(mean, context)
        c = _moved(context.state.get(_CONTROL), mean[_CONTROL], context.participation)
        return ExtraResult(below.value, below.state | {_CONTROL: c})


class _Tilt:
    """The penalty <direction, w>, whose gradient is the direction whatever w is."""

    def __init__(self, direction: Tensors) -> None:
        self._direction = direction

    def __call__(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of inner products over all parameters that train."""
        terms = []
        for name, parameter in parameters.items():
            moved = self._direction[name].to(parameter.device, parameter.dtype)
            self._direction[name] = moved  # where the parameters live, for the next step
            terms.append((moved * parameter).sum())
        return torch.stack(terms).sum()


def _trains(name: str, work: LocalWork) -> bool:
    parsed = parse_factor(name)
    return work.plan_extras if parsed is None else parsed[1] in work.plan_factors


def _control(name: str) -> str:
    """Return the name of a trained tensor's control variate."""
    parsed = parse_factor(name)
    return (
        beside(name, _CONTROL) if parsed is None else beside(parsed[0], f"{_CONTROL}.{parsed[1]}")
    )


def _moved(c: Tensor | None, mean: Tensor, participation: float) -> Tensor:
    """Return c + participation * mean in float32; c is zero at the start."""
    step = participation * mean.double()
    return (step if c is None else c.double() + step).float()


def _rule_below(options: ScaffoldOptions) -> SumOnlyRule:
    """Build the rule of `strategy.under`.

    Raises:
        ConfigError: no such rule, options that it does not have, or a rule that SCAFFOLD cannot
            go on top of.
    """
    remedy = "Set strategy.under to fedavg, ffa-lora, lora-fair or rolora."
    if options.under not in rule_names():
        raise ConfigError(f"strategy.under is {options.under!r}, and no such rule exists", remedy)
    known = option_names(options.under)
    for option in sorted(options.of_under.keys() - set(known)):
        nearest = difflib.get_close_matches(option, ["under", *known], n=1)
        raise ConfigError(
            f"strategy.{option} is an option neither of scaffold nor of {options.under} under it",
            f"Did you mean strategy.{nearest[0]}?"
            if nearest
            else "There are: strategy." + ", strategy.".join(["under", *known]) + ".",
        )
    rule = build_rule(options.under, options.of_under)
    own_half = type(rule).local is not Rule.local or type(rule).assemble is not Rule.assemble
    if not isinstance(rule, SumOnlyRule):
        reason = "needs every client's own factors"
    elif own_half:
        reason = "changes local training itself"
    elif not rule.capabilities.server_optimizer:
        reason = "gives factors another meaning from round to round"
    else:
        return rule
    raise ConfigError(f"strategy.under is {options.under!r}, which {reason}", remedy)
