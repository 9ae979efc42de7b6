"""Attach LoRA to a base: which modules it goes to, and what cannot work, found beforehand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fedgraft.adapter import PREFIX
from fedgraft.config import AdapterConfig, Config
from fedgraft.errors import ConfigError, ModelError
from fedgraft.tasks.task import Task

ALL_LINEAR = "all-linear"


def attach(base: nn.Module, task: Task, config: Config) -> nn.Module:
    """Attach the config's adapter with PEFT.

    Raises:
        ModelError: a target that matches no module, or one that LoRA cannot go to.
        ConfigError: a rank that a targeted layer cannot have, or a pattern that matches no layer.
    """
    from peft import LoraConfig, get_peft_model

    adapter = config.adapter
    targets = task.default_targets if adapter.targets is None else adapter.targets
    layers = _targeted(base, task, targets)
    _check_patterns(adapter, layers)
    _check_ranks(adapter, layers)
    if adapter.type == "dora":
        _check_dora(layers)
    peft_config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type] # PEFT only divides by it
        rank_pattern=dict(adapter.rank_pattern or {}),
        alpha_pattern=dict(adapter.alpha_pattern or {}),
        lora_dropout=adapter.dropout,
        use_rslora=adapter.type == "rslora",
        use_dora=adapter.type == "dora",
        target_modules=targets,
        modules_to_save=list(task.extras) or None,
        task_type=task.peft_task_type,
    )
    model: nn.Module = get_peft_model(base, peft_config)
    return model


def peft_scalings(settings: Mapping[str, Any], layers: Iterable[str]) -> dict[str, float]:
    """Return the scaling of every layer as an adapter's own settings have it.

    Args:
        settings: of PEFT's adapter_config.json.
        layers: the layers' names, as in the adapter.
    """
    made = {}
    for layer in layers:
        name = layer.removeprefix(PREFIX)
        rank = _by_pattern(settings.get("rank_pattern"), name, settings["r"])
        alpha = _by_pattern(settings.get("alpha_pattern"), name, settings["lora_alpha"])
        made[layer] = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    return made


def _by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Return a layer's value as PEFT finds it: by the first key that its name ends with."""
    from peft.utils.other import get_pattern_key

    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), name), default)


def _targeted(base: nn.Module, task: Task, targets: list[str] | str) -> dict[str, nn.Module]:
    """Return the modules that PEFT will attach to, by name.

    PEFT takes a list of which one entry matches; here every entry must. Any string but
    "all-linear" is a regular expression that whole names match.

    Raises:
        ModelError: an entry that matches no module, or an expression no layer or not only layers.
    """
    whole = {f".{name}." for name in task.extras}  # trained as they are, beside the factors
    modules = {
        name: module
        for name, module in base.named_modules()
        if not any(extra in f".{name}." for extra in whole)
    }
    linear = {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}
    if targets == ALL_LINEAR:
        output = getattr(base, "get_output_embeddings", lambda: None)()
        rest: dict[str, nn.Module] = {n: m for n, m in linear.items() if m is not output}
        if not rest:
            raise ModelError(
                f"adapter.targets is {targets!r}, and the base has no linear layer",
                "Name the modules that LoRA is to attach to.",
            )
        return rest
    if isinstance(targets, str):
        return _matching(targets, modules, linear)
    chosen: dict[str, nn.Module] = {}
    for entry in targets:
        found = {n: m for n, m in modules.items() if f".{n}".endswith(f".{entry}")}
        if not found:
            raise ModelError(
                f"adapter.targets is {targets!r}, and no module of the base matches {entry!r}",
                f'{_linear_here(linear)}; or use "all-linear".',
            )
        chosen |= found
    if not chosen:
        raise ModelError(
            "adapter.targets is an empty list", f'{_linear_here(linear)}; or use "all-linear".'
        )
    return chosen


