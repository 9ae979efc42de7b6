"""Federations on quantised bases: they learn, resume, refuse another base, export to plain PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import shared

from fedgraft.config import Config
from fedgraft.quantization import keep_weights_as_stored
from fedgraft.resident_model import resident_model, resident_task
from fedgraft.run_directory import RunDirectory
from server.session import resume
from simulations.engine import run_engine
from simulations.simulate import prepare

KINDS = ("int8", "nf4")


def run(config: Config, path: Path) -> RunDirectory:
    directory = prepare(config, path) if not path.exists() else RunDirectory.open(path)
    run_engine(directory.config(), directory, "in-process")
    return directory


def weights(directory: RunDirectory) -> bytes:
    return (directory.adapter / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def sums(tmp_path: Path) -> Config:
    """A language model of 260K parameters and 48 of GSM8K's rows."""
    lines = (shared("data/gsm8k") / "train.jsonl").read_text().splitlines()[:64]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return Config().with_overrides(
        {
            "task.name": "causal-lm",
            "task.data": str(tmp_path / "rows.jsonl"),
            "task.max-length": 64,
            "model.base": str(shared("models/stories260K")),
            "model.device": "cpu",
            "federation.clients": 2,
            "federation.rounds": 3,
            "train.steps": 3,
            "train.batch-size": 4,
            "train.lr": 0.005,
            "train.loss": "all",
            "threads": 1,
        }
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_language_model_learns_on_a_quantised_base_and_exports(
    kind: str, sums: Config, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = sums.with_overrides({"model.quantization": kind})
    directory = run(config, tmp_path / "run")
    summary = directory.summary()
    assert summary is not None
    assert summary["failed_clients"] == 0
    assert summary["final"] < summary["initial"] - 0.3

    # Plain PEFT on a base that plain transformers has quantised
    how: Any = BitsAndBytesConfig
    chosen = (
        how(load_in_8bit=True)
        if kind == "int8"
        else how(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    )
    base = AutoModelForCausalLM.from_pretrained(
        config.model.base, quantization_config=chosen, device_map={"": "cpu"}, dtype=torch.float32
    )
    keep_weights_as_stored(base)  # else bitsandbytes fails on widths like these on some CPUs
    theirs = PeftModel.from_pretrained(base, str(directory.adapter)).eval()
    model = resident_model(resident_task(directory.config()), directory.config())
    tensors = {n: p.detach() for n, p in theirs.named_parameters() if "lora_" in n}
    assert any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)
    model.load({n.replace(".default", ""): tensor for n, tensor in tensors.items()})
    model.model.eval()
    ids = torch.arange(3, 35)[None]
    with torch.inference_mode():
        assert torch.allclose(
            model.model(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_quantised_base_resumes_bit_for_bit(
    kind: str, tiny: Config, tmp_path: Path
) -> None:
    config = tiny.with_overrides(
        {
            "model.quantization": kind,
            "federation.rounds": 3,
            "train.schedule": "constant",  # others span all rounds
        }
    )
    whole = run(config, tmp_path / "whole")
    run(config.with_overrides({"federation.rounds": 2}), tmp_path / "resumed")
    changed, directory = resume(tmp_path / "resumed", {"federation.rounds": 3})
    run_engine(changed, directory, "in-process")
    assert weights(directory) == weights(whole)


def test_a_client_with_another_base_refuses_and_says_so(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's base is in four bits; what the clients hold is not."""
    from client import seat
    from fedgraft.errors import RunError

    plain = tiny.with_overrides({"model.quantization": "none"})
    other = resident_model(resident_task(plain), plain)
    directory = prepare(tiny.with_overrides({"model.quantization": "nf4"}), tmp_path / "run")
    monkeypatch.setattr(seat, "resident_model", lambda task, config: other)
    with pytest.raises(RunError, match="this client's base"):
        run_engine(directory.config(), directory, "in-process")
    records = [json.loads(line) for line in directory.rounds_file.read_text().splitlines()]
    assert not any(record["round"] > 0 for record in records)
