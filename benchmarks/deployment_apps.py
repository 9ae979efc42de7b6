"""The apps that benchmarks/deployment.py hands to Flower.

- `idle_server` and `idle_client`: Flower's FedAvg, and a client that sends back what it was sent,
  with other values, since Flower does not send an object again that the other side has.
- `reloading_client`: FedGraft's own ClientApp without the resident trainer, so that every message
  loads libraries, base and data anew.

Flower imports this file by name in a new process for every message, so it imports little itself.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

PAYLOAD, STARTS = "payload.safetensors", "starts.json"
"""Files of the benchmark's folder: what travels, and when each round began."""
FOLDER, ROUNDS, CLIENTS = "benchmark.folder", "benchmark.rounds", "benchmark.clients"
"""Keys of the run config."""

idle_server = ServerApp()
idle_client = ClientApp()
reloading_client = ClientApp()


@idle_server.main()
def serve(grid: Grid, context: Context) -> None:
    from flwr.serverapp.strategy import FedAvg
    from safetensors.numpy import load_file

    starts: list[float] = []

    class Timed(FedAvg):
        """Flower's FedAvg, which notes when a round begins."""

        def configure_train(
            self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
        ) -> Iterable[Message]:
            messages = super().configure_train(server_round, arrays, config, grid)
            starts.append(time.time())
            return messages

    folder = Path(str(context.run_config[FOLDER]))
    rounds, clients = (int(str(context.run_config[key])) for key in (ROUNDS, CLIENTS))
    payload = {name: Array(value) for name, value in load_file(folder / PAYLOAD).items()}
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    strategy.start(grid, ArrayRecord(payload), num_rounds=rounds)
    (folder / f"{STARTS}.part").write_text(json.dumps(starts))
    (folder / f"{STARTS}.part").rename(folder / STARTS)


@idle_client.train()
def idle(message: Message, context: Context) -> Message:
    own = 1e-3 * (int(context.node_id) % 97 + 1)
    arrays = message.content.array_records["arrays"]
    sent = {name: Array(array.numpy() + type(own)(own)) for name, array in arrays.items()}
    for name, array in arrays.items():
        assert len(sent[name].data) == len(array.data), "the payload kept its size"
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": ArrayRecord(sent), "metrics": metrics}), reply_to=message)


def _anew(message: Message, context: Context) -> Message:
    from client.app import app
    from client.resident.protocol import CLIENT
    from fedgraft.config import Config

    config = Config.from_run_config(context.run_config)
    own: dict[str, Any] = {
        "partition-id": int(os.environ[CLIENT]),
        "num-partitions": config.federation.clients,
    }
    context.node_config.update(own)
    answer: Message = app(message, context)
    return answer


reloading_client.query("hello")(_anew)
reloading_client.query("adapter")(_anew)
reloading_client.train()(_anew)
reloading_client.evaluate()(_anew)
