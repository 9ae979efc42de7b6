"""What a request and a reply hold, encoded and decoded in this one place.

The records follow Flower's own convention (arrays under "arrays", settings under "config",
numbers under "metrics", the weight as "num-examples"), so FedGraft's strategy works with anybody's
ClientApp and FedGraft's ClientApp with anybody's strategy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedgraft.adapter import Tensors, from_arrays, payload_bytes
from fedgraft.errors import UpdateError
from fedgraft.parcel import is_packed, unpack
from fedgraft.refusal import CONFIG, REFUSAL, refusal

ARRAYS, COMPANIONS, METRICS = "arrays", "companions", "metrics"
RESIDUAL, RULE, CONSTANT = "residual/", "rule/", "constant/"
"""Prefixes of the companions: what has joined the base, what the rule sends, and sends but once."""
_LARGEST_METRIC = 1e15
"""A metric beyond it is nonsense, and sums of them could overflow."""
_LONGEST_NAME, _LONGEST_DESCRIPTION = 100, 200
WEIGHT = "num-examples"
HELLO = "query.hello"
SPENT = "query.spent"
KEEP = "query.adapter"
"""Message types of our own: who are you, what have your data spent, and keep this adapter."""
_Record = TypeVar("_Record", ArrayRecord, ConfigRecord, MetricRecord)


@dataclass(frozen=True)
class TrainRequest:
    """What the server asks of one client in one round.

    Attributes:
        round: counted from 1.
        arrays: the tensors that go down, encoded.
        train: which factors are trained and come back, "A", "B" or both ("AB").
        lineage: the run's id; a client's personal state is keyed by it.
        a_hash: digest of the A factors that both sides derive from the seed; "" when A travels.
        base_hash: the base that the server holds; "" accepts any.
        durable_round: the oldest round that the server may resume from; older personal state
            may be dropped.
        companions: what goes down beside the adapter (a residual, the rule's own tensors), encoded;
            None for nothing.
        constants_hash: digest of the tensors that the rule sends only once; "" for none.
        split: which of the client's data an evaluation is on, "validation" or "test".
        counted: the last round in which the server used this client's update, 0 for none; what the
            client kept of later ones is void. -1 where the server does not say.
        packed: the arrays came as a parcel (`fedgraft.parcel`), and the answer's may, too.
    """

    round: int
    arrays: ArrayRecord
    train: str = "AB"
    lineage: str = ""
    a_hash: str = ""
    base_hash: str = ""
    durable_round: int = 0
    companions: ArrayRecord | None = None
    constants_hash: str = ""
    split: str = "validation"
    counted: int = -1
    packed: bool = False

    def encode(self, extra: ConfigRecord | None = None) -> RecordDict:
        """Return the records of a Flower message, on top of the caller's own settings."""
        config = ConfigRecord(dict(extra or {}))
        config["server-round"] = self.round
        config["train"] = self.train
        config["lineage"] = self.lineage
        config["a-hash"] = self.a_hash
        config["base-hash"] = self.base_hash
        config["durable-round"] = self.durable_round
        config["constants-hash"] = self.constants_hash
        config["split"] = self.split
        config["counted"] = self.counted
        content = RecordDict({ARRAYS: self.arrays, CONFIG: config})
        if self.companions is not None:
            content[COMPANIONS] = self.companions
        return content

    @classmethod
    def decode(cls, content: RecordDict) -> TrainRequest:
        """Read a request; what another strategy does not send has its default.

        Raises:
            UpdateError: the message has no arrays, or they cannot be read.
        """
        config = _config(content)
        arrays = _arrays(content)
        return cls(
            round=int(_number(config, "server-round", 1)),
            arrays=unpack(arrays),
            train=str(config.get("train", "AB")),
            lineage=str(config.get("lineage", "")),
            a_hash=str(config.get("a-hash", "")),
            base_hash=str(config.get("base-hash", "")),
            durable_round=int(_number(config, "durable-round", 0)),
            companions=_companions(content),
            constants_hash=str(config.get("constants-hash", "")),
            split=str(config.get("split", "validation")),
            counted=int(_number(config, "counted", -1)),
            packed=is_packed(arrays),
        )

    def tensors(self) -> Tensors:
        """Return the arrays decoded."""
        return from_arrays(self.arrays)


@dataclass(frozen=True)
class Reply:
    """What a client answers: tensors (after training), its weight and its agreed metrics.

    Attributes:
        arrays: the trained tensors, encoded; empty after an evaluation.
        weight: how many examples the client trained or evaluated on.
        metrics: numbers by name (`loss`, `steps`, `seconds`, the task's metric).
        refusal: why the client would not do it; "" when it did.
        companions: what the rule sends beside the tensors, encoded; None for nothing.
    """

    arrays: ArrayRecord | None = None
    weight: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    refusal: str = ""
    companions: ArrayRecord | None = None

    def encode(self) -> RecordDict:
        """Return the records of a Flower message."""
        if self.refusal:
            return refusal(self.refusal)
        metrics = MetricRecord({WEIGHT: self.weight, **self.metrics})
        records = RecordDict({METRICS: metrics})
        if self.arrays is not None:
            records[ARRAYS] = self.arrays
        if self.companions is not None:
            records[COMPANIONS] = self.companions
        return records

    @classmethod
    def decode(cls, content: RecordDict) -> Reply:
        """Read a reply. Its numbers are untrusted: absurd metrics, NaN and Inf are left out.

        Raises:
            UpdateError: the reply has no metrics, its weight is missing or not a number, or its
                arrays cannot be read.
        """
        if reason := str(_config(content).get(REFUSAL, "")):
            return cls(refusal=reason)
        records = _records(content, MetricRecord)
        if METRICS not in records and len(records) != 1:
            raise UpdateError("the reply has no metrics record")
        metrics = records[METRICS] if METRICS in records else next(iter(records.values()))
        weight = metrics.get(WEIGHT)
        if not isinstance(weight, int | float):
            raise UpdateError(f"the weight {WEIGHT!r} is {weight!r}, not a number")
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if name != WEIGHT
            and isinstance(value, int | float)
            and abs(value) <= _LARGEST_METRIC  # which NaN is not
        }
        arrays = unpack(_arrays(content)) if _records(content, ArrayRecord) else None
        companions = _companions(content)
        return cls(arrays=arrays, weight=float(weight), metrics=numbers, companions=companions)


