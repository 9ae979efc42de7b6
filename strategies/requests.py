"""What goes down to whom: the adapter in each client's rank, and what the rule sends beside it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from flwr.app import ArrayRecord

from fedgraft.adapter import Tensors, digest, to_arrays
from fedgraft.messages import CONSTANT, RESIDUAL, RULE, TrainRequest
from fedgraft.parcel import pack
from strategies.local import Factors
from strategies.ranks import RankScaling, cut_adapter
from strategies.rounds import StrategyState
from strategies.rule import Rule


@dataclass
class Requests:
    """The requests of one round, each encoded once for all clients that get the same.

    Attributes:
        rule: the run's.
        state: that the round starts from.
        common: what all requests say; its arrays are those of the whole global adapter.
        scaling: gives a smaller rank's scaling.
        send: the factors that go down.
        round: the round that clients start from this; the one after, for an evaluation.
        training: the rule decides what is sent; an evaluation sends the global adapter.
        packed: arrays travel as a parcel, which only FedGraft's own clients read.
    """

    rule: Rule
    state: StrategyState
    common: TrainRequest
    scaling: RankScaling
    send: Factors
    round: int
    training: bool
    packed: bool = False
    _arrays: dict[int | None, ArrayRecord] = field(default_factory=dict)
    _constants: Tensors = field(default_factory=dict)
    _companions: dict[bool, ArrayRecord | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._constants = self.rule.constants(self.state.rule, self.round)
        if not self._residual_grows:
            self._constants |= _prefixed(RESIDUAL, self.state.adapter.residual_tensors())

    def for_client(self, name: str) -> TrainRequest:
        """Return one client's request."""
        constants_hash = self.constants_hash
        known = name in self.state.holders and self.state.constants_hash == constants_hash
        return replace(
            self.common,
            arrays=self._arrays_at(self.state.ranks.get(name)),
            companions=self._beside(with_constants=not known),
            constants_hash=constants_hash,
            counted=self.state.counted.get(name, 0),
        )

    @property
    def _residual_grows(self) -> bool:
        """Whether what stands beside the base changes; else it is sent once."""
        return self.rule.capabilities.base_residual

    @property
    def constants_hash(self) -> str:
        """The digest of what the rule sends only once; "" for none."""
        return digest(self._constants) if self._constants else ""

    def _arrays_at(self, rank: int | None) -> ArrayRecord:
        if rank not in self._arrays:
            self._arrays[rank] = self._wrapped(self._encode(rank))
        return self._arrays[rank]

    def _encode(self, rank: int | None) -> ArrayRecord:
        adapter, compact = self.state.adapter, False
        if self.training:
            adapter = self.rule.outgoing(adapter, self.round)
            compact = self.rule.plan(self.round).sparse
        whole = adapter is self.state.adapter
        if rank is not None:
            adapter = cut_adapter(adapter, rank, self.rule.cut, self.scaling)
        if whole and rank is None and not compact:  # encoded already
            names = adapter.tensors(self.send)
            return ArrayRecord({name: self.common.arrays[name] for name in names})
        return to_arrays(adapter.tensors(self.send), compact=compact)

    def _wrapped(self, arrays: ArrayRecord) -> ArrayRecord:
        return pack(arrays) if self.packed else arrays

    def _beside(self, *, with_constants: bool) -> ArrayRecord | None:
        with_constants = with_constants and bool(self._constants)
        if with_constants not in self._companions:
            residual = self.state.adapter.residual_tensors() if self._residual_grows else {}
            tensors = _prefixed(RESIDUAL, residual)
            sent = self.rule.companions(self.state.rule, self.round)
            tensors |= _prefixed(RULE, sent)
            if with_constants:
                tensors |= _prefixed(CONSTANT, self._constants)
            encoded = self._wrapped(to_arrays(tensors)) if tensors else None
            self._companions[with_constants] = encoded
        return self._companions[with_constants]


def _prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}
