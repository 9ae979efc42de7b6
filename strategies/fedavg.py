"""FedAvg on LoRA factors, as FedIT does it.

"Towards Building the Federated GPT: Federated Instruction Tuning"
Jianyi Zhang, Saeed Vahidian, Martin Kuo, Chunyuan Li, Ruiyi Zhang, Tong Yu, Yufan Zhou, Guoyin
Wang, Yiran Chen. ICASSP 2024. https://arxiv.org/abs/2305.05644

which averages each factor by itself with the weights of

"Communication-Efficient Learning of Deep Networks from Decentralized Data"
H. Brendan McMahan, Eider Moore, Daniel Ramage, Seth Hampson, Blaise Agüera y Arcas.
AISTATS 2017. https://arxiv.org/abs/1602.05629 (algorithm 1)

The server keeps Abar = sum p_k A_k and Bbar = sum p_k B_k. Their product is not the mean of the
clients' products: Bbar Abar lacks the cross terms sum p_k (B_k - Bbar)(A_k - Abar), which the host
logs as the aggregation bias.

Clients of different ranks are padded with zeros, which are averaged like other values. That
multiplies what only some clients have by their share in every round; but small clients learn with
their few ranks what the others learn with all of theirs, so averaging each rank over its holders
alone counts it twice, and was far worse when it was tried. A rank that no client of the round has
stays as it is: with A and B both zero it would never get a gradient again.
"""

from __future__ import annotations

import torch

from fedgraft.adapter import LoraLayer, Tensors
from strategies.options import SteppedOptions
from strategies.rule import Capabilities, LayerContext, LayerUpdate, Phase, SumOnlyRule


def both_factors(update: LoraLayer, context: LayerContext) -> Tensors:
    """What a client adds to the means: its A (r, d_in) and its B (d_out, r)."""
    return {"A": update.A, "B": update.B}


def keep_mean(mean: Tensors, context: LayerContext) -> Tensors:
    """What the server makes of a mean that needs no more work: the mean."""
    return mean


MEANS = Phase("means", both_factors, keep_mean)
"""Abar and Bbar: the first phase of rules that go on from there."""


def _with_ranks(update: LayerUpdate, context: LayerContext) -> Tensors:
    """A and B, and 1 for every rank that the client has, 0 for those that are padding, (r)."""
    ranks = torch.arange(context.current.rank, device=update.A.device)
    return {"A": update.A, "B": update.B, "held": ranks < update.own_rank}


def _keep_unheld(mean: Tensors, context: LayerContext) -> Tensors:
    """The means, and the current ranks where nobody has any."""
    current, held = context.current, mean["held"]
    A, B = mean["A"], mean["B"]
    none = held == 0.0
    A[none], B[:, none] = current.A.double()[none], current.B.double()[:, none]
    return {"A": A, "B": B}


class FedAvg(SumOnlyRule):
    """Average A and B, each by itself, weighted by examples."""

    name = "fedavg"
    title = "FedAvg (FedIT)"
    citation = "Zhang et al., ICASSP 2024, arXiv:2305.05644"
    capabilities = Capabilities(sum_only=True, mixed_ranks=True, server_optimizer=True)
    Options = SteppedOptions

    def phases(self, round: int) -> tuple[Phase, ...]:
        """Return the one phase: the means of both factors."""
        return (Phase("means", _with_ranks, _keep_unheld),)