@dataclass(frozen=True)
class Hello:
    """A client's answer to the question who it is.

    Attributes:
        name: the client's name, unique in the federation.
        description: what its data is, in a few words, where it may say so.
        memory: bytes that its machine has for the work; 0 where it does not say.
    """

    name: str
    description: str = ""
    memory: int = 0

    def encode(self) -> RecordDict:
        """Return the records of a Flower message."""
        config = ConfigRecord({"name": self.name, "description": self.description})
        config["memory"] = self.memory
        return RecordDict({CONFIG: config})

    @classmethod
    def decode(cls, content: RecordDict) -> Hello:
        """Read an answer. A description is untrusted text: it is cut, and made printable.

        Raises:
            UpdateError: it has no name, or one that no screen could show.
        """
        config = _config(content)
        name = str(config.get("name", ""))
        if not name:
            raise UpdateError("the node answered without a client name")
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise UpdateError(f"the node calls itself {name[:_LONGEST_NAME]!r}")
        memory = _number(config, "memory", 0)
        memory = int(memory) if 0 < memory < _LARGEST_METRIC else 0
        words = str(config.get("description", ""))[:_LONGEST_DESCRIPTION]
        shown = "".join(c if c.isprintable() else " " for c in words)
        return cls(name, shown, memory)


@dataclass(frozen=True)
class FinalAdapter:
    """What every client is given at the end of a run: the chosen adapter, as a PEFT folder.

    Attributes:
        arrays: the tensors of the weights file, encoded.
        settings: adapter_config.json.
        card: README.md.
        lineage: the run's id.
    """

    arrays: ArrayRecord
    settings: str
    card: str
    lineage: str

    def encode(self) -> RecordDict:
        """Return the records of a Flower message."""
        texts = {"settings": self.settings, "card": self.card, "lineage": self.lineage}
        return RecordDict({ARRAYS: self.arrays, CONFIG: ConfigRecord({**texts})})

    @classmethod
    def decode(cls, content: RecordDict) -> FinalAdapter:
        """Read what was sent.

        Raises:
            UpdateError: the message has no arrays, or they cannot be read.
        """
        config = _config(content)
        texts = (str(config.get(name, "")) for name in ("settings", "card", "lineage"))
        return cls(unpack(_arrays(content)), *texts)


def array_bytes(content: RecordDict) -> int:
    """Return how many bytes all arrays of a message take on the wire."""
    return sum(payload_bytes(arrays) for arrays in _records(content, ArrayRecord).values())


def _records(content: RecordDict, kind: type[_Record]) -> dict[str, _Record]:
    """Return the records of one kind.

    Flower's own views of them refer to themselves: with one of those, arrays that are done with
    would stay in memory until the garbage collector comes by.
    """
    return {name: record for name, record in content.items() if isinstance(record, kind)}


def _config(content: RecordDict) -> ConfigRecord:
    records = _records(content, ConfigRecord)
    return records[CONFIG] if CONFIG in records else ConfigRecord()


def _arrays(content: RecordDict) -> ArrayRecord:
    records = _records(content, ArrayRecord)
    if ARRAYS in records:
        return records[ARRAYS]
    if len(records) == 1:
        return next(iter(records.values()))
    raise UpdateError(f"the message holds {len(records)} array records, not one named {ARRAYS!r}")


def _companions(content: RecordDict) -> ArrayRecord | None:
    found = _records(content, ArrayRecord).get(COMPANIONS)
    return None if found is None else unpack(found)


def _number(config: ConfigRecord, key: str, default: int) -> float:
    value = config.get(key, default)
    return value if isinstance(value, int | float) else default
