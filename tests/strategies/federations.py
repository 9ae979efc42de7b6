"""Small random federations for the property tests, and the host run on them."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dense import Client
from hypothesis import strategies as st

from fedgraft.adapter import Adapter, LoraLayer, Tensors
from strategies.aggregation import Aggregated, aggregate
from strategies.ranks import by_rank, padded
from strategies.registry import build_rule
from strategies.rule import Rule
from strategies.spool import UpdateSpool

LAYER = "model.layers.0.q_proj"


@functools.cache
def cached_rule(name: str, **options: Any) -> Rule:
    """Build a rule once: looking through the installed entry points takes longer than a test."""
    return build_rule(name, options)


@dataclass(frozen=True)
class Federation:
    """A global adapter and one round's updates on it: client name -> (weight, tensors).

    Of a client in `ranks` factors are those of this smaller rank, padded as they arrive.
    """

    current: Adapter
    updates: dict[str, tuple[float, Tensors]]
    ranks: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def spooled(self) -> Iterator[UpdateSpool]:
        """Spool the updates in the order of the dict, which is the order of arrival."""
        with tempfile.TemporaryDirectory() as folder:
            spool = UpdateSpool(Path(folder))
            for client, (weight, tensors) in self.updates.items():
                spool.add(client, weight, tensors, rank=self.ranks.get(client))
            yield spool

    def aggregate(self, rule: Rule | str, **options: Any) -> Aggregated:
        """Run the host on one round. Options are written with an underscore for `lambda_`."""
        if isinstance(rule, str):
            rule = cached_rule(rule, **{key.rstrip("_"): value for key, value in options.items()})
        with self.spooled() as spool:
            return aggregate(rule, spool, self.current, {}, 1)

    def clients(self, layer: str = LAYER, factors: str = "AB") -> list[Client]:
        """One layer of all clients for the oracles; factors that do not count are the server's."""
        total = sum(weight for weight, _ in self.updates.values())
        current = self.current.layers[layer]
        found = []
        for weight, tensors in self.updates.values():
            A = tensors[f"{layer}.lora_A.weight"] if "A" in factors else current.A
            B = tensors[f"{layer}.lora_B.weight"] if "B" in factors else current.B
            found.append(Client(A.double().numpy(), B.double().numpy(), weight / total))
        return found

    def with_scaling(self, scaling: float) -> Federation:
        layers = {
            name: replace(layer, scaling=scaling) for name, layer in self.current.layers.items()
        }
        return replace(self, current=Adapter(layers, self.current.extras))

    def without_extras(self) -> Federation:
        """The federation without the classifier."""
        updates = {
            client: (weight, {name: t for name, t in tensors.items() if ".lora_" in name})
            for client, (weight, tensors) in self.updates.items()
        }
        return Federation(Adapter(self.current.layers), updates)


def numpy_of(layer: LoraLayer) -> tuple[np.ndarray, np.ndarray]:
    return layer.A.double().numpy(), layer.B.double().numpy()


def federation(
    rng: np.random.Generator,
    *,
    d_out: int,
    d_in: int,
    r: int,
    weights: list[float],
    drift: float = 0.5,
    dtype: torch.dtype = torch.float32,
    layers: int = 1,
) -> Federation:
    """A federation around one global adapter, each client off by `drift` standard deviations."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).float()

    names = [LAYER.replace("0", str(index)) for index in range(layers)]
    current = Adapter(
        {name: LoraLayer(normal(r, d_in), normal(d_out, r), 2.0) for name in names},
        {"classifier.weight": normal(3, d_in)},
    )
    updates = {
        f"client-{k}": (
            weight,
            {
                name: (tensor + drift * normal(*tensor.shape)).to(dtype)
                for name, tensor in current.tensors().items()
            },
        )
        for k, weight in enumerate(weights)
    }
    return Federation(current, updates)


SIZES = st.integers(1, 9)
WEIGHTS = st.lists(st.integers(1, 5000).map(float), min_size=1, max_size=7)


@st.composite
def federations(
    draw: st.DrawFn, dtypes: Any = (torch.float32, torch.float16), *, odd: bool = False
) -> Federation:
    """Shapes (d = r as often as not), ranks, weights, client counts, drift and dtype drawn.

    With `odd`, one client of some federations has an update of zeros, or factors whose ranks are
    all the same.
    """
    r = draw(st.integers(1, 5))
    fed = federation(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        d_out=draw(SIZES | st.just(r)),
        d_in=draw(SIZES | st.just(r)),
        r=r,
        weights=draw(WEIGHTS),
        drift=draw(st.sampled_from([1.0, 0.3, 0.03])),
        dtype=draw(st.sampled_from(list(dtypes))),
    )
    kind = draw(st.sampled_from(["", "", "zeros", "one direction"])) if odd else ""
    if not kind:
        return fed
    client, (weight, tensors) = next(iter(fed.updates.items()))
    made = {
        name: _one_direction(name, tensor) if kind == "one direction" else torch.zeros_like(tensor)
        for name, tensor in tensors.items()
    }
    return replace(fed, updates=fed.updates | {client: (weight, made)})


def _one_direction(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if "lora_A" in name:
        return tensor[:1].expand_as(tensor).clone()
    return tensor[:, :1].expand_as(tensor).clone() if "lora_B" in name else tensor


def of_ranks(fed: Federation, ranks: list[int]) -> tuple[Federation, list[Client]]:
    """The federation with a rank for each client, and what each trained, alpha / r_k in its B.

    alpha is the current layer's scaling times its rank, and a client's factors are the first rows
    and columns of those that it had.
    """
    layer = fed.current.layers[LAYER]
    A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
    total = sum(weight for weight, _ in fed.updates.values())
    updates, trained = {}, []
    for (client, (weight, tensors)), rank in zip(fed.updates.items(), ranks, strict=True):
        own = tensors | {A: tensors[A][:rank], B: tensors[B][:, :rank]}
        updates[client] = (weight, padded(own, fed.current, by_rank))
        own_scaling = layer.scaling * layer.rank / rank
        pair = own[A].double().numpy(), own_scaling * own[B].double().numpy()
        trained.append(Client(*pair, weight / total))
    return Federation(fed.current, updates, dict(zip(updates, ranks, strict=True))), trained


def hostile(fed: Federation, client: str, factor_A: float, factor_B: float) -> Federation:
    """The federation with one client's factors multiplied (by -1, by 1000, ...)."""
    weight, tensors = fed.updates[client]
    scale = {"A": factor_A, "B": factor_B}
    bad = {
        name: tensor * scale["A" if "lora_A" in name else "B"] if "lora_" in name else tensor
        for name, tensor in tensors.items()
    }
    return replace(fed, updates=fed.updates | {client: (weight, bad)})


def two_clients() -> Federation:
    """d = 2, r = 1, shares 1/4 and 3/4: A = (1, 0), B = (2, 0)^T and A = (0, 1), B = (0, 4)^T."""

    def tensors(A: list[float], B: list[float]) -> Tensors:
        return {
            f"{LAYER}.lora_A.weight": torch.tensor([A]),
            f"{LAYER}.lora_B.weight": torch.tensor(B)[:, None],
        }

    current = Adapter({LAYER: LoraLayer(torch.tensor([[8.0, 16.0]]), torch.zeros(2, 1), 2.0)})
    first, second = tensors([1.0, 0.0], [2.0, 0.0]), tensors([0.0, 1.0], [0.0, 4.0])
    return Federation(current, {"a": (10.0, first), "b": (30.0, second)})
