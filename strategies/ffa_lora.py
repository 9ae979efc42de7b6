"""FFA-LoRA: freeze A, train and average B.

"Improving LoRA in Privacy-preserving Federated Learning"
Youbang Sun, Zitao Li, Yaliang Li, Bolin Ding. ICLR 2024. https://arxiv.org/abs/2403.12313

Every client holds W0 + s B A0 with the same random A0, and trains B alone from B = 0. Then
sum p_k B_k A0 = (sum p_k B_k) A0: the mean of B is the exact mean of the updates, half of the bytes
travel (for square layers), and under differential privacy no product of two noises is left.

A0 must be the same on every machine and for the whole run: both sides derive it from the run's seed
by a portable generator (`Plan.derive_A`), it never travels, and its hash is compared. The paper
searches learning rates about ten times as large as LoRA's; start from twice.
"""

from __future__ import annotations

from fedgraft.adapter import LoraLayer, Tensors
from fedgraft.config import Config
from fedgraft.errors import ConfigError
from strategies.fedavg import keep_mean
from strategies.local import B_ONLY
from strategies.options import SteppedOptions
from strategies.refusals import refuse_lr_ratio
from strategies.rule import Capabilities, LayerContext, Phase, Plan, SumOnlyRule


def factor_b(update: LoraLayer, context: LayerContext) -> Tensors:
    """What a client adds to the mean: its B (d_out, r)."""
    return {"B": update.B}


class FFALoRA(SumOnlyRule):
    """Average B over a shared, frozen, random A."""

    name = "ffa-lora"
    title = "FFA-LoRA"
    citation = "Sun et al., ICLR 2024, arXiv:2403.12313"
    capabilities = Capabilities(sum_only=True, exact=True, mixed_ranks=True, server_optimizer=True)
    Options = SteppedOptions

    def check(self, config: Config) -> None:
        """Refuse a learning rate of B's own beside A's, which does not train, and half of an A.

        Raises:
            ConfigError: train.lr-ratio is set, or adapter.init is "orthogonal".
        """
        if config.adapter.init == "orthogonal":
            raise ConfigError(
                f'adapter.init is "orthogonal", whose A has half of its rank, and {self.name} '
                "never trains A",
                'Set adapter.init to "default", "gaussian", "pissa" or "olora", or use fedavg.',
            )
        refuse_lr_ratio(config, self.name, "never trains A")

    def plan(self, round: int) -> Plan:
        """Return what the paper asks for: B trains and travels, A is derived on both sides."""
        return Plan(train=B_ONLY, send=B_ONLY, derive_A=True)

    def phases(self, round: int) -> tuple[Phase, ...]:
        """Return the one phase: the mean of B."""
        return (Phase("mean of B", factor_b, keep_mean),)
