"""The factors that training starts from: PEFT's data-free initialisations, one function each.

`default` and `gaussian` draw A from the run's seed by a portable generator and leave B = 0, so that
every machine can derive them. The others are computed once, on the server, and travel:
decompositions differ in their last bits from machine to machine.

- gaussian: entries of A have a standard deviation of 1 / r, as in PEFT.
- orthogonal: of a random orthogonal Q (r, r) A takes the odd rows and B the even ones, each through
  a random matrix: both are away from zero and B A = 0. As in PEFT, after
  https://datta0.github.io/posts/rethink-lora-init/
- pissa: the r largest singular values of the base's weight W = U S V^T and their vectors,
  A = sqrt(S / s) V^T and B = U sqrt(S / s), s the scaling.
  "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models"
  Fanxu Meng, Zhaohui Wang, Muhan Zhang. NeurIPS 2024. https://arxiv.org/abs/2404.02948
- olora: of W = Q R the first r columns of Q are B, and the first r rows of R are A.
  "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models"
  Kerim Buyukakyuz. 2024. https://arxiv.org/abs/2406.01775

PiSSA and OLoRA start from a product that is not zero. Their papers, and PEFT, write W - s B A into
the base; here -s B A stands beside it as frozen factors, so that nothing is written, a quantised
base is rounded as ever, and the model of round 0 is the base.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedgraft.errors import ModelError
from fedgraft.seeds import stream

Pair = tuple[Tensor, Tensor]
"""A (r, d_in) and B (d_out, r), float32, on the CPU."""


def derive_A(name: str, shape: tuple[int, ...], seed: int, init: str = "default") -> Tensor:
    """Return one layer's A (r, d_in) from the run's seed; its first rows serve a smaller rank.

    Args:
        name: the layer's, of its A.
        shape: (r, d_in).
        seed: the run's.
        init: "default", uniform within 1 / sqrt(d_in), PEFT's Kaiming bounds; or "gaussian".
    """
    rng = stream(seed, "initial-A", client=name)
    if init == "gaussian":
        values = rng.standard_normal(shape) / shape[0]
    else:
        bound = shape[1] ** -0.5
        values = rng.uniform(-bound, bound, size=shape)
    return torch.from_numpy(values.astype(np.float32))


def orthogonal(name: str, rank: int, d_out: int, d_in: int, seed: int) -> Pair:
    """Return A and B in orthogonal halves of the rank's space, so that B A = 0 up to rounding.

    Args:
        name: the layer's.
        rank: r, even.
        d_out: rows of the weight.
        d_in: columns of the weight.
        seed: the run's.
    """
    rng = stream(seed, "initial-orthogonal", client=name)
    Q, _ = np.linalg.qr(rng.standard_normal((rank, rank)))
    A = Q[0::2].T @ rng.standard_normal((rank // 2, d_in)) / 10.0
    B = rng.standard_normal((d_out, rank // 2)) @ Q[1::2] / 10.0
    return torch.from_numpy(A).float(), torch.from_numpy(B).float()


def pissa(weight: Tensor, rank: int, scaling: float) -> Pair:
    """Return the factors of the best approximation of a weight, scaling * B A, in equal parts.

    From the eigenvectors of the smaller Gram matrix in float64, which takes a fraction of the time
    of an SVD; a direction in which the weight is zero stays zero.

    Args:
        weight: of shape (d_out, d_in).
        rank: r, at most the smaller side.
        scaling: s.
    """
    W = weight.double()
    tall = W.shape[0] >= W.shape[1]
    squares, vectors = torch.linalg.eigh(W.T @ W if tall else W @ W.T)
    squares, vectors = squares[-rank:].flip(0), vectors[:, -rank:].flip(1)
    rounding = max(W.shape) * torch.finfo(W.dtype).eps * squares[:1].clamp(min=0.0)
    S = torch.where(squares > rounding, squares, 0.0).sqrt()
    root = (S / scaling).sqrt()
    inverse = torch.where(S > 0.0, 1.0 / (S * scaling).sqrt(), 0.0)
    if tall:
        A, B = root[:, None] * vectors.T, (W @ vectors) * inverse
    else:
        A, B = inverse[:, None] * (vectors.T @ W), vectors * root
    return _kept(A, B)


def olora(weight: Tensor, rank: int) -> Pair:
    """Return the first r rows of R and columns of Q of a weight's QR decomposition.

    Those of the first r columns alone, since Q^T W gives the rest of R.

    Args:
        weight: of shape (d_out, d_in).
        rank: r, at most the smaller side.
    """
    W = weight.double()
    Q, _ = torch.linalg.qr(W[:, :rank])
    return _kept(Q.T @ W, Q)


def dense_weight(module: nn.Module, name: str) -> Tensor:
    """Return the weight (d_out, d_in) of a PEFT layer's base, float32, dequantised where need be.

    Raises:
        ModelError: it is no linear layer.
    """
    from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type

    base = module.get_base_layer()  # type: ignore[operator]
    if not isinstance(base, nn.Linear):
        raise ModelError(
            f"adapter.init needs linear layers, and {name} is a {type(base).__name__}",
            'Set adapter.init to "default", or leave that layer out of adapter.targets.',
        )
    stored: Any = base.weight
    weight: Tensor = stored
    if get_bnb_param_type(stored):
        # PEFT's dequantize_module_weight would put a new weight into the module, and leave one of
        # INT8 on the CPU without its scales
        weight = dequantize_bnb_weight(stored, state=getattr(base, "state", None))
    return weight.detach().float()


def _kept(A: Tensor, B: Tensor) -> Pair:
    return A.float().cpu().contiguous(), B.float().cpu().contiguous()
