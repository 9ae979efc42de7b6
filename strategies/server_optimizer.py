"""Server optimisers: the round's mean as a pseudo-gradient.

"Adaptive Federated Optimization"
Sashank J. Reddi, Zachary Charles, Manzil Zaheer, Zachary Garrett, Keith Rush, Jakub Konečný, Sanjiv
Kumar, H. Brendan McMahan. ICLR 2021. https://arxiv.org/abs/2003.00295 (algorithm 2)

and, for momentum alone,

"Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification"
Tzu-Ming Harry Hsu, Hang Qi, Matthew Brown. 2019. https://arxiv.org/abs/1909.06335 (FedAvgM)

With D = mean - current, entry by entry:

- FedAvgM: m <- beta1 m + D, and current + lr m;
- FedAdagrad, FedYogi, FedAdam: m <- beta1 m + (1 - beta1) D, v <- v + D^2, or
  v - (1 - beta2) D^2 sign(v - D^2), or beta2 v + (1 - beta2) D^2, and
  current + lr m / (sqrt(v) + tau). v starts from tau^2 and there is no bias correction, as in the
  paper.

A factor that a round's plan does not train is not stepped: momentum would move what every client
holds still. Its buffers wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedgraft.adapter import Tensors

Kind = Literal["avgm", "adagrad", "yogi", "adam"]


@dataclass(frozen=True)
class ServerOptimizer:
    """One of the four optimisers, with its settings.

    Attributes:
        kind: which one.
        lr: the server's learning rate; 1 with momentum 0 is plain averaging.
        beta1: decay of the momentum m, in [0, 1).
        beta2: decay of the second moment v, in [0, 1); yogi and adam.
        tau: the degree of adaptivity, above 0: small adapts more; not avgm.
    """

    kind: Kind
    lr: float
    beta1: float
    beta2: float
    tau: float

    def step(
        self, mean: Tensor, current: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensors]:
        """Return the stepped tensor and the buffers "m" and "v", all float64.

        Args:
            mean: what the rule made of the round.
            current: what the round started from, of the same shape.
            state: the buffers as the last call left them; empty at first.
        """
        D = mean.double() - current.double()
        m = state["m"].double() if "m" in state else torch.zeros_like(D)
        if self.kind == "avgm":
            m = self.beta1 * m + D
            return current.double() + self.lr * m, {"m": m}
        m = self.beta1 * m + (1.0 - self.beta1) * D
        v = state["v"].double() if "v" in state else torch.full_like(D, self.tau**2)
        square = D.square()
        if self.kind == "adagrad":
            v = v + square
        elif self.kind == "yogi":
            v = v - (1.0 - self.beta2) * square * torch.sign(v - square)
        else:
            v = self.beta2 * v + (1.0 - self.beta2) * square
        return current.double() + self.lr * m / (v.sqrt() + self.tau), {"m": m, "v": v}
