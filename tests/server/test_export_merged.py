"""Merged language models: the same logits as the adapter, whatever the base was trained in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import save_llama

from fedgraft.adapter import Adapter, Tensors
from fedgraft.config import Config
from fedgraft.resident_model import ResidentModel, resident_task
from fedgraft.run_directory import RunDirectory
from fedgraft.seeds import stream
from server.commands import export
from server.export import export_merged, write_adapter

IDS = torch.tensor([[2, *range(4, 30)], [2, *range(30, 4, -1)]])
TOLERANCE = 1e-5
"""Of the largest logit: W + s B A is rounded once where the adapter computes W x + s B (A x)."""
ORDINARY = {"initializer_range": 0.1}
"""Weights of a size that does not amplify rounding as the other tests' tiny Llama does."""


def config_of(folder: Path, **keys: Any) -> Config:
    base = folder / "llama"
    (folder / "d.jsonl").write_text(
        "\n".join(json.dumps({"prompt": "how many ?", "completion": "two"}) for _ in range(20))
    )
    return Config().with_overrides(
        {
            "task.name": "causal-lm",
            "task.data": str(folder / "d.jsonl"),
            "model.base": str(base),
            "model.device": "cpu",
            "federation.clients": 2,
            "threads": 1,
        }
        | {key.replace("__", "."): value for key, value in keys.items()}
    )


def drawn(name: str, shape: Any, size: float = 0.1) -> torch.Tensor:
    return torch.from_numpy(stream(5, name).normal(0, size, tuple(shape))).float()


def trained(model: ResidentModel, *, residual: bool = False) -> Adapter:
    """An adapter that changes much."""
    start = model.initial_adapter(0)
    made = start.with_tensors({n: t + drawn(n, t.shape) for n, t in start.tensors().items()})
    if not residual:
        return made
    extra: Tensors = {}
    for number, (name, layer) in enumerate(made.layers.items()):
        rank = 1 + number % 3
        extra[f"{name}.lora_A.weight"] = drawn(f"{name}-A", (rank, layer.A.shape[1]))
        extra[f"{name}.lora_B.weight"] = drawn(f"{name}-B", (layer.B.shape[0], rank))
    return made.with_residual(extra)


def save_run(folder: Path, config: Config, adapter: Adapter, model: ResidentModel) -> RunDirectory:
    directory = RunDirectory.create(folder, config, "lineage")
    write_adapter(directory.adapter, adapter, model, "card")
    return directory


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits.float()
    return found


def from_folder(path: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **options)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("kind", ["lora", "rslora"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_adapter_and_merged_model_give_the_same_logits(
    tmp_path: Path, kind: str, tied: bool, residual: bool
) -> None:
    base = save_llama(tmp_path / "llama", tie_word_embeddings=tied, **ORDINARY)
    config = config_of(tmp_path, adapter__type=kind)
    model = ResidentModel(resident_task(config), config)
    adapter = trained(model, residual=residual)
    directory = save_run(tmp_path / "run", config, adapter, model)
    export_merged(directory, tmp_path / "merged")
    merged = logits(from_folder(tmp_path / "merged"))
    in_peft = logits(PeftModel.from_pretrained(from_folder(base), str(directory.adapter)))
    model.take(adapter)
    assert apart(merged, in_peft) <= TOLERANCE
    assert apart(merged, logits(model.model)) <= TOLERANCE
    assert apart(merged, logits(from_folder(base))) > 0.1
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert settings["tie_word_embeddings"] is tied and settings["dtype"] == "float32"
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) is not tied


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_half_precision_or_quantised_run_is_merged_into_full_precision(
    tmp_path: Path, quantization: str
) -> None:
    """Every merged weight is W + s B A of the published weights, to the rounding of float32."""
    base = save_llama(tmp_path / "llama", dtype="bfloat16", **ORDINARY)
    published = load_file(base / "model.safetensors")
    assert {tensor.dtype for tensor in published.values()} == {torch.bfloat16}
    whole = config_of(tmp_path, model__dtype="bfloat16")
    model = ResidentModel(resident_task(whole), whole)
    adapter = trained(model)
    config = whole.with_overrides({"model.quantization": quantization})
    directory = save_run(tmp_path / "run", config, adapter, model)
    export_merged(directory, tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == published.keys()
    touched = 0
    for name, weight in published.items():
        layer = adapter.layers.get(f"base_model.model.{name.removesuffix('.weight')}")
        change = 0.0 if layer is None else layer.scaling * (layer.B.double() @ layer.A.double())
        touched += layer is not None
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(
            found[name].double(), weight.double() + change, rtol=0, atol=1e-6
        )
    assert touched == len(adapter.layers) > 0
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    # the adapter on the same base in full precision computes the same
    whole_base = from_folder(base, dtype=torch.float32)
    in_peft = logits(PeftModel.from_pretrained(whole_base, str(directory.adapter)))
    assert apart(logits(from_folder(tmp_path / "merged")), in_peft) <= TOLERANCE


def test_on_an_nf4_base_the_adapter_is_off_by_what_quantisation_lost(tmp_path: Path) -> None:
    """So the merged model is not the NF4 one's equal: it is free of that error."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128}
    base = save_llama(tmp_path / "llama", **sizes, **ORDINARY)
    config = config_of(tmp_path)
    model = ResidentModel(resident_task(config), config)
    directory = save_run(tmp_path / "run", config, trained(model), model)
    export_merged(directory, tmp_path / "merged")
    merged = logits(from_folder(tmp_path / "merged"))
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    coarse = from_folder(base, quantization_config=four_bits, dtype=torch.float32)
    lost = apart(logits(coarse), logits(from_folder(base)))
    on_nf4 = logits(PeftModel.from_pretrained(coarse, str(directory.adapter)))
    assert lost > 100 * TOLERANCE
    assert 100 * TOLERANCE < apart(on_nf4, merged) < 10 * lost


def test_the_command_rounds_where_it_is_asked_to(tmp_path: Path) -> None:
    save_llama(tmp_path / "llama")
    config = config_of(tmp_path)
    model = ResidentModel(resident_task(config), config)
    directory = save_run(tmp_path / "run", config, trained(model), model)
    words = [str(directory.path), "--to", str(tmp_path / "half"), "--dtype", "bfloat16"]
    refused = CliRunner().invoke(export, words)
    assert refused.exit_code == 2 and "--dtype is of a merged model: add --merge" in refused.output
    done = CliRunner().invoke(export, [*words, "--merge", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout) == {"model": str(tmp_path / "half")}
    export_merged(directory, tmp_path / "whole")
    half = load_file(tmp_path / "half" / "model.safetensors")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert all(torch.equal(half[name], whole[name].bfloat16()) for name in whole)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "half" / "tokenizer.json").exists()
