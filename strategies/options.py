"""The options of rules, written `strategy.<option>`: their common parts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedgraft.config import Group
from strategies.server_optimizer import ServerOptimizer

_Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
_Above0 = Annotated[float, Field(gt=0.0)]


class RuleOptions(Group):
    """The options of one rule, written `strategy.<option>`; a rule without any uses this."""


class SteppedOptions(RuleOptions):
    """Options of rules that a server optimiser may go on top of; see `ServerOptimizer`.

    Attributes:
        server_optimizer: which one; `none` takes the rule's result as it is.
        server_lr: its learning rate; 1 for avgm and 0.01 for the adaptive ones when unset.
        server_momentum: beta1.
        server_beta2: of yogi and adam.
        server_tau: the degree of adaptivity of all but avgm.
    """

    server_optimizer: Literal["none", "avgm", "adagrad", "yogi", "adam"] = "none"
    server_lr: _Above0 | None = None
    server_momentum: _Decay = 0.9
    server_beta2: _Decay = 0.99
    server_tau: _Above0 = 1e-3

    def optimizer(self) -> ServerOptimizer | None:
        """Return the optimiser that these options name; None for none."""
        kind = self.server_optimizer
        if kind == "none":
            return None
        default = 1.0 if kind == "avgm" else 0.01
        rate = default if self.server_lr is None else self.server_lr
        momentum, beta2, tau = self.server_momentum, self.server_beta2, self.server_tau
        return ServerOptimizer(kind, rate, momentum, beta2, tau)
