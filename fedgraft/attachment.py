"""Attach LoRA to a base: which modules it goes to, and what cannot work, found beforehand."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fedgraft.config import Config
from fedgraft.errors import ConfigError, ModelError
from fedgraft.tasks.task import Task


def attach(base: nn.Module, task: Task, config: Config) -> nn.Module:
    """Attach the config's adapter with PEFT.

    Raises:
        ModelError: a target that matches no module.
        ConfigError: a rank that a targeted layer cannot have.
    """
    from peft import LoraConfig, get_peft_model

    targets = config.adapter.targets or task.default_targets
    _check_rank(config.adapter.rank, _targeted(base, task, targets))
    peft_config = LoraConfig(
        r=config.adapter.rank,
        lora_alpha=config.adapter.alpha,  # type: ignore[arg-type] # PEFT only divides by it
        lora_dropout=config.adapter.dropout,
        use_rslora=config.adapter.type == "rslora",
        target_modules=targets,
        modules_to_save=list(task.extras) or None,
        task_type=task.peft_task_type,
    )
    model: nn.Module = get_peft_model(base, peft_config)
    return model


def _targeted(base: nn.Module, task: Task, targets: list[str] | str) -> dict[str, nn.Module]:
    """Return the modules that PEFT will attach to, by name.

    PEFT takes a list of which one entry matches; here every entry must.

    Raises:
        ModelError: an entry that matches no module.
    """
    whole = {f".{name}." for name in task.extras}  # trained as they are, beside the factors
    modules = {
        name: module
        for name, module in base.named_modules()
        if not any(extra in f".{name}." for extra in whole)
    }
    linear = {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}
    if isinstance(targets, str):
        output = getattr(base, "get_output_embeddings", lambda: None)()
        rest: dict[str, nn.Module] = {n: m for n, m in linear.items() if m is not output}
        if not rest:
            raise ModelError(
                f"adapter.targets is {targets!r}, and the base has no linear layer",
                "Name the modules that LoRA is to attach to.",
            )
        return rest
    chosen: dict[str, nn.Module] = {}
    for entry in targets:
        found = {n: m for n, m in modules.items() if f".{n}".endswith(f".{entry}")}
        if not found:
            candidates = sorted({name.split(".")[-1] for name in linear})
            raise ModelError(
                f"adapter.targets is {targets!r}, and no module of the base matches {entry!r}",
                f'Linear modules here: {", ".join(candidates)}; or use "all-linear".',
            )
        chosen |= found
    return chosen


def _check_rank(rank: int, layers: Mapping[str, nn.Module]) -> None:
    """Refuse a rank that no weight change of a layer can have, before anything is allocated.

    Raises:
        ConfigError: it is larger than the smaller side of a layer's weight.
    """
    shapes = {
        name: shape
        for name, module in layers.items()
        if (shape := _weight_shape(module)) is not None
    }
    if not shapes:
        return
    name, shape = min(shapes.items(), key=lambda item: min(item[1]))
    if rank > min(shape):
        raise ConfigError(
            f"adapter.rank is {rank}, and the weight of {name} is {shape[0]} x {shape[1]}: "
            f"a change of it has rank {min(shape)} at most",
            f"Set adapter.rank to at most {min(shape)}, or leave that layer out of "
            "adapter.targets.",
        )


def _weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """Return the shape of a layer's matrix; None for a layer without one."""
    if isinstance(module, nn.Linear):  # whose weight, where it is quantised, is packed otherwise
        return (module.out_features, module.in_features)
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) and weight.ndim == 2 else None
