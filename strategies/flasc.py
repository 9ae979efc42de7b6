"""FLASC: send the largest entries only, train all of them.

"Federated LoRA with Sparse Communication"
Kevin Kuo, Arian Raje, Kousik Rajesh, Virginia Smith. 2024. https://arxiv.org/abs/2406.05233

- Down: the server sends the `strategy.density-down` share of the global adapter's LoRA entries that
  is largest in magnitude, over all layers and both factors together; the rest arrives as zero.
- A client trains everything, dense, from what it received.
- Up: of the difference that training made, the `strategy.density-up` share that is largest.
- The server averages the differences, D = sum p_k D_k, with zero for what a client did not send,
  and steps its own adapter, which stays dense, by FedAdam with D as pseudo-gradient.

Sparse in transit and dense in training is the paper's point: sparsity kept through training loses
far more. A zero costs a bit, any other entry four bytes more, so a density q costs about
q + 1/32 of the dense bytes. Extras travel whole both ways.

Sending down what is large keeps back what is new: at first B is small and A is not, and while B
stays below the largest entries of A clients never see what it learned. So by default all goes down,
as in the published code, and a quarter comes up; try lower `strategy.density-down` with that in
mind.

Differences from the published code: it averages clients alike, here p_k weighs them as everywhere;
its server steps with PyTorch's AdamW (learning rate 1e-3 for 200 rounds, bias correction, weight
decay 0.01), here with the FedAdam of Reddi et al. (`strategies.server_optimizer`), whose learning
rate is 0.01 unless `strategy.server-lr` says otherwise. `strategy.server-optimizer=none` takes the
plain average.

The server needs sums only, but which entries a client sends tells something of its data, and where
clients' messages must not be seen singly they are sent whole and nothing is saved.
"""

from __future__ import annotations

from typing import Literal

import torch

from fedgraft.adapter import Adapter, parse_factor
from fedgraft.config import Config, Fraction
from fedgraft.errors import ConfigError
from strategies.fedavg import MEANS
from strategies.local import LocalUpdate, LocalWork
from strategies.options import SteppedOptions
from strategies.rule import Capabilities, Phase, Plan, SumOnlyRule
from strategies.selection import largest


class FLASCOptions(SteppedOptions):
    """Options of FLASC.

    Attributes:
        density_down: the share of the LoRA entries that go down; 1 for all.
        density_up: the share of the LoRA entries that go up; 1 for all.
        server_optimizer: as for other rules, FedAdam by default.
    """

    density_down: Fraction = 1.0
    density_up: Fraction = 0.25
    server_optimizer: Literal["none", "avgm", "adagrad", "yogi", "adam"] = "adam"


class FLASC(SumOnlyRule):
    """Send the largest entries down and the largest differences up; train all; step by FedAdam."""

    name = "flasc"
    title = "FLASC"
    citation = "Kuo et al., 2024, arXiv:2406.05233"
    capabilities = Capabilities(sum_only=True, server_optimizer=True)
    Options = FLASCOptions
    options: FLASCOptions

    def check(self, config: Config) -> None:
        """Refuse to send a part of factors that start from a product.

        Raises:
            ConfigError: B does not start at zero, and strategy.density-down is below 1.
        """
        if self.options.density_down < 1.0 and config.adapter.init not in ("default", "gaussian"):
            raise ConfigError(
                f'adapter.init is "{config.adapter.init}", and with strategy.density-down = '
                f"{self.options.density_down:g} clients would get a part of its product only",
                'Set strategy.density-down to 1, or adapter.init to "default" or "gaussian".',
            )

    def plan(self, round: int) -> Plan:
        """Return that both factors travel, with many zeros."""
        return Plan(sparse=True)

    def outgoing(self, adapter: Adapter, round: int) -> Adapter:
        """Return the adapter with only its largest LoRA entries; the extras are whole."""
        if self.options.density_down == 1.0:
            return adapter
        factors = adapter.tensors(extras=False)
        entries = sum(tensor.numel() for tensor in factors.values())
        sizes = {name: tensor.abs() for name, tensor in factors.items()}
        masks = largest(sizes, _count(self.options.density_down, entries))
        return adapter.with_tensors({n: tensor * masks[n] for n, tensor in factors.items()})

    def local(self, work: LocalWork) -> LocalUpdate:
        """Train everything; of the differences only the largest are sent, the others are zero."""
        trained = work.train(work.start, work.planned).tensors
        moved = {
            name: (tensor - work.start[name]).abs()
            for name, tensor in trained.items()
            if parse_factor(name) is not None
        }
        entries = sum(tensor.numel() for tensor in moved.values())
        masks = largest(moved, _count(self.options.density_up, entries))
        sent = {
            name: torch.where(mask, trained[name], work.start[name]) for name, mask in masks.items()
        }
        return LocalUpdate(trained | sent)

    def phases(self, round: int) -> tuple[Phase, ...]:
        """Return FedAvg's one phase, the means, whose difference from the adapter is D."""
        return (MEANS,)


def _count(density: float, entries: int) -> int:
    return max(1, int(density * entries))
