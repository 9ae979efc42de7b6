"""The runs of a deployed SuperLink, over Flower's Control API: started, watched, stopped.

It is what the `flwr` command speaks. That command takes a second to start, and a run is asked for
several times a second, so Flower's own client is used in this process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest, StopRunRequest
from flwr.proto.run_pb2 import Run
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

from fedgraft.errors import RunError


class AwayError(RunError):
    """The SuperLink does not answer."""


@dataclass(frozen=True)
class FlowerRun:
    """A run as its SuperLink knows it.

    Attributes:
        run_id: Flower's id.
        status: "pending", "starting", "running" or "finished".
        outcome: of a finished one, "completed", "failed" or "stopped"; else "".
        details: why it failed, as far as Flower says.
        bytes_down, bytes_up: what all nodes have pulled and pushed for it, of all messages.
    """

    run_id: int
    status: str
    outcome: str
    details: str
    bytes_down: int
    bytes_up: int

    @property
    def finished(self) -> bool:
        """Whether nothing more comes of it."""
        return self.status == "finished"


class Runs:
    """The runs of one SuperLink.

    Args:
        port: where it listens on loopback.
        root_certificates: the CA of its certificate; None: it speaks plain HTTP.
    """

    def __init__(self, port: int, root_certificates: Path | None) -> None:
        self._port = port
        certificates = None if root_certificates is None else root_certificates.read_bytes()
        self._client = ControlHttpClient.from_server_address(
            server_address=f"127.0.0.1:{port}",
            insecure=certificates is None,
            root_certificates=certificates,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def start(self, app: Path) -> int:
        """Hand over an app folder to be run, and return the run's id.

        Raises:
            AwayError: the SuperLink does not answer.
            RunError: it does not take the app.
        """
        content = build_fab_from_disk(app)
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        with self._asking():
            answer = self._client.StartRun(StartRunRequest(fab=fab_to_proto(fab)))
        if not answer.HasField("run_id"):
            raise RunError(
                f"the SuperLink does not take the run: {answer.note or 'it says no why'}"
            )
        return answer.run_id

    def get(self, run_id: int) -> FlowerRun:
        """Return one run.

        Raises:
            AwayError: the SuperLink does not answer.
            RunError: it has no such run.
        """
        with self._asking():
            answer = self._client.ListRuns(ListRunsRequest(run_id=run_id))
        return _run(answer.run_dict[run_id])

    def newest(self, count: int) -> list[FlowerRun]:
        """Return the newest runs, the newest one first.

        Raises:
            AwayError: the SuperLink does not answer.
        """
        with self._asking():
            answer = self._client.ListRuns(ListRunsRequest(limit=count))
        found = sorted(answer.run_dict.values(), key=lambda run: run.pending_at, reverse=True)
        return [_run(run) for run in found]

    def stop(self, run_id: int) -> None:
        """End a run; one that has ended stays as it is.

        Raises:
            AwayError: the SuperLink does not answer.
        """
        if not self.get(run_id).finished:
            with self._asking():
                self._client.StopRun(StopRunRequest(run_id=run_id))

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            said = error.response.text[:200]
            raise RunError(f"the SuperLink refused: {error.response.status_code} {said}") from error
        except httpx.HTTPError as error:
            raise AwayError(
                f"no server answers on 127.0.0.1:{self._port}: {error}",
                "Start it on this machine: fedgraft server --config server.toml",
            ) from error


def _run(run: Run) -> FlowerRun:
    return FlowerRun(
        run.run_id,
        run.status.status,
        run.status.sub_status,
        run.status.details,
        run.bytes_sent,
        run.bytes_recv,
    )
