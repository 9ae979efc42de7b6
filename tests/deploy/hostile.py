"""What a hostile server's bundle would try in the SuperNode's process; run as its user.

Arguments: the socket, then paths to read. It prints a JSON object of what came of it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from flwr.app import ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from client.resident.protocol import PROTOCOL, channel
from client.resident.trainer_pb2 import Order
from client.resident.trainer_pb2_grpc import ResidentTrainerStub
from fedgraft import __version__


def read(path: Path) -> str:
    """Try to read a file, or to list a folder."""
    try:
        if path.is_dir():
            list(path.iterdir())
        else:
            path.read_bytes()
    except OSError as error:
        return type(error).__name__
    return "read"


def ask(socket: Path, kind: str, run_config: str) -> dict[str, object]:
    """Send an order; return the config record of the answer."""
    content = recorddict_to_proto(RecordDict({"config": ConfigRecord({})})).SerializeToString()
    fields = {"protocol": PROTOCOL, "fedgraft": __version__, "run": 1}
    order = Order(**fields, kind=kind, run_config=run_config, content=content)
    with channel(socket) as connection:
        result = ResidentTrainerStub(connection).Work(order, wait_for_ready=True, timeout=60)
    found = recorddict_from_proto(ProtoRecordDict.FromString(result.content))
    return dict(found.config_records["config"])


def kill(pid: int) -> str:
    """Try to send a signal to the trainer."""
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError as error:
        return type(error).__name__
    return "killed"


def main() -> None:
    """Try everything."""
    socket, trainer, *paths = sys.argv[1:]
    print(
        json.dumps(
            {
                "uid": os.getuid(),
                "reads": {path: read(Path(path)) for path in paths},
                "memory": read(Path(f"/proc/{trainer}/mem")),
                "environment": read(Path(f"/proc/{trainer}/environ")),
                "kill": kill(int(trainer)),
                "hello": ask(Path(socket), "query.hello", "{}"),
                "train": ask(Path(socket), "train", "{}"),
                "code": ask(Path(socket), "query.run-this", "{}"),
            }
        )
    )


if __name__ == "__main__":
    main()
