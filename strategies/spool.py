"""The updates of one round, on disk: one safetensors file a client, read layer by layer.

The server's memory then depends on the size of a layer and not on the number of clients, and every
sum can be folded in the order of client names whatever order the updates arrived in. The first few
megabytes may stay in memory, so that a small federation writes no files.

Files are in the safetensors format (https://huggingface.co/docs/safetensors), so that any tool
opens them. They are written and read here directly: the spool wrote them, so it knows where each
tensor lies, and reads a layer with two seeks where a reader would parse the whole header and map
the whole file, for every client and layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedgraft.adapter import LoraLayer, Tensors, factor_name, natural_order
from fedgraft.errors import RunError, UpdateError
from strategies.local import A_AND_B, Factors, of_layer, owner_of
from strategies.rule import LayerUpdate, WeightedExtra, WeightedLayer

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}

_BUFFER = 1 << 18
"""Bytes gathered before they are written: a small adapter goes out at once."""


@dataclass(frozen=True)
class _Stored:
    """Where one tensor lies in its file."""

    dtype: torch.dtype
    shape: torch.Size
    offset: int  # bytes from the start of the file


@dataclass(frozen=True)
class _Update:
    """One client's update: tensors in memory, or where they lie in a file."""

    weight: float
    rank: int | None
    held: Tensors
    path: Path
    stored: dict[str, _Stored]
    companions: dict[str, list[str]]  # by the layer or extra that they stand beside

    def has(self, name: str) -> bool:
        return name in self.held or name in self.stored


