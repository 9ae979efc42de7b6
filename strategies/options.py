"""The options of rules, written `strategy.<option>`: their common parts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedgraft.config import Group
from strategies.server_optimizer import Kind, ServerOptimizer

_Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
_Above0 = Annotated[float, Field(gt=0.0)]

_RATES: dict[Kind, float] = {"avgm": 1.0, "adagrad": 0.03, "yogi": 0.01, "adam": 0.01}
SETTINGS_OF: dict[str, tuple[str, ...]] = {
    "avgm": ("server-lr", "server-momentum"),
    "adagrad": ("server-lr", "server-momentum", "server-tau"),
}
"""What an optimiser uses of the settings below; those that are not named here use all."""


class RuleOptions(Group):
    """The options of one rule, written `strategy.<option>`; a rule without any uses this."""


class SteppedOptions(RuleOptions):
    """Options of rules that a server optimiser may go on top of; see `ServerOptimizer`.

    Attributes:
        server_optimizer: which one; `none` takes the rule's result as it is.
        server_lr: its learning rate; when unset 1 for avgm, 0.01 for yogi and adam and 0.03 for
            adagrad, about what LoRA factors move in a round.
        server_momentum: beta1. The papers' 0.9 remembers ten rounds, a large part of a fine-tuning
            run: over 40 rounds of digits 0.5 ended 2 to 7 points above it (avgm and adam).
        server_beta2: of yogi and adam.
        server_tau: the degree of adaptivity of all but avgm.
    """

    server_optimizer: Literal["none", "avgm", "adagrad", "yogi", "adam"] = "none"
    server_lr: _Above0 | None = None
    server_momentum: _Decay = 0.5
    server_beta2: _Decay = 0.99
    server_tau: _Above0 = 1e-3

    def optimizer(self) -> ServerOptimizer | None:
        """Return the optimiser that these options name; None for none."""
        kind = self.server_optimizer
        if kind == "none":
            return None
        rate = _RATES[kind] if self.server_lr is None else self.server_lr
        momentum, beta2, tau = self.server_momentum, self.server_beta2, self.server_tau
        return ServerOptimizer(kind, rate, momentum, beta2, tau)
