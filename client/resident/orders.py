"""An order from outside made into what the protocol allows, or refused.

Whoever reaches the socket counts as the server: nothing is unpickled, no record or message type is
taken that FedGraft does not send, and of the run's config only the config counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from client.resident.protocol import KINDS
from client.resident.trainer_pb2 import Order
from fedgraft.config import RUN_CONFIG_KEY, Config
from fedgraft.errors import UpdateError
from fedgraft.messages import ARRAYS, COMPANIONS
from fedgraft.refusal import CONFIG

_RECORDS: Mapping[str, type[ArrayRecord] | type[ConfigRecord]] = {
    ARRAYS: ArrayRecord,
    COMPANIONS: ArrayRecord,
    CONFIG: ConfigRecord,
}
_OWN_KEYS = RUN_CONFIG_KEY.split(".")[0] + "."


@dataclass(frozen=True)
class Asked:
    """One of Flower's messages.

    Attributes:
        run: Flower's id of the run.
        kind: one of `KINDS`.
        config: the run's, as the server sent it.
        content: its records.
    """

    run: int
    kind: str
    config: Config
    content: RecordDict


def decode(order: Order) -> Asked:
    """Read an order.

    Raises:
        UpdateError: it holds anything that the protocol does not allow.
        ConfigError: the run's config is not valid.
    """
    if order.kind not in KINDS:
        raise UpdateError(f"this client answers no message of type {order.kind[:40]!r}")
    return Asked(order.run, order.kind, _config(order.run_config), _content(order.content))


def encode(content: RecordDict) -> bytes:
    """Return records as they travel."""
    return bytes(recorddict_to_proto(content).SerializeToString())


def _config(text: str) -> Config:
    try:
        found: Any = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UpdateError("the run's config is no JSON object")
    # Where results, personal state and ledgers lie is nothing that a server tells a client.
    kept = {k: v for k, v in found.items() if k == RUN_CONFIG_KEY or not k.startswith(_OWN_KEYS)}
    try:
        return Config.from_run_config(kept)
    except (ValueError, TypeError, RecursionError) as error:
        raise UpdateError(f"the run's config cannot be read: {type(error).__name__}") from error


def _content(data: bytes) -> RecordDict:
    try:
        content = recorddict_from_proto(ProtoRecordDict.FromString(data))
    except Exception as error:  # on hostile bytes protobuf and Flower raise several kinds
        raise UpdateError(f"the message cannot be read: {type(error).__name__}") from error
    for name, record in content.items():
        kind = _RECORDS.get(name)
        if kind is None or not isinstance(record, kind):
            raise UpdateError(f"the message holds a {type(record).__name__} named {name[:40]!r}")
    return content
