"""The adapter: everything that is trained and travels.

An adapter is a set of LoRA factors, one pair a layer, and named extras (a classifier head, say).
A layer with base weight W0 (d_out, d_in) computes with W0 + scaling * B @ A, where A is (r, d_in)
and B is (d_out, r) (Hu et al. 2021, arXiv:2106.09685, equation 3). Tensors carry the names of
PEFT's own state dicts, so an adapter is exchanged with any PEFT program as it stands.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedgraft import npy, sparse
from fedgraft.errors import UpdateError

Tensors = dict[str, Tensor]
"""Named tensors, the common currency of messages, spools and checkpoints."""

PREFIX = "base_model.model."
_NUMPY = "numpy.ndarray"
"""What Flower calls the serialisation of numpy.save, the one that its own strategies read."""
_SPARSE = "fedgraft.sparse"
_FACTOR = re.compile(r"^(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight$")


def natural_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which `layer.2` comes before `layer.10`, the same on every machine.

    Different names have different keys: "1" and "01" are told apart by the name itself.
    """
    parts = re.split(r"(\d+)", name)
    numbered = ((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts)
    return (*numbered, (-1, 0, name))


def factor_name(layer: str, factor: str) -> str:
    """Return the tensor name of one factor ("A" or "B") of a layer."""
    return f"{layer}.lora_{factor}.weight"


def parse_factor(name: str) -> tuple[str, str] | None:
    """Split a tensor name into (layer, "A" or "B"); None for an extra.

    The factor is read from the name and never from the shape: when d = r the shapes are equal.
    """
    match = _FACTOR.match(name)
    return (match["layer"], match["factor"]) if match else None


def pad_rank(factor: Tensor, rank: int, axis: int) -> Tensor:
    """Return a factor with zeros appended along its rank's axis."""
    shape = list(factor.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([factor, factor.new_zeros(shape)], dim=axis)


@dataclass(frozen=True)
class LoraLayer:
    """The LoRA factors of one layer: A (r, d_in), B (d_out, r), and scaling (alpha / r)."""

    A: Tensor
    B: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """The rank r."""
        return int(self.A.shape[0])

    def product(self) -> Tensor:
        """Return the layer's weight change, scaling * B @ A, of shape (d_out, d_in), in float32."""
        return self.scaling * (self.B.float() @ self.A.float())

    def with_factors(self, factors: Mapping[str, Tensor]) -> LoraLayer:
        """Return the layer with A, B or both replaced."""
        return replace(self, A=factors.get("A", self.A), B=factors.get("B", self.B))


@dataclass(frozen=True)
class Adapter:
    """LoRA layers and extras, in the stable order of `natural_order`.

    Attributes:
        layers: the factors that are trained, by layer.
        extras: trained tensors that are not LoRA, by name.
        residual: by layer, what an aggregation rule has added to the base: frozen factors of any
            rank beside the trained ones, so that a quantised base can take them.
    """

    layers: Mapping[str, LoraLayer]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    residual: Mapping[str, LoraLayer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _ordered(self.layers))
        object.__setattr__(self, "extras", _ordered(self.extras))
        object.__setattr__(self, "residual", _ordered(self.residual))

    @property
    def scalings(self) -> dict[str, float]:
        """The scaling alpha / r of each layer."""
        return {name: layer.scaling for name, layer in self.layers.items()}

    def tensors(self, factors: Iterable[str] = ("A", "B"), *, extras: bool = True) -> Tensors:
        """Return the named tensors, in stable order: the given factors, then the extras."""
        wanted = [factor for factor in ("A", "B") if factor in set(factors)]
        tensors = {
            factor_name(name, factor): getattr(layer, factor)
            for name, layer in self.layers.items()
            for factor in wanted
        }
        if extras:
            tensors |= self.extras
        return tensors

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], scaling: float | Mapping[str, float] = 1.0
    ) -> Adapter:
        """Build an adapter from PEFT-named tensors.

        Args:
            tensors: PEFT's state dict, as `get_peft_model_state_dict` returns it.
            scaling: alpha / r, one for all layers or one for each.

        Raises:
            UpdateError: a layer has only one of its two factors, or factors that do not multiply.
        """
        factors: dict[str, Tensors] = {}
        extras: Tensors = {}
        for name, tensor in tensors.items():
            parsed = parse_factor(name)
            if parsed is None:
                extras[name] = tensor
            else:
                factors.setdefault(parsed[0], {})[parsed[1]] = tensor
        layers: dict[str, LoraLayer] = {}
        for name, pair in factors.items():
            if len(pair) != 2:
                missing = "A" if "B" in pair else "B"
                raise UpdateError(f"the adapter has no tensor {factor_name(name, missing)!r}")
            a, b = pair["A"], pair["B"]
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                raise UpdateError(
                    f"the factors of layer {name!r} do not multiply: "
                    f"B has shape {tuple(b.shape)}, A has shape {tuple(a.shape)}"
                )
            own = scaling[name] if isinstance(scaling, Mapping) else scaling
            layers[name] = LoraLayer(a, b, own)
        return cls(layers, extras)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Adapter:
        """Return the adapter with the named tensors replaced; the others stay as they are."""
        made = Adapter.from_tensors(self.tensors() | dict(tensors), self.scalings)
        return replace(made, residual=self.residual)

    def residual_tensors(self) -> Tensors:
        """Return the residual's factors as named tensors, its scaling folded into B."""
        return {
            factor_name(name, factor): tensor
            for name, layer in self.residual.items()
            for factor, tensor in (("A", layer.A), ("B", layer.scaling * layer.B))
        }

    def with_residual(self, tensors: Mapping[str, Tensor]) -> Adapter:
        """Return the adapter with the residual that `residual_tensors` returned.

        Raises:
            UpdateError: a layer has only one of its two factors, or factors that do not multiply.
        """
        return replace(self, residual=Adapter.from_tensors(tensors).layers)

    def digest(self) -> str:
        """Return the hash of names, shapes and float32 values: equal adapters, equal digests."""
        residual = {f"residual.{name}": t for name, t in self.residual_tensors().items()}
        return digest(self.tensors() | residual)


