"""Activation (gradient) checkpointing: computing activations again instead of keeping them.

Chen et al. 2016, arXiv:1604.06174: a layer's input is kept, and what lies inside it is computed
again on the way back. It costs about a third of the time and most of the memory of activations.
"""

from __future__ import annotations

from torch import nn

from fedgraft.errors import ModelError


def recompute_activations(base: nn.Module) -> None:
    """Let a transformers model compute its layers' activations again on the way back.

    Raises:
        ModelError: its architecture cannot.
    """
    # transformers 5.20 gave it another name; the older one goes in version 6.
    enable = getattr(base, "activation_checkpointing_enable", None) or getattr(
        base, "gradient_checkpointing_enable", None
    )
    if enable is None or not getattr(base, "supports_gradient_checkpointing", False):
        raise ModelError(
            f"model.gradient-checkpointing is set, and a {type(base).__name__} cannot do it",
            "Leave it out.",
        )
    # The reentrant kind gives no gradient to what lies behind inputs that have none.
    enable({"use_reentrant": False})


def recomputed_layers(model: nn.Module) -> int:
    """Return how many layers of a model can be computed again one by one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules())