def _matching(
    expression: str, modules: Mapping[str, nn.Module], linear: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """Return the modules whose whole names a regular expression matches.

    Raises:
        ModelError: it is none, it matches nothing, or something that holds other modules.
    """
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise ModelError(
            f"adapter.targets is {expression!r}, which is no regular expression: {error}",
            f'{_linear_here(linear)}; a list of names and "all-linear" work, too.',
        ) from None
    found = {name: module for name, module in modules.items() if compiled.fullmatch(name)}
    if not found:
        example = next(iter(linear), "encoder.layer.0.query")
        raise ModelError(
            f"adapter.targets is {expression!r}, and no whole name of a module matches that "
            "regular expression",
            f"{_linear_here(linear)}, and a whole name is {example!r}. A name alone goes into a "
            "list.",
        )
    for name, module in found.items():
        if next(module.children(), None) is not None:
            raise ModelError(
                f"adapter.targets is {expression!r}, which matches {name or 'the whole base'!r}, "
                f"a {type(module).__name__} with layers inside",
                f"Let it match the layers themselves. {_linear_here(linear)}.",
            )
    return found


def _linear_here(linear: Mapping[str, nn.Module]) -> str:
    return f"Linear modules here: {', '.join(sorted({n.split('.')[-1] for n in linear}))}"


def _check_patterns(adapter: AdapterConfig, layers: Mapping[str, nn.Module]) -> None:
    """Refuse a pattern that gives no layer anything, which PEFT would pass over.

    Raises:
        ConfigError: it is no regular expression, or matches no targeted layer, or none that an
            earlier one leaves.
    """
    for key, pattern in (
        ("adapter.rank-pattern", adapter.rank_pattern),
        ("adapter.alpha-pattern", adapter.alpha_pattern),
    ):
        for entry in pattern or {}:
            try:
                re.compile(entry)
            except re.error as error:
                raise ConfigError(
                    f"{key} has {entry!r}, which is no regular expression: {error}",
                    "Write a module's name, or an expression that the end of its name matches.",
                ) from None
        given = {_by_pattern({k: k for k in pattern or {}}, name, None) for name in layers}
        for entry in pattern or {}:
            if entry not in given:
                ends = ", ".join(sorted({name.split(".")[-1] for name in layers}))
                raise ConfigError(
                    f"{key} has {entry!r}, and no layer of the adapter is left for it to match",
                    f"Layers here end with {ends}; the first entry that matches counts.",
                )


def _check_ranks(adapter: AdapterConfig, layers: Mapping[str, nn.Module]) -> None:
    """Refuse a rank that no weight change of a layer can have, before anything is allocated.

    Raises:
        ConfigError: it is larger than the smaller side of a layer's weight.
    """
    shapes = {name: shape for name, module in layers.items() if (shape := _shape(module))}
    for name, shape in sorted(shapes.items(), key=lambda item: min(item[1])):
        rank = _by_pattern(adapter.rank_pattern, name, adapter.rank)
        if rank > min(shape):
            key = "adapter.rank" if rank == adapter.rank else "adapter.rank-pattern"
            raise ConfigError(
                f"{key} is {rank}, and the weight of {name} is {shape[0]} x {shape[1]}: a change "
                f"of it has rank {min(shape)} at most",
                f"Set {key} to at most {min(shape)}, or leave that layer out of adapter.targets.",
            )


def _check_dora(layers: Mapping[str, nn.Module]) -> None:
    """Refuse DoRA where PEFT's loses the scales of the weights that it takes the norm of.

    Raises:
        ConfigError: an INT8 layer lies on the CPU.
    """
    for name, module in layers.items():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.device.type != "cpu":
            continue
        if type(weight).__name__ == "Int8Params":
            raise ConfigError(
                f'adapter.type is "dora", and {name} is an INT8 layer on the CPU, where PEFT '
                "cannot compute DoRA's norm",
                'Set adapter.type to "lora" or "rslora", or quantise to NF4 or not at all.',
            )


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """Return the shape of a layer's matrix, however it is stored; None where it has none."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2:
        return weight.shape[0], weight.shape[1]
    return None
