"""The resident model: the base loaded once and kept, adapters swapped into it in place.

Client and server both stand on it. The frozen weights are never written after loading; a test
hashes them before and after whole federations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedgraft import quantization
from fedgraft.activations import recompute_activations
from fedgraft.adapter import (
    Adapter,
    LoraLayer,
    Tensors,
    digest,
    factor_name,
    natural_order,
    pad_rank,
    parse_factor,
)
from fedgraft.attachment import attach
from fedgraft.base import hash_base, load_base, train_in_float32
from fedgraft.config import Config
from fedgraft.devices import pick_device, release_memory, with_smaller_batches
from fedgraft.errors import ModelError
from fedgraft.initialisation import Pair, dense_weight, derive_A, olora, orthogonal, pissa
from fedgraft.registry import load_plugin
from fedgraft.stopping import stop_if_asked
from fedgraft.tasks.task import Batch, Examples, Task

TASKS = "fedgraft.tasks"
SMALL_MODEL = 20_000_000
"""Parameters under which one thread is fastest, and the default."""


def load_task(config: Config) -> Task:
    """Build the config's task.

    Raises:
        ConfigError: no installed task has that name.
    """
    task: Task = load_plugin(TASKS, config.task.name, key="task.name")(config)
    return task


def default_threads(parameters: int) -> int:
    """Return torch's threads for a model of so many parameters when `threads` is unset."""
    return 1 if parameters < SMALL_MODEL else (os.cpu_count() or 1)


