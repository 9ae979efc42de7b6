"""How much memory training will take, told before the base is loaded.

The base's structure runs one batch without weights: torch's fake tensors know shapes and types, and
what autograd would keep of them is added up. A 7B model takes two seconds and a few megabytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedgraft import quantization
from fedgraft.activations import recompute_activations, recomputed_layers
from fedgraft.attachment import attach
from fedgraft.config import Config
from fedgraft.devices import free_memory, pick_device
from fedgraft.tasks.task import Batch, Task

FLOAT32, FLOAT64 = 4, 8
STATE = {"sgd": 0, "adamw-8bit": 2, "paged-adamw": 0, "paged-adamw-8bit": 0}
"""Bytes a trained parameter of an optimizer's state on the device; AdamW's is 8."""
_BLOCK_SCALE = {"nf4": 4.0 / 64, "nf4-double": 1.0 / 64 + 4.0 / (64 * 256)}
"""Bytes a weight for the scales of NF4's blocks."""
_TABLES = {"nf4": 141, "nf4-double": 1257}
"""Bytes a layer beside: NF4's 16 values, the 256 that scales may have, bitsandbytes' own note."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training will take on its device.

    Attributes:
        parameters: of the base (a count, not bytes).
        base: its weights as they will be stored.
        adapter: trained weights, their gradients and the optimizer's state, in float32.
        activations: what the forward pass keeps for a micro-batch; in private training also what
            every example's own gradient takes.
        workspace: the largest of what comes and goes: the scores' gradient, one layer computed
            again, one layer's weights decoded.
        free: what the device has free now.
        where: the device, as `model.device` would name it.
        sequence: micro-batch and, for texts, length, in words.
    """

    parameters: int
    base: int
    adapter: int
    activations: int
    workspace: int
    free: int
    where: str
    sequence: str

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.adapter + self.activations + self.workspace

    @property
    def fits(self) -> bool:
        """Whether the device has that much free."""
        return self.total <= self.free

    def __str__(self) -> str:
        parts = (
            f"base {_size(self.base)}, adapter and optimizer {_size(self.adapter)}, activations "
            f"{_size(self.activations + self.workspace)} ({self.sequence})"
        )
        return (
            f"Training will take about {_size(self.total)} of the {_size(self.free)} free on "
            f"{self.where}: {parts}."
        )


