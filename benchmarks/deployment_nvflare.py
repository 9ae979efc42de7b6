"""NVFlare on the same no-op work; run by an interpreter that has nvflare, and nothing of FedGraft.

    PYTHON benchmarks/deployment_nvflare.py FOLDER CLIENTS ROUNDS

FOLDER holds shapes.json ({name: shape} of what travels, float32); the times at which rounds began
are left in starts.json. It is NVFlare's own proof-of-concept deployment: a server and clients as
processes of their own on loopback, with the TLS and the certificates that provisioning makes. The
workflow is its ScatterAndGather with its weighted aggregator, all settings as shipped, but for the
model, which is not kept on disk in every round. The clients' trainer adds a number to what it got.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.executor import Executor
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.model import ModelLearnable, make_model_learnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.app_event_type import AppEventType

_SECONDS = 600.0


class Idle(Executor):
    """A trainer that does nothing but send other values back."""

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        received = from_shareable(shareable).data
        sent = {name: values + np.float32(1e-3) for name, values in received.items()}
        meta = {MetaKey.NUM_STEPS_CURRENT_ROUND: 1}
        return DXO(data_kind=DataKind.WEIGHTS, data=sent, meta=meta).to_shareable()


class Model(ModelPersistor):
    """The model that is sent, which notes when a round begins.

    Args:
        folder: of the benchmark.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        shapes = json.loads((Path(self.folder) / "shapes.json").read_text())
        weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        return make_model_learnable(weights=weights, meta_props={})

    def save_model(self, model_learnable: ModelLearnable, fl_ctx: FLContext) -> None:
        pass

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.ROUND_STARTED:
            with (Path(self.folder) / "starts.jsonl").open("a") as file:
                file.write(f"{time.time()}\n")


def main() -> None:
    folder, clients, rounds = Path(sys.argv[1]).absolute(), int(sys.argv[2]), int(sys.argv[3])
    os.environ["NVFLARE_POC_WORKSPACE"] = str(folder / "poc")
    os.environ["HOME"] = str(folder)  # where it keeps a configuration of its own

    # The job's configuration names classes by module, and this file is called __main__ here.
    import deployment_nvflare as parts
    from nvflare.app_common.aggregators.intime_accumulate_model_aggregator import (
        InTimeAccumulateWeightedAggregator,
    )
    from nvflare.app_common.shareablegenerators.full_model_shareable_generator import (
        FullModelShareableGenerator,
    )
    from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather
    from nvflare.job_config.api import FedJob
    from nvflare.recipe.poc_env import PocEnv

    job = FedJob(name="idle", min_clients=clients)
    generator = job.to_server(FullModelShareableGenerator(), id="shareable_generator")
    aggregator = job.to_server(
        InTimeAccumulateWeightedAggregator(expected_data_kind=DataKind.WEIGHTS), id="aggregator"
    )
    persistor = job.to_server(parts.Model(str(folder)), id="persistor")
    job.to_server(
        ScatterAndGather(
            min_clients=clients,
            num_rounds=rounds,
            persistor_id=persistor or "persistor",
            aggregator_id=aggregator or "aggregator",
            shareable_generator_id=generator or "shareable_generator",
        )
    )
    job.to_clients(parts.Idle(), tasks=["train"])
    environment = PocEnv(num_clients=clients, extra={"login_timeout": 120})
    told = folder / "starts.jsonl"
    try:
        environment.deploy(job)
        end = time.monotonic() + _SECONDS
        while not told.exists() or len(told.read_text().splitlines()) < rounds:
            if time.monotonic() > end:
                raise SystemExit("NVFlare's rounds did not end")
            time.sleep(0.2)
        time.sleep(5.0)  # the last round
    finally:
        environment.stop()
    starts = [float(line) for line in told.read_text().splitlines()]
    (folder / "starts.json").write_text(json.dumps(starts))


if __name__ == "__main__":
    main()
