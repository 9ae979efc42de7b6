"""What tests of robust rules look at: whole changes, dense products, and clients as numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from federations import LAYER, Federation, numpy_of

from fedgraft.adapter import Adapter, LoraLayer
from strategies.aggregation import Aggregated

EXTRA = "classifier.weight"


def products(fed: Federation, layer: str = LAYER) -> np.ndarray:
    """B_k A_k of all clients (K, d_out, d_in), in the order of names, unscaled."""
    return np.stack([c.B @ c.A for c in in_order(fed).clients(layer)])


def in_order(fed: Federation) -> Federation:
    return replace(fed, updates=dict(sorted(fed.updates.items())))


def product_of(layer: LoraLayer) -> np.ndarray:
    A, B = numpy_of(layer)
    return B @ A


def changes(fed: Federation) -> np.ndarray:
    """What each client changes of the scaled products and extras, in one row (K, n)."""
    theirs = [fed.current.with_tensors(tensors) for _, tensors in in_order(fed).updates.values()]
    return np.stack([flat(adapter) - flat(fed.current) for adapter in theirs])


def flat(adapter: Adapter) -> np.ndarray:
    """All scaled products, then the extras."""
    layers = [layer.scaling * product_of(layer).ravel() for layer in adapter.layers.values()]
    extras = [extra.double().numpy().ravel() for extra in adapter.extras.values()]
    return np.concatenate([*layers, *extras])


def is_best_for(layer: LoraLayer, wanted: np.ndarray, size: float) -> None:
    """B A is as close to a matrix as any product of its rank; entries were made in float32."""
    values = np.linalg.svd(wanted, compute_uv=False)
    lost = float(np.linalg.norm(values[layer.rank :]))
    assert np.linalg.norm(product_of(layer) - wanted) <= lost + 2e-6 * size


def size_of(fed: Federation) -> float:
    return max(float(np.linalg.norm(c.B) * np.linalg.norm(c.A)) for c in fed.clients())


def scalars(*values: float) -> Federation:
    """A layer of 1 x 1 and rank 1 with A = 1 throughout, so that clients are numbers; now 0."""
    tensors = {
        f"{k}": (
            1.0,
            {
                f"{LAYER}.lora_A.weight": torch.ones(1, 1),
                f"{LAYER}.lora_B.weight": torch.tensor([[value]]),
            },
        )
        for k, value in enumerate(values)
    }
    return Federation(Adapter({LAYER: LoraLayer(torch.ones(1, 1), torch.zeros(1, 1))}), tensors)


def number(made: Aggregated) -> float:
    return made.adapter.layers[LAYER].product().item()
