"""FedRot-LoRA: turn every client's factors towards the global ones before they are averaged.

"FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA"
Haoran Zhang, Dongjun Kim, Seohyeon Cha, Haris Vikalo. ICML 2026. https://arxiv.org/abs/2602.23638

(B R)(R^T A) = B A for every rotation R, so clients may hold one update in different bases, and
averaging factors of different bases cancels what they agree on. Before it sends, a client turns its
factors by the rotation that brings one of them closest to the factor that it received:

    align A:  R = argmin ||R^T A_k - A||_F = U V^T,  U S V^T = A_k A^T     (orthogonal Procrustes)
    align B:  R = argmin ||B_k R - B||_F   = U V^T,  U S V^T = B_k^T B

with det R = 1 (of a reflection, the column of the smallest singular value is turned over), and then
not all the way:

    R_soft = the rotation nearest to (1 - lambda) I + lambda R,
    A_k <- R_soft^T A_k,   B_k <- B_k R_soft.

Which factor is aligned alternates by round, and round 1 turns nothing, since the B that was
received is zero. A client's product does not change, nor do the bytes; the server averages as
FedAvg does.

`strategy.lambda` is 0.5, in the middle of what the paper finds best (0.4 to 0.6); its code turns
all the way by default. As in the code, B is aligned first, in round 2. Where the factors leave R
open (a singular product), it is taken as near to I as they allow; an SVD alone would turn such
directions at random.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedgraft.adapter import factor_name
from fedgraft.config import Config
from strategies.fedavg import MEANS
from strategies.local import LocalUpdate, LocalWork
from strategies.options import SteppedOptions
from strategies.refusals import refuse_kept_optimizer
from strategies.rule import Capabilities, Phase, SumOnlyRule

_TIE = 1e-9
"""How much of the identity decides, relative to the matrix, where the matrix leaves R open."""


class FedRotLoRAOptions(SteppedOptions):
    """Options of FedRot-LoRA.

    Attributes:
        lambda_: how far the factors are turned, written `strategy.lambda`: 0 leaves them as they
            were trained, 1 turns them all the way.
    """

    lambda_: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5


def nearest_rotation(M: Tensor) -> Tensor:
    """Return the R with R^T R = I and det R = 1 that is nearest to M (r, r), in float64.

    It maximises tr(R^T M): U diag(1, .., 1, det(U V^T)) V^T of M = U S V^T.
    """
    M = M.double()
    size = float(torch.linalg.matrix_norm(M, 2)) or 1.0
    eye = torch.eye(len(M), dtype=M.dtype, device=M.device)
    U, _, V = torch.linalg.svd(M + _TIE * size * eye)
    signs = torch.ones(len(M), dtype=M.dtype, device=M.device)
    signs[-1] = torch.linalg.det(U @ V).sign()
    rotation: Tensor = (U * signs) @ V
    return rotation


def soft_rotation(R: Tensor, lambda_: float) -> Tensor:
    """Return the rotation nearest to (1 - lambda) I + lambda R, for a rotation R (r, r).

    Half of a half turn has no direction (the sum is zero there, but for rounding): it is I.
    """
    eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
    return nearest_rotation((1.0 - lambda_ + _TIE) * eye + lambda_ * R)


class FedRotLoRA(SumOnlyRule):
    """Rotate a client's factors towards the global ones, then average both."""

    name = "fedrot-lora"
    title = "FedRot-LoRA"
    citation = "Zhang et al., ICML 2026, arXiv:2602.23638"
    capabilities = Capabilities(sum_only=True, server_optimizer=True)
    Options = FedRotLoRAOptions
    options: FedRotLoRAOptions

    def check(self, config: Config) -> None:
        """Refuse to keep optimizers: what a client's moments are of is turned away.

        Raises:
            ConfigError: `train.optimizer-state` is "keep".
        """
        refuse_kept_optimizer(config, self.name, "factors are turned after training")

    def local(self, work: LocalWork) -> LocalUpdate:
        """Train both factors, then turn them; round 1 turns nothing."""
        trained = work.train(work.start, work.planned).tensors
        if work.round == 1:
            return LocalUpdate(trained)
        turned = dict(trained)
        for layer in work.scalings:
            name_A, name_B = factor_name(layer, "A"), factor_name(layer, "B")
            A, B = trained[name_A].double(), trained[name_B].double()
            if work.round % 2 == 0:
                product = B.T @ work.start[name_B].double()
            else:
                product = A @ work.start[name_A].double().T
            R = soft_rotation(nearest_rotation(product), self.options.lambda_)
            turned[name_A], turned[name_B] = (R.T @ A).float(), (B @ R).float()
        return LocalUpdate(turned)

    def phases(self, round: int) -> tuple[Phase, ...]:
        """Return FedAvg's one phase: the means of both factors."""
        return (MEANS,)
