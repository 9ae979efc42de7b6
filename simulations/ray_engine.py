"""`--engine ray`: Flower's own simulation runtime, for several GPUs or machines.

A SuperLink of our own is started on a free loopback port with a home of its own, handed the run,
and stopped with everything it started when the run ends.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from flwr.app import UserConfig

from fedgraft import flower
from fedgraft.config import Config
from fedgraft.errors import RunError
from fedgraft.run_directory import RunDirectory
from server.progress import FAILED, FINISHED, ProgressReader, failure

_POLL_SECONDS = 0.2


def run_under_ray(config: Config, directory: RunDirectory, run_config: UserConfig) -> None:
    """Run the federation of a run directory in Flower's Ray simulation.

    Raises:
        FedGraftError: what the ServerApp said, or that Flower failed (with its log).
    """
    log = directory.path / "flower.log"
    reader = ProgressReader(directory.progress)
    with tempfile.TemporaryDirectory(prefix="fedgraft-flower-") as scratch:
        app = Path(scratch) / "app"
        flower.write_app(app, run_config)
        settings = flower.simulation_settings(
            config.federation.clients, config.threads or 1, _gpus_per_client(config)
        )
        environment = flower.flower_environment(Path(scratch) / "home")
        with submitted(app, settings, environment, log) as stream:
            _follow(stream, reader, directory, log)


@contextmanager
def submitted(
    app: Path, settings: str, environment: Mapping[str, str], log_path: Path
) -> Iterator[subprocess.Popen[str]]:
    """Start a SuperLink and hand it an app; the process yielded follows the run to its end.

    Args:
        app: the app's folder.
        settings: of the simulation, as `flower.simulation_settings` writes them.
        environment: for all of Flower's processes; its FLWR_HOME is the run's own.
        log_path: where Flower's processes write.

    Raises:
        RunError: Flower did not start.
    """
    home, port = Path(environment["FLWR_HOME"]), flower.free_port()
    flower.write_connection(home, port)
    superlink = [
        *("flower-superlink", "--insecure", "--simulation"),
        *("--host", "127.0.0.1", "--port", str(port)),
        "--disable-runtime-dependency-installation",
    ]
    run = ["flwr", "run", str(app), flower.CONNECTION, "--stream", "--federation-config", settings]
    with log_path.open("a") as log, flower.started(superlink, log, home, environment) as server:
        flower.wait_for_port(port, server, log_path)
        with flower.started(run, log, app, environment) as stream:
            yield stream


def _follow(
    stream: subprocess.Popen[str], reader: ProgressReader, directory: RunDirectory, log: Path
) -> None:
    """Wait for the end of the run; what the ServerApp says of a failure is raised here."""
    while True:
        ended = stream.poll() is not None
        for event in reader.events():
            if event["event"] == FAILED:
                raise failure(event)
            if event["event"] == FINISHED:
                return
        if ended:
            raise RunError("the run under Ray ended without a result", f"See {log}.")
        time.sleep(_POLL_SECONDS)


def _gpus_per_client(config: Config) -> float:
    """Return one GPU a client where the model runs on one, none elsewhere."""
    wants_cpu = config.model.device in ("cpu", "mps")
    return 0.0 if wants_cpu or not torch.cuda.is_available() else 1.0
