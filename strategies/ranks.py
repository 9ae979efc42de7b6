"""Clients of different ranks: what each one's share of the global adapter is, and back.

The server keeps its own rank r. A client of rank r_k < r is sent the rule's best cut of each layer
(`Rule.cut`), scaled by its own alpha_k / r_k; what comes back is padded with zeros to rank r and
its scaling folded into B, so that every product is right and sums hold alpha_k / r_k inside. A rule
then never needs to know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from fedgraft.adapter import Adapter, LoraLayer, Tensors, pad_rank, parse_factor
from fedgraft.errors import ConfigError

_SAME = 0.1
"""Machines of the same size report a few per cent more or less memory than one another."""
RankScaling = Callable[[int, float, int], float]
"""From the server's rank, its scaling and a client's rank to the client's scaling."""


def by_rank(rank: int, scaling: float, own: int) -> float:
    """alpha / r with the same alpha on all sides."""
    return scaling * rank / own


def by_root(rank: int, scaling: float, own: int) -> float:
    """alpha / sqrt(r) with the same alpha on all sides (rsLoRA)."""
    return float(scaling * (rank / own) ** 0.5)


def cut_adapter(
    adapter: Adapter,
    rank: int,
    cut: Callable[[LoraLayer, int], LoraLayer],
    scaling: RankScaling,
) -> Adapter:
    """Return a client's cut of the global adapter: rank `rank`, the client's own scaling."""
    layers: dict[str, LoraLayer] = {}
    for name, layer in adapter.layers.items():
        if rank >= layer.rank:
            layers[name] = layer
            continue
        part = cut(layer, rank)
        own = scaling(layer.rank, layer.scaling, rank)
        layers[name] = LoraLayer(part.A, part.B * (part.scaling / own), own)
    return Adapter(layers, adapter.extras, adapter.residual)


def padded(tensors: Mapping[str, Tensor], adapter: Adapter, scaling: RankScaling) -> Tensors:
    """Return a client's factors in the server's rank and scaling; other tensors as they are.

    Args:
        tensors: by adapter names; factors of any rank up to the server's.
        adapter: the global one.
        scaling: gives the client's scaling.
    """
    made: Tensors = {}
    for name, tensor in tensors.items():
        parsed = parse_factor(name)
        layer = adapter.layers.get(parsed[0]) if parsed else None
        if parsed is None or layer is None:
            made[name] = tensor
            continue
        axis = 0 if parsed[1] == "A" else 1
        own = tensor.shape[axis]
        if own >= layer.rank:
            made[name] = tensor
            continue
        if parsed[1] == "B":
            ratio = scaling(layer.rank, layer.scaling, own) / layer.scaling
            tensor = tensor.float() * ratio
        made[name] = pad_rank(tensor, layer.rank, axis)
    return made


def cut_factor(name: str, tensor: Tensor, rank: int | None) -> Tensor:
    """Return the first `rank` rows of an A, or columns of a B; any other tensor as it is."""
    parsed = parse_factor(name)
    if parsed is None or rank is None:
        return tensor
    return tensor[:rank] if parsed[1] == "A" else tensor[:, :rank]


def ranks_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the rank of every factor, by tensor name."""
    found = {}
    for name, tensor in tensors.items():
        parsed = parse_factor(name)
        if parsed is not None:
            found[name] = int(tensor.shape[0 if parsed[1] == "A" else 1])
    return found


def assigned(
    ranks: Sequence[int] | str | None, rank: int, memory: Mapping[str, int]
) -> dict[str, int]:
    """Return every client's rank where `federation.ranks` gives them others than the adapter's.

    Args:
        ranks: one for each client in the natural order of names; "by-memory", which halves the
            rank as often as the client's memory must be doubled to be at least the largest one's
            (a client that does not say counts as the smallest of those that do); or None.
        rank: the adapter's, the largest that a client may have.
        memory: by client in natural order, the bytes that it says it has.

    Raises:
        ConfigError: more clients than ranks, or a rank above the adapter's.
    """
    if ranks is None:
        return {}
    if isinstance(ranks, str):
        largest = max(memory.values(), default=0)
        told = {
            name: max(1, rank >> _halvings(largest, own)) for name, own in memory.items() if own
        }
        return dict.fromkeys(memory, min(told.values(), default=rank)) | told
    check_ranks(ranks, len(memory), rank)
    return dict(zip(memory, ranks, strict=True))


def check_ranks(ranks: Sequence[int], clients: int, rank: int) -> None:
    """Check a list of `federation.ranks`.

    Raises:
        ConfigError: it is not one rank for each client, or holds one above the adapter's.
    """
    if len(ranks) != clients:
        raise ConfigError(
            f"federation.ranks names {len(ranks)} ranks for {clients} clients",
            "Give one rank for each client.",
        )
    if max(ranks) > rank:
        raise ConfigError(
            f"federation.ranks holds {max(ranks)}, and adapter.rank is {rank}",
            "Set adapter.rank to the largest client's rank: it is the global adapter's.",
        )


def _halvings(largest: int, own: int) -> int:
    return max(0, math.ceil(math.log2(largest / own) - _SAME))