_Value = TypeVar("_Value")


def _ordered(named: Mapping[str, _Value]) -> dict[str, _Value]:
    return {name: named[name] for name in sorted(named, key=natural_order)}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a hexadecimal SHA-256 over names, shapes and float32 values."""
    total = hashlib.sha256()
    for name in sorted(tensors, key=natural_order):
        values = _numpy(tensors[name].float())
        total.update(f"{name}\x1f{values.shape}\x1f".encode())
        total.update(np.ascontiguousarray(values).tobytes())
    return total.hexdigest()


def _numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16; float32 holds every value of it
        tensor = tensor.float()
    return tensor.numpy()


def to_arrays(tensors: Mapping[str, Tensor], *, compact: bool = False) -> ArrayRecord:
    """Encode named tensors as a Flower ArrayRecord that Flower's own strategies can read too.

    Args:
        tensors: by name.
        compact: write float32 tensors so that zeros take a bit (see `fedgraft.sparse`), where that
            is smaller; only `from_arrays` reads those.
    """
    record = ArrayRecord()  # filled here, since its constructor makes every Array anew
    for name, tensor in tensors.items():
        values = _numpy(tensor)
        form, data = _NUMPY, npy.dump(values)
        if compact and values.dtype == np.float32:
            packed = sparse.dump(values)
            if len(packed) < len(data):
                form, data = _SPARSE, packed
        record[name] = Array(values.dtype.name, values.shape, form, data)
    return record


def from_arrays(arrays: ArrayRecord, sparse_entries: Mapping[str, int] | None = None) -> Tensors:
    """Decode an ArrayRecord into named tensors (numpy bytes only: nothing is unpickled).

    Args:
        arrays: by name.
        sparse_entries: how many entries an array may have that is written in bits, by name, since
            32 times its bytes are made of it; none for a name that is not there, any when unset.

    Raises:
        UpdateError: an array that is not numpy's, or whose bytes cannot be read.
    """
    tensors: Tensors = {}
    for name, array in arrays.items():
        try:
            values: np.ndarray
            if array.stype == _SPARSE:
                if sparse_entries is not None:
                    _check_entries(tuple(array.shape), sparse_entries.get(name, 0))
                values = sparse.load(array.data, tuple(array.shape))
            elif array.stype == _NUMPY:
                values = npy.load(array.data)
            else:
                raise TypeError(f"it is serialised as {array.stype!r}, not {_NUMPY!r}")
            native = np.array(values, dtype=values.dtype.newbyteorder("="), order="C")
            # torch's own memory, since products of matrices that lie elsewhere may differ in bits
            tensors[name] = torch.from_numpy(native).clone()
        except Exception as error:  # on hostile bytes numpy and torch raise nearly every kind
            raise UpdateError(f"tensor {name!r} cannot be read: {error}") from error
    return tensors


def _check_entries(shape: tuple[int, ...], most: int) -> None:
    if math.prod(shape) > most:
        raise ValueError(f"it is written in bits, of shape {shape}; at most {most} entries may be")


def payload_bytes(arrays: ArrayRecord) -> int:
    """Return how many bytes the arrays take on the wire."""
    return sum(len(array.data) for array in arrays.values())
