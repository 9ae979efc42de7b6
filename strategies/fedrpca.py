"""FedRPCA: amplify what single clients learned, beside what they have in common.

"FedRPCA: Enhancing Federated LoRA Aggregation Using Robust PCA"
Divyansh Jhunjhunwala, Arian Raje, Madan Ravi Ganesh, Chaithanya Kumar Mummadi, Chaoqun Dong, Jiawei
Zhou, Wan-Yi Lin, Gauri Joshi, Zhenzhen Li. 2025. https://arxiv.org/abs/2506.01194

Averaging shrinks what only one client knows to a K-th. For each factor of each layer, the clients'
changes are the columns of M = [vec(A_1 - A), ..., vec(A_K - A)], which robust PCA
(`strategies.robust_pca`) splits into L of low rank, what the clients share, and S, sparse, what is
their own. The common part is averaged, the other part is averaged and scaled:

    A + sum p_k L_k + beta sum p_k S_k,   and the same for B.

beta = 1 is FedAvg. `strategy.beta` fixes it; unset, it is 1 / E with E = ||S|| / ||M||, the sparse
part's share of the changes' norm, for each matrix and round, and at most 10: the less there is of
it, the more it is amplified.

Where it differs. L and S are weighed by examples, so that beta = 1 is FedAvg as it stands. A single
client's change has nothing to be compared with and stands as it is. The paper has a schedule of
beta too, which we know at second hand only: that this one is the same is not checked. Extras are
averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from strategies.means import weighted_mean
from strategies.options import SteppedOptions
from strategies.robust_pca import sparse_part
from strategies.rule import Capabilities, LayerContext, LayerResult, PerClientRule, WeightedLayer

_MOST = 10.0


class FedRPCAOptions(SteppedOptions):
    """Options of FedRPCA.

    Attributes:
        beta: what the mean of the sparse parts is multiplied by; by their share of the changes'
            norm when unset.
    """

    beta: Annotated[float, Field(ge=0.0)] | None = None


class FedRPCA(PerClientRule):
    """Average the factors, and scale up the sparse part of the clients' changes."""

    name = "fedrpca"
    title = "FedRPCA"
    citation = "Jhunjhunwala et al. 2025, arXiv:2506.01194"
    capabilities = Capabilities(sum_only=False, server_optimizer=True)
    Options = FedRPCAOptions
    options: FedRPCAOptions

    def combine(self, updates: Sequence[WeightedLayer], context: LayerContext) -> LayerResult:
        """Return both factors' means, with their sparse parts scaled."""
        mean = weighted_mean((u.share, {"A": u.factors.A, "B": u.factors.B}) for u in updates)
        if len(updates) > 1:
            shares = torch.tensor([u.share for u in updates], dtype=torch.float64)
            for factor in mean:
                current = getattr(context.current, factor)
                values = [getattr(update.factors, factor) for update in updates]
                mean[factor] += self._amplified(values, current, shares)
        return LayerResult(context.current.with_factors(mean))

    def _amplified(self, values: Sequence[Tensor], current: Tensor, shares: Tensor) -> Tensor:
        """Return (beta - 1) sum p_k S_k for one factor."""
        M = torch.stack([(value - current).flatten() for value in values], dim=1)
        S = sparse_part(M)
        beta = self.options.beta
        if beta is None:
            sparse, whole = (
                float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (S, M)
            )
            beta = min(whole / sparse, _MOST) if sparse > 0.0 else 1.0
        return (beta - 1.0) * (S.double() @ shares.to(S.device)).reshape(current.shape)
