"""The resident trainer behind gRPC on a Unix socket."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from client.resident import trainer_pb2_grpc
from client.resident.protocol import PROTOCOL, address, check_socket, options
from client.resident.trainer_pb2 import DESCRIPTOR, Greeting, Order, Result, Welcome
from client.resident.worker import BusyError, Worker
from fedgraft import __version__
from fedgraft.errors import RunError
from fedgraft.messages import HELLO
from fedgraft.resident_model import resident_base

log = logging.getLogger(__name__)
SERVICE: str = DESCRIPTOR.services_by_name["ResidentTrainer"].full_name
_CALLERS = 8
_END_SECONDS = 5.0


class Service(trainer_pb2_grpc.ResidentTrainerServicer):
    """Hands orders to the worker and lets their callers wait, or go away."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def Greet(self, request: Greeting, context: grpc.ServicerContext) -> Welcome:
        """Say who answers."""
        return Welcome(
            protocol=PROTOCOL,
            fedgraft=__version__,
            client=self._worker.desk.own.name,
            busy=self._worker.busy,
            base=resident_base(),
        )

    def Work(self, request: Order, context: grpc.ServicerContext) -> Result:
        """Answer one of Flower's messages.

        Aborts with FAILED_PRECONDITION where the caller is of another version, with ABORTED where
        another order is at work.
        """
        if (request.protocol, request.fedgraft) != (PROTOCOL, __version__):
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the trainer is FedGraft {__version__}, protocol {PROTOCOL}",
            )
        try:
            job = self._worker.submit(request)
        except BusyError as error:
            if request.kind == HELLO:
                return Result(content=self._worker.desk.name_only().content)
            context.abort(grpc.StatusCode.ABORTED, error.message)
        if not context.add_callback(job.given_up.set):
            job.given_up.set()  # the caller is gone already
        job.done.wait()
        if job.answer is not None:
            return Result(content=job.answer.content)
        raise context.abort(grpc.StatusCode.CANCELLED, "the work was stopped")


def start(worker: Worker, socket: Path, everybody: bool = False) -> grpc.Server:
    """Listen on a Unix socket; the worker's own loop is the caller's to run.

    Args:
        worker: does the work.
        socket: its path; the folder decides who may come near.
        everybody: let other users connect, where the folder lets them through.

    Raises:
        ConfigError: the path is too long for a socket.
        RunError: the socket cannot be made.
    """
    check_socket(socket)
    server = grpc.server(ThreadPoolExecutor(_CALLERS), options=options())
    trainer_pb2_grpc.add_ResidentTrainerServicer_to_server(Service(worker), server)
    told = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(told, server)
    for name in ("", SERVICE):
        told.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        server.add_insecure_port(address(socket))
        server.start()
        socket.chmod(0o666 if everybody else 0o600)
    except (RuntimeError, OSError) as error:
        raise RunError(f"no socket can be made at {socket}: {error}") from error
    log.info("listening on %s as client %s", socket, worker.desk.own.name)
    return server


def stop(server: grpc.Server) -> None:
    """Stop listening, once answers that are ready have been sent."""
    server.stop(_END_SECONDS).wait()