def estimate(task: Task, config: Config) -> MemoryEstimate | None:
    """Estimate the memory of one client's training; None for a task that gives no structure.

    Raises:
        ConfigError, ModelError: the adapter cannot be attached to this base.
    """
    structure = task.structure()
    if structure is None:
        return None
    settings: Any = structure.config
    settings.use_cache = False
    device = pick_device(config.model.device)
    left = quantization.unquantised_modules(structure, task.extras)
    base, parameters, largest = _stored(structure, config, left)
    private = config.privacy.mode == "example"
    micro = config.train.micro_batch or config.train.batch_size
    if private and config.model.quantization == "int8":
        micro = 1  # else one example would change how others are computed
    batch = task.largest_batch(micro)
    model = attach(structure, task, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with _Watch(model) as watch:
        kept, scores = _kept(model, batch)
    inner = 0
    if config.model.gradient_checkpointing and (layers := recomputed_layers(model)):
        whole = kept
        recompute_activations(structure)  # which PEFT has put the adapter into
        kept, scores = _kept(model, batch)
        inner = (whole - kept) // layers
    state = STATE.get(config.train.optimizer, 2 * FLOAT32)
    if private:
        # Layers' inputs outlive the backward pass, and gradients come when it is through.
        kept = max(kept, watch.inputs + watch.gradients) + watch.outputs
        state += FLOAT64  # the sums
    shape = tuple(next(iter(batch.values())).shape)
    return MemoryEstimate(
        parameters=parameters,
        base=base,
        adapter=trained * (2 * FLOAT32 + state),
        activations=kept,
        workspace=max(scores, inner) + largest,
        free=free_memory(device),
        where=str(device),
        sequence=f"{shape[0]} x {shape[1]} tokens" if "input_ids" in batch else f"{micro} examples",
    )


def advice(found: MemoryEstimate, config: Config) -> str:
    """Return what would make a model fit that does not."""
    ways = []
    if config.model.quantization == "none" and found.where.startswith(("cpu", "cuda")):
        ways.append("model.quantization=nf4")
    if config.model.dtype == "float32":
        ways.append("model.dtype=bfloat16")
    if not config.model.gradient_checkpointing:
        ways.append("model.gradient-checkpointing=true")
    micro = config.train.micro_batch or config.train.batch_size
    if micro > 1:
        ways.append(f"train.micro-batch={micro // 2}")
    if "tokens" in found.sequence:
        ways.append(f"task.max-length={config.task.max_length // 2}")
    if not ways:
        return "That is more than is free. Choose a smaller base."
    return f"That is more than is free. Set {', '.join(ways)}, or choose a smaller base."


def _stored(structure: nn.Module, config: Config, left: dict[str, str]) -> tuple[int, int, int]:
    """Return the base's bytes, its parameters, and the bytes of its largest decoded layer."""
    how = quantization.describe(config.model)
    size = torch.empty((), dtype=getattr(torch, config.model.dtype)).element_size()
    packed = {}
    if how != "none":
        packed = {
            module.weight: module
            for name, module in structure.named_modules()
            if isinstance(module, nn.Linear) and name not in left
        }
    total, count, largest = 0.0, 0, 0
    for tensor in {*structure.parameters(), *structure.buffers()}:
        count += tensor.numel()
        if tensor not in packed:
            total += tensor.numel() * size
            continue
        largest = max(largest, tensor.numel() * size)
        if how == "int8":
            total += tensor.numel() + FLOAT32 * packed[tensor].out_features
        else:
            total += tensor.numel() * (0.5 + _BLOCK_SCALE[how]) + _TABLES[how]
    return round(total), count, largest


def _kept(model: nn.Module, batch: Batch) -> tuple[int, int]:
    """Return the bytes that autograd keeps of a batch, and those of its largest gradient."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, Any] = {}  # storages, held so that none is counted under another's number

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode():
        _without_weights(model)
        own = {
            tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())
        }
        # Without a mask, since whether it hides anything cannot be asked of a fake one.
        inputs = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype)
            for name, tensor in batch.items()
            if name != "attention_mask"
        }
        labels = inputs.pop("labels").flatten()
        model.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(**inputs).logits.float()
            functional.cross_entropy(logits.reshape(len(labels), -1), labels)
        sizes = [storage.nbytes() for storage in kept.values()]
    return sum(sizes), max(sizes, default=0)


class _Watch:
    """Counts, while a batch goes forward, what per-example gradients of it will take, in bytes.

    Attributes:
        inputs: what goes into the layers that train.
        outputs: the loss's gradient by what comes out of them.
        gradients: each example's own, or where its two Gram matrices are smaller those, with
            inputs and outputs once more in float64 (as `client.per_example` does).
    """

    def __init__(self, model: nn.Module) -> None:
        self.inputs = self.outputs = self.gradients = 0
        self._seen: dict[int, Any] = {}  # storages, held as in `_kept`
        self._modules = [
            module
            for module in model.modules()
            if any(p.requires_grad for p in module.parameters(recurse=False))
        ]

    def __enter__(self) -> _Watch:
        self._handles = [module.register_forward_hook(self._count) for module in self._modules]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, storage = inputs[0], inputs[0].untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage
            self.inputs += storage.nbytes()
        self.outputs += output.numel() * output.element_size()
        trained = sum(p.numel() for p in module.parameters(recurse=False) if p.requires_grad)
        positions = x[0].numel() // x.shape[-1]
        if isinstance(module, nn.Linear) and 2 * positions**2 <= module.weight.numel():
            self.gradients += FLOAT64 * (x.numel() + output.numel() + 2 * len(x) * positions**2)
        else:
            self.gradients += FLOAT32 * len(x) * trained


def _without_weights(model: nn.Module) -> None:
    """Give every weight of a structure the CPU's shape and no memory; under fake tensors."""
    made: dict[Tensor, Tensor] = {}  # a tied weight stays one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[parameter]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