class ResidentModel:
    """A base with a PEFT adapter attached, into which any adapter of the same shapes is loaded.

    Attributes:
        base_hash: identity of the frozen base (`hash_base`).
        base_commit: the Hub commit that the base was read from; None for a local folder.
        parameters: the trainable parameters by their adapter tensor names, in stable order.
        scaling: alpha / r of each layer at its whole rank.
        ranks: each layer's whole rank.
        init: how the run's first factors are made, `adapter.init`.
        threads: torch threads that work on this model uses.
        unquantised: the linear layers of a quantised base that stay as they are, and why, by name.
        micro_batch: the most examples of a forward pass that memory has been found to suffice for;
            None while it always did.
        half_precision: whether gradients pass through float16, whose range they may fall short of.
    """

    def __init__(self, task: Task, config: Config) -> None:
        self.device = pick_device(config.model.device)
        base = load_base(task, config, self.device)
        self.base_hash = hash_base(base, quantization.describe(config.model))
        # transformers notes it on the config of what comes from the Hub, whatever was asked for.
        self.base_commit: str | None = getattr(getattr(base, "config", None), "_commit_hash", None)
        self.unquantised: dict[str, str] = {}
        if config.model.quantization != "none":
            self.unquantised = quantization.unquantised_modules(base, task.extras)
        self.threads = config.threads or default_threads(sum(p.numel() for p in base.parameters()))
        if config.model.gradient_checkpointing:
            recompute_activations(base)
        self.model = attach(base, task, config).eval()
        if config.model.dtype != "float32":
            train_in_float32(self.model, task.extras)
        self.init = config.adapter.init
        named = {
            _adapter_name(name): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        self.parameters = {name: named[name] for name in sorted(named, key=natural_order)}
        self._lora = {  # PEFT's layers, by the adapter's layer names
            parsed[0]: self.model.get_submodule(parsed[0])
            for name in self.parameters
            if (parsed := parse_factor(name)) is not None and parsed[1] == "A"
        }
        self.scaling = {
            name: float(module.scaling["default"])  # type: ignore[index]
            for name, module in self._lora.items()
        }
        self.ranks = {name: len(self.parameters[factor_name(name, "A")]) for name in self._lora}
        self.micro_batch: int | None = None
        self.half_precision = config.model.dtype == "float16"
        self._residual: list[torch.utils.hooks.RemovableHandle] = []
        # Kept, since the next run in this process must not start from the last one's head.
        self._base_extras = {
            name: parameter.detach().float().cpu().clone()
            for name, parameter in self.parameters.items()
            if parse_factor(name) is None
        }

    def use_threads(self) -> None:
        """Give torch this model's thread count; sums depend on it to the last bit."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)

    def train_mode(self) -> None:
        """Switch dropout on, and leave batch normalisation as the base has it.

        Its running statistics are no part of the adapter: a client that changed them would leave
        something of its data behind for the next one.
        """
        if self.model.training:
            return
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()

    @torch.no_grad()
    def initial_adapter(self, seed: int) -> Adapter:
        """Return the adapter that changes nothing, as `adapter.init` starts it.

        By default A from the seed, B zero, extras the base's own. Where factors start from a
        product that is not zero, the residual takes it away again.
        """
        layers: dict[str, LoraLayer] = {}
        residual: dict[str, LoraLayer] = {}
        for name, scaling in self.scaling.items():
            A, B = self._initial_factors(name, seed)
            layers[name] = LoraLayer(A, B, scaling)
            if self.init in ("pissa", "olora"):
                residual[name] = LoraLayer(A.clone(), -scaling * B, 1.0)
        extras = {name: tensor.clone() for name, tensor in self._base_extras.items()}
        return Adapter(layers, extras, residual)

    def _initial_factors(self, layer: str, seed: int) -> Pair:
        """Return the A and B that one layer starts from."""
        name, rank, module = factor_name(layer, "A"), self.ranks[layer], self._lora[layer]
        A, B = (self.parameters[factor_name(layer, factor)] for factor in "AB")
        if self.init == "orthogonal":
            return orthogonal(layer, rank, len(B), A.shape[1], seed)
        if self.init == "pissa":
            return pissa(dense_weight(module, layer), rank, self.scaling[layer])
        if self.init == "olora":
            return olora(dense_weight(module, layer), rank)
        return derive_A(name, tuple(A.shape), seed, self.init), torch.zeros(B.shape)

    def derived_A(self, seed: int) -> Tensors:
        """Return every layer's A as the run's seed determines it, float32."""
        return {
            name: derive_A(name, tuple(self.parameters[name].shape), seed, self.init)
            for name in (factor_name(layer, "A") for layer in self._lora)
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy named tensors into the model in place; the ones not named stay.

        Raises:
            ModelError: a tensor that the model has not, or of another shape.
        """
        for name, tensor in tensors.items():
            parameter = self.parameters.get(name)
            if parameter is None or parameter.shape != tensor.shape:
                found = None if parameter is None else tuple(parameter.shape)
                raise ModelError(
                    f"the adapter's tensor {name!r} has shape {tuple(tensor.shape)}; "
                    f"this model's is {found}",
                    "Use the base, adapter.rank and adapter.targets it was made with.",
                )
            parameter.copy_(tensor)

    def take(self, adapter: Adapter) -> None:
        """Load a whole adapter: its factors, its scalings, its extras and its residual.

        Factors of a smaller rank than the model's are padded with zeros, which get no gradient and
        add nothing: the model then is the one of that rank.

        Raises:
            ModelError: a tensor that the model has not, or of another shape.
        """
        tensors = adapter.tensors()
        for name, tensor in tensors.items():
            parsed, parameter = parse_factor(name), self.parameters.get(name)
            if parsed is not None and parameter is not None:
                axis = 0 if parsed[1] == "A" else 1
                if tensor.shape[axis] < parameter.shape[axis]:
                    tensors[name] = pad_rank(tensor, parameter.shape[axis], axis)
        self.load(tensors)
        for name, module in self._lora.items():
            module.scaling["default"] = adapter.layers[name].scaling  # type: ignore[index, operator]
        self._hold_residual(adapter.residual)

    def lora_module(self, layer: str) -> nn.Module:
        """Return PEFT's module of one of the adapter's layers."""
        return self._lora[layer]

    def _hold_residual(self, residual: Mapping[str, LoraLayer]) -> None:
        """Let every layer add its residual's output to its own, whatever the base is stored as."""
        for handle in self._residual:
            handle.remove()
        self._residual = [
            self._lora[name].register_forward_hook(_adding(layer, self.device))
            for name, layer in residual.items()
        ]

    def read(self) -> Tensors:
        """Return copies of the trainable tensors, float32, on the CPU."""
        return {
            name: parameter.detach().to("cpu", torch.float32, copy=True)
            for name, parameter in self.parameters.items()
        }

    def adapter(self) -> Adapter:
        """Return what `read` does as an adapter."""
        return Adapter.from_tensors(self.read(), self.scaling)

    def evaluate(self, task: Task, adapter: Adapter, examples: Examples) -> dict[str, float]:
        """Load an adapter and return the task's metrics on the examples.

        Raises:
            RunError: memory does not suffice for one example at a time.
        """
        batch_size = task.config.evaluate.batch_size or task.evaluation_batch
        order = longest_first(examples)

        def measure(size: int) -> dict[str, float]:
            return task.measure(self.model, self.batches(examples, size, order))

        self.use_threads()
        self.take(adapter)
        self.model.eval()
        with torch.inference_mode():
            metrics = with_smaller_batches(batch_size, self.device, measure)
        return metrics | {"examples": float(len(examples))}

    def batches(
        self, examples: Examples, batch_size: int, order: np.ndarray | None = None
    ) -> Iterator[Batch]:
        """Yield the examples on the model's device, in their own order or the one given."""
        order = np.arange(len(examples)) if order is None else order
        for start in range(0, len(examples), batch_size):
            stop_if_asked()
            yield self.to_device(examples.batch(order[start : start + batch_size]))

    def to_device(self, batch: Batch) -> Batch:
        """Move a batch to the model's device."""
        if self.device.type == "cpu":
            return batch
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def peft_config(self) -> dict[str, Any]:
        """Return PEFT's config of the adapter, as plain values (sets included)."""
        config: dict[str, Any] = self.model.peft_config["default"].to_dict()  # type: ignore[union-attr, index]
        return config

    def frozen_digest(self) -> str:
        """Return a hash of every weight and buffer that must not change."""
        frozen = {n: p for n, p in self.model.named_parameters() if not p.requires_grad}
        return digest(frozen | dict(self.model.named_buffers()))


def longest_first(examples: Examples) -> np.ndarray:
    """Return the order in which examples need the least padding: by length, the longest first.

    What would not fit into the memory then shows at once. Examples without lengths stay in order.
    """
    lengths = getattr(examples, "lengths", None)
    if lengths is None:
        return np.arange(len(examples))
    return np.argsort(-np.asarray(lengths), kind="stable")


_resident: dict[str, ResidentModel] = {}
_tasks: dict[str, Task] = {}
_TASKS_KEPT = 4


def resident_task(config: Config) -> Task:
    """Return the process's task for this config, so that data are read and encoded only once.

    Raises:
        ConfigError: no installed task has that name.
    """
    tree = config.to_dict()
    relevant = ("task", "model", "federation", "evaluate", "seed", "train")
    key = repr({group: tree[group] for group in relevant})
    if key not in _tasks:
        while len(_tasks) >= _TASKS_KEPT:
            del _tasks[next(iter(_tasks))]
        _tasks[key] = load_task(config)
    return _tasks[key]


def resident_model(task: Task, config: Config) -> ResidentModel:
    """Return the process's resident model for this config, loading it on the first call only.

    One model is kept: asking for another base or adapter shape lets the first one go.
    """
    key = _residency(config)
    if key not in _resident:
        _resident.clear()
        _resident[key] = ResidentModel(task, config)
    return _resident[key]


def is_resident(config: Config) -> bool:
    """Whether `resident_model` has this config's model already."""
    return _residency(config) in _resident


def resident_base() -> str:
    """Return the hash of the base that is resident now; "" where none is."""
    return next((model.base_hash for model in _resident.values()), "")


def let_go() -> None:
    """Drop the resident model and all data; both are loaded anew when they are next asked for."""
    devices = {model.device for model in _resident.values()}
    _resident.clear()
    _tasks.clear()
    for device in devices:
        release_memory(device)


def _residency(config: Config) -> str:
    """Return what of a config makes another resident model."""
    tree = config.to_dict()
    adapter = {key: value for key, value in tree["adapter"].items() if key != "from"}
    task_keys = {key: value for key, value in tree["task"].items() if key != "samples"}
    return repr((task_keys, tree["model"], adapter, config.threads))


def _adding(
    layer: LoraLayer, device: torch.device
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Return a forward hook that adds x (scaling B A)^T to a linear layer's output."""
    A, B = layer.A.to(device), (layer.scaling * layer.B).to(device)

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].to(A.dtype)
        return output + ((x @ A.T) @ B.T).to(output.dtype)

    return add


def _adapter_name(parameter_name: str) -> str:
    """Return the state-dict name of a parameter of the adapter PEFT calls "default"."""
    name = parameter_name.replace(".modules_to_save.default", "")
    # a vector to PEFT's files, though a module to torch
    name = name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")
    return name.replace(".lora_A.default", ".lora_A").replace(".lora_B.default", ".lora_B")