class UpdateSpool:
    """The validated updates of one round.

    Args:
        folder: a scratch folder of the spool's own; spooled updates found in it are removed.
        memory: bytes of updates that stay in memory, so that small ones need no files.

    Raises:
        RunError: the folder cannot be made.
    """

    def __init__(self, folder: Path, memory: int = 0) -> None:
        self._folder = folder
        self._memory = memory
        self._held = 0  # bytes in memory
        self._added = 0  # updates of this round so far, removed ones too
        self._updates: dict[str, _Update] = {}
        self._shares: dict[str, float] | None = None  # sorted once a round, not once a layer
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        self.clear()

    def largest_rank(self, whole: int) -> int:
        """Return the largest rank that any client has, or, without clients, the server's.

        Args:
            whole: the server's rank, which clients have that named no other.
        """
        ranks = (whole if u.rank is None else u.rank for u in self._updates.values())
        return max(ranks, default=whole)

    def add(self, client: str, weight: float, tensors: Tensors, *, rank: int | None = None) -> None:
        """Keep one client's update; its tensors must not change afterwards.

        Args:
            client: the client's name, which never becomes part of a path.
            weight: w_k, finite and above 0.
            tensors: factors and extras under the adapter's own names, and companions under those
                of `beside`; factors of a smaller rank padded to the server's.
            rank: the client's own rank, where it is not the server's.

        Raises:
            UpdateError: the client has an update in this round already, or a tensor's dtype cannot
                be written.
            RunError: the folder cannot be written, the disk is full.
        """
        if client in self._updates:
            raise UpdateError(f"client {client!r} sent a second update in one round")
        for name, tensor in tensors.items():
            if tensor.dtype not in _DTYPES:
                raise UpdateError(f"tensor {name!r} of client {client!r} has dtype {tensor.dtype}")
        path = self._folder / f"update-{self._added:06d}.safetensors"
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._held + size <= self._memory:
            self._held += size
            held, stored = dict(tensors), {}
        else:
            held, stored = {}, self._write(path, tensors)
        self._added += 1
        companions = _companions(tensors)
        self._updates[client] = _Update(float(weight), rank, held, path, stored, companions)
        self._shares = None

    @property
    def clients(self) -> list[str]:
        """The clients with an update, in the order of their names."""
        return list(self.shares)

    @property
    def shares(self) -> dict[str, float]:
        """Each client's share of the round, p_k = w_k / sum w, in the order of client names."""
        if self._shares is None:
            order = sorted(self._updates, key=natural_order)
            total = math.fsum(update.weight for update in self._updates.values())
            self._shares = {client: self._updates[client].weight / total for client in order}
        return self._shares

    def layer(
        self, client: str, name: str, current: LoraLayer, factors: Factors = A_AND_B
    ) -> LoraLayer:
        """Read one layer of one client's update, and nothing else of it.

        Args:
            client: whose update.
            name: the layer's name.
            current: the layer that the round started from; its factors stand in for those that did
                not travel, and its scaling is the layer's.
            factors: which factors may come from the update.

        Raises:
            RunError: the file was changed or removed under the run.
        """
        update = self._updates[client]
        names = {factor: factor_name(name, factor) for factor in factors}
        wanted = {factor: key for factor, key in names.items() if update.has(key)}
        read = self._read(update, list(wanted.values()))
        return current.with_factors({factor: read[key] for factor, key in wanted.items()})

    def companions(self, client: str, name: str) -> Tensors:
        """Read what one client's rule sent beside a layer or an extra, by short name, as float32.

        Raises:
            RunError: the file was changed or removed under the run.
        """
        update = self._updates[client]
        read = self._read(update, update.companions.get(name, []))
        return {key: tensor.float() for key, tensor in of_layer(name, read).items()}

    def updates(
        self, name: str, current: LoraLayer, factors: Factors = A_AND_B
    ) -> Iterator[WeightedLayer]:
        """Read one layer of every update, client by client in the order of names, as float32."""
        for client, share in self.shares.items():
            layer = self.layer(client, name, current, factors)
            rank = self._updates[client].rank
            update = LayerUpdate(
                layer.A.float(),
                layer.B.float(),
                layer.scaling,
                layer.rank if rank is None else rank,
                self.companions(client, name),
            )
            yield WeightedLayer(update, share)

    def extras(self, name: str) -> Iterator[WeightedExtra]:
        """Read one extra of every update, client by client in the order of names, as float32."""
        for client, share in self.shares.items():
            value = self.extra(client, name).float()
            yield WeightedExtra(value, share, self.companions(client, name))

    def extra(self, client: str, name: str) -> Tensor:
        """Read one extra of one client's update.

        Raises:
            UpdateError: the update has no such tensor.
            RunError: the file was changed or removed under the run.
        """
        update = self._updates[client]
        if not update.has(name):
            raise UpdateError(f"the update of client {client!r} has no tensor {name!r}")
        return self._read(update, [name])[name]

    def remove(self, client: str) -> None:
        """Forget one client's update."""
        update = self._updates.pop(client)
        self._held -= sum(tensor.nbytes for tensor in update.held.values())
        self._shares = None
        update.path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all updates, for the next round."""
        self._updates = {}
        self._held = self._added = 0
        self._shares = None
        for path in self._folder.glob("update-*.safetensors"):
            path.unlink(missing_ok=True)

    def _write(self, path: Path, tensors: Tensors) -> dict[str, _Stored]:
        header, stored = _layout(tensors)
        try:
            with path.open("wb", buffering=_BUFFER) as file:
                file.write(header)
                for tensor in tensors.values():
                    file.write(_bytes_of(tensor))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise self._unwritable(error) from error
        return stored

    def _read(self, update: _Update, names: list[str]) -> Tensors:
        if not names or not update.stored:
            return {name: update.held[name] for name in names}
        try:
            with update.path.open("rb", buffering=0) as file:
                return {name: _read_tensor(file, update.stored[name]) for name in names}
        except OSError as error:
            raise RunError(
                f"the spooled update {update.path} cannot be read: {error.strerror or error}",
                "Leave the run's files alone while it runs, and resume it.",
            ) from error

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(
            f"updates cannot be spooled in {self._folder}: {error.strerror or error}",
            "Free space there, or choose another run directory.",
        )


def _companions(tensors: Tensors) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in tensors:
        if owner := owner_of(name):
            found.setdefault(owner, []).append(name)
    return found


def _layout(tensors: Tensors) -> tuple[bytes, dict[str, _Stored]]:
    """Return the safetensors header for these tensors, and where each of them will lie."""
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    stored = {
        name: _Stored(tensor.dtype, tensor.shape, len(header) + entries[name]["data_offsets"][0])
        for name, tensor in tensors.items()
    }
    return header, stored


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's memory, to be written as it stands (numpy has no bfloat16, so as bytes)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _read_tensor(file: FileIO, stored: _Stored) -> Tensor:
    if stored.shape.numel() == 0:
        return torch.empty(stored.shape, dtype=stored.dtype)
    # torch's own memory is aligned, and where a matrix lies may decide the last bit of its products
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    rest = _bytes_of(tensor)
    file.seek(stored.offset)
    while rest:
        count = file.readinto(rest)
        if not count:
            raise OSError("a file ends before its last tensor")
        rest = rest[count:]
    return tensor
