"""A resident trainer in this process, and what one asks of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from flwr.app import RecordDict

from client.resident import service
from client.resident.desk import Desk
from client.resident.orders import encode
from client.resident.own import Own
from client.resident.protocol import PROTOCOL
from client.resident.trainer_pb2 import Order
from client.resident.worker import Worker
from fedgraft import __version__
from fedgraft.adapter import Tensors, to_arrays
from fedgraft.config import RUN_CONFIG_KEY, Config
from fedgraft.messages import TrainRequest


def own(folder: Path, policy: str = "", **changes: Any) -> Own:
    """Return partition 1 of 2 of the digits, as client "north", with a policy."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "policy.toml").write_text(policy)
    mine = {"partition": 1, "partitions": 2, "device": "cpu"}
    return Own("north", folder / "policy.toml", folder / "kept", **(mine | changes))


def order(kind: str, config: Config, records: RecordDict, **changes: Any) -> Order:
    """Return an order as the relay makes it."""
    fields: dict[str, Any] = {
        "protocol": PROTOCOL,
        "fedgraft": __version__,
        "run": 7,
        "kind": kind,
        "run_config": json.dumps({RUN_CONFIG_KEY: config.to_json()}),
        "content": encode(records),
    }
    return Order(**(fields | changes))


def request(tensors: Tensors, **fields: Any) -> RecordDict:
    return TrainRequest(**({"round": 1, "arrays": to_arrays(tensors)} | fields)).encode()


@contextmanager
def listening(desk: Desk, socket: Path, idle_seconds: float = 60.0) -> Iterator[Worker]:
    """Run a trainer behind a socket, its worker on a thread of its own."""
    worker = Worker(desk, idle_seconds)
    thread = threading.Thread(target=worker.work, daemon=True)
    thread.start()
    server: grpc.Server = service.start(worker, socket)
    try:
        yield worker
    finally:
        worker.stop()
        thread.join(30)
        service.stop(server)
        assert not thread.is_alive()
