"""Whole federations in this process: run, crash, resume, and what PEFT makes of their adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedgraft.adapter import Adapter
from fedgraft.config import Config
from fedgraft.resident_model import resident_model, resident_task
from fedgraft.run_directory import RunDirectory
from server.checkpoint import Checkpoints
from server.run import FederatedRun
from simulations.engine import run_engine
from simulations.simulate import prepare


class Crash(BaseException):
    """What no code of ours catches."""


def run(config: Config, path: Path) -> RunDirectory:
    directory = prepare(config, path) if not path.exists() else RunDirectory.open(path)
    run_engine(directory.config(), directory, "in-process")
    return directory


def crash_and_resume(config: Config, path: Path, round: int) -> RunDirectory:
    """Run to a round, end the process there as far as the run can tell, and run again.

    The crash comes when the round is aggregated and not yet saved.
    """
    on_round = FederatedRun.on_round

    def dying(self: FederatedRun, outcome: Any) -> bool:
        if outcome.state.round == round:
            raise Crash
        return on_round(self, outcome)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FederatedRun, "on_round", dying)
        with pytest.raises(Crash):
            run(config, path)
    return run(config, path)


def weights(directory: RunDirectory) -> bytes:
    return (directory.adapter / "adapter_model.safetensors").read_bytes()


def logits_here_and_in_peft(directory: RunDirectory) -> tuple[torch.Tensor, torch.Tensor]:
    """The best adapter's logits in the resident model, and the exported one's on a clean base."""
    from peft import PeftModel

    config = directory.config()
    task = resident_task(config)
    checkpoint = Checkpoints(directory.checkpoints, 2).latest()
    assert checkpoint is not None and checkpoint.best is not None
    model = resident_model(task, config)
    batch = task.validation().batch(torch.arange(64).numpy())
    ours = _logits(model.model.eval(), batch, model.take, checkpoint.best)
    model.take(model.initial_adapter(0))
    clean = PeftModel.from_pretrained(task.load_base(), str(directory.adapter)).eval()
    return ours, _logits(clean, batch)


def _logits(model: Any, batch: Any, take: Any = None, adapter: Adapter | None = None) -> Any:
    if take is not None:
        take(adapter)
    with torch.inference_mode():
        return model(pixel_values=batch["pixel_values"]).logits
