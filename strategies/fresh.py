"""New rows of A in the middle of a run, as PEFT would initialise them."""

from __future__ import annotations

import torch
from torch import Tensor

from fedgraft.seeds import stream
from strategies.rule import LayerContext


def fresh_A(context: LayerContext, purpose: str) -> Tensor:
    """Return a random A (r, d_in) for this layer and round, float32.

    Uniform within 1 / sqrt(d_in), PEFT's Kaiming bounds, from the run's seed by a portable
    generator: the same on every machine and in a resumed run.

    Args:
        context: gives the shape, the seed, the round and the layer.
        purpose: the rule's name.
    """
    shape = tuple(context.current.A.shape)
    bound = shape[1] ** -0.5
    rng = stream(context.seed, purpose, round=context.round, client=context.name)
    values = torch.from_numpy(rng.uniform(-bound, bound, size=shape))
    return values.to(context.current.A.device, torch.float32)
