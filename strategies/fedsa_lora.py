"""FedSA-LoRA: share A, keep B.

"Selective Aggregation for Low-Rank Adaptation in Federated Learning"
Pengxin Guo, Shuang Zeng, Yanran Wang, Huijie Fan, Feifei Wang, Liangqiong Qu. ICLR 2025.
https://arxiv.org/abs/2410.01463

Trained A's are found to be alike on all clients and B's to differ with their data: A holds what is
common, B what is a client's own. So every client trains both factors and

- sends A; the server averages, Abar = sum p_k A_k, and the client goes on from it;
- keeps B, on its own disk, and goes on from that: B never travels up.

There is no single global model: client k's is W0 + s B_k Abar. The server's own B stays what it was
at the start (zero, as a rule), so a metric that the server takes of its adapter is the untouched
base's; look at the clients' metrics.

The published configuration keeps the classifier on the client too; `strategy.personal-extras` says
so, and without it extras are averaged as usual. A client needs the first B once, before it has its
own; it comes with the adapter in round 1 and as a constant to those who join later.
"""

from __future__ import annotations

from fedgraft.adapter import LoraLayer, Tensors, factor_name, parse_factor
from strategies.fedavg import keep_mean
from strategies.local import (
    A_AND_B,
    A_ONLY,
    LocalUpdate,
    LocalWork,
    Training,
    beside,
    owner_of,
)
from strategies.options import SteppedOptions
from strategies.rule import Capabilities, LayerContext, LayerResult, Phase, Plan, SumOnlyRule


class FedSALoRAOptions(SteppedOptions):
    """Options of FedSA-LoRA.

    Attributes:
        personal_extras: extras (a classifier head, say) stay on the client, as B does.
    """

    personal_extras: bool = True


def factor_a(update: LoraLayer, context: LayerContext) -> Tensors:
    """What a client adds to the mean: its A (r, d_in)."""
    return {"A": update.A}


class FedSALoRA(SumOnlyRule):
    """Train A and B, average A, keep B on the client."""

    name = "fedsa-lora"
    title = "FedSA-LoRA"
    citation = "Guo et al., ICLR 2025, arXiv:2410.01463"
    capabilities = Capabilities(
        sum_only=True, personal=True, extras="personal", server_optimizer=True
    )
    Options = FedSALoRAOptions
    opens = True
    options: FedSALoRAOptions

    def plan(self, round: int) -> Plan:
        """Return that A comes up, whatever trains; B goes down in the first round."""
        return Plan(
            train=A_ONLY,
            send=A_AND_B if round <= 1 else A_ONLY,
            extras=not self.options.personal_extras,
        )

    def assemble(self, received: Tensors, companions: Tensors, kept: Tensors) -> Tensors:
        """Return the global A with the client's own B (and extras), or the first B for want of it.

        Args:
            received: the tensors that travelled.
            companions: the first B, beside every layer.
            kept: this client's own tensors, under the adapter's names.
        """
        first = {factor_name(owner_of(name), "B"): B for name, B in companions.items()}
        return received | first | kept

    def local(self, work: LocalWork) -> LocalUpdate:
        """Train both factors and the extras; send A and keep the rest."""
        trained = work.train(work.start, Training(factors=A_AND_B, extras=True)).tensors
        sent: Tensors = {}
        kept: Tensors = {}
        for name, tensor in trained.items():
            parsed = parse_factor(name)
            travels = work.plan_extras if parsed is None else parsed[1] == "A"
            (sent if travels else kept)[name] = tensor
        return LocalUpdate(sent, kept=kept)

    def constants(self, state: Tensors, round: int) -> Tensors:
        """Return the first B of every layer, for clients that have none yet."""
        if round <= 1:
            return {}
        return {name: t for name, t in state.items() if name == beside(owner_of(name), "B")}

    def phases(self, round: int) -> tuple[Phase, ...]:
        """Return the one phase: the mean of A."""
        return (Phase("mean of A", factor_a, keep_mean),)

    def conclude(self, context: LayerContext) -> LayerResult:
        """Return Abar with the server's B as it always was; the state holds that B."""
        factors = context.current.with_factors(context.shared)
        return LayerResult(factors, state={"B": context.current.B})
