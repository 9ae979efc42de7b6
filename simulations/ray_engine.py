"""`--engine ray`: Flower's own simulation runtime, for several GPUs or machines.

A SuperLink of our own is started on a free loopback port with a home of its own, handed the run,
and stopped with everything it started when the run ends.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
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
    log_path = directory.path / "flower.log"
    reader = ProgressReader(directory.progress)
    with (
        tempfile.TemporaryDirectory(prefix="fedgraft-flower-") as scratch,
        log_path.open("a") as log,
    ):
        home, app = Path(scratch) / "home", Path(scratch) / "app"
        port = flower.free_port()
        flower.write_app(app, run_config)
        flower.write_connection(home, port)
        settings = flower.simulation_settings(
            config.federation.clients, config.threads or 1, _gpus_per_client(config)
        )
        environment = flower.flower_environment(home)
        superlink = [
            "flower-superlink",
            "--insecure",
            "--simulation",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--disable-runtime-dependency-installation",
        ]
        with flower.started(superlink, log, home, environment) as server:
            flower.wait_for_port(port, server, log_path)
            run = ["flwr", "run", str(app), flower.CONNECTION, "--stream"]
            run += ["--federation-config", settings]
            with flower.started(run, log, app, environment) as stream:
                _follow(stream, reader, directory, log_path)


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
