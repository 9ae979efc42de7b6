"""Adapters as PEFT loads them on a clean base, merged models, and adapters to start from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from tiny_models import save_bert, save_vit

from fedgraft.adapter import Adapter, LoraLayer
from fedgraft.config import Config
from fedgraft.errors import ConfigError, DiskFullError, ModelError, RunError
from fedgraft.files import write_tensors
from fedgraft.resident_model import ResidentModel, resident_model, resident_task
from fedgraft.run_directory import RunDirectory
from fedgraft.tasks.task import Task
from server.export import (
    export_adapter,
    export_merged,
    read_adapter,
    write_adapter,
)

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


@pytest.fixture
def adapter(model: ResidentModel) -> Adapter:
    initial = model.initial_adapter(0)
    return initial.with_tensors({n: t + 0.03 for n, t in initial.tensors().items()})


@pytest.fixture
def run(tmp_path: Path, tiny: Config, model: ResidentModel, adapter: Adapter) -> RunDirectory:
    directory = RunDirectory.create(tmp_path / "run", tiny, "lineage-7")
    write_adapter(directory.adapter, adapter, model, "card")
    return directory


def pixels(task: Task) -> torch.Tensor:
    return task.test().batch(np.arange(64))["pixel_values"]


def logits(model: Any, task: Task) -> torch.Tensor:
    model.eval()
    with torch.inference_mode():
        found: torch.Tensor = model(pixel_values=pixels(task)).logits
    return found


def own_logits(model: ResidentModel, adapter: Adapter, task: Task) -> torch.Tensor:
    """The logits behind the server's own evaluation."""
    model.load(adapter.tensors())
    return logits(model.model, task)


# Out


def test_peft_loads_the_folder_on_a_clean_base_with_the_same_logits(
    run: RunDirectory, model: ResidentModel, adapter: Adapter, digits: Task
):
    loaded = PeftModel.from_pretrained(digits.load_base(), str(run.adapter))
    theirs, ours = logits(loaded, digits), own_logits(model, adapter, digits)
    # The same sums in the same order on one thread; 1e-6 leaves room for another build of torch.
    assert float((theirs - ours).abs().max()) <= 1e-6
    assert float((ours - logits(digits.load_base(), digits)).abs().max()) > 0.1
    metrics = model.evaluate(digits, adapter, digits.test())
    right = (theirs.argmax(-1) == digits.test().batch(np.arange(64))["labels"]).float().mean()
    assert 0 < float(right) < 1 and 0 < metrics["accuracy"] < 1


PATTERNED = {
    "adapter.type": "rslora",
    "adapter.rank-pattern": {"q_proj": 4},
    "adapter.alpha-pattern": {"k_proj": 4.0},
}


@pytest.mark.parametrize("residual", [(), ("layers.0.attention.q_proj", "layers.1.mlp.fc1")])
def test_layers_of_their_own_ranks_load_in_peft(
    residual: tuple[str, ...], tmp_path: Path, tiny: Config, digits: Task
):
    own = ResidentModel(digits, tiny.with_overrides(PATTERNED))
    start = own.initial_adapter(0)
    adapter = start.with_tensors({n: t + 0.03 for n, t in start.tensors().items()})
    joined = {
        name: LoraLayer(0.1 * torch.ones(3, layer.A.shape[1]), 0.1 * torch.ones(len(layer.B), 3))
        for name, layer in adapter.layers.items()
        if name.endswith(residual)
    }
    adapter = replace(adapter, residual=joined)
    write_adapter(tmp_path, adapter, own, "card")
    loaded = PeftModel.from_pretrained(digits.load_base(), str(tmp_path))
    own.take(adapter)
    torch.testing.assert_close(
        logits(loaded, digits), logits(own.model, digits), rtol=1e-4, atol=1e-4
    )
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    prefix = "^vit\\.layers\\."
    if not residual:
        assert settings["rank_pattern"] == {"q_proj": 4} and len(joined) == 0
        again = read_adapter(tmp_path, own)
        assert again.digest() == adapter.digest() and again.scalings == adapter.scalings
        with pytest.raises(ConfigError, match="trained with rank_pattern") as caught:
            read_adapter(tmp_path, ResidentModel(digits, tiny))
        assert "adapter.rank-pattern" in caught.value.remedy
        return
    ranks = {settings["rank_pattern"][f"{prefix}{k}\\.attention\\.q_proj"] for k in (0, 1)}
    assert len(joined) == 2 and ranks == {4 + 3, 4}
    assert settings["rank_pattern"][f"{prefix}1\\.mlp\\.fc1"] == 8 + 3


@pytest.mark.parametrize("kind", ["lora", "rslora"])
@pytest.mark.parametrize("residual", [0, 3])
def test_one_pattern_for_all_layers_loads_in_peft(
    kind: str, residual: int, tmp_path: Path, tiny: Config, digits: Task
):
    """What a residual adds raises every rank alike, so that no pattern may be left standing."""
    every = {"q_proj": 4, "k_proj": 4}
    settings = {
        "adapter.type": kind,
        "adapter.targets": list(every),
        "adapter.rank-pattern": every,
        "adapter.alpha-pattern": dict.fromkeys(every, 64.0),
    }
    own = ResidentModel(digits, tiny.with_overrides(settings))
    start = own.initial_adapter(0)
    adapter = start.with_tensors({n: t + 0.03 for n, t in start.tensors().items()})
    if residual:
        joined = {
            name: LoraLayer(
                0.1 * torch.ones(residual, layer.A.shape[1]),
                0.1 * torch.ones(len(layer.B), residual),
            )
            for name, layer in adapter.layers.items()
        }
        adapter = replace(adapter, residual=joined)
    write_adapter(tmp_path, adapter, own, "card")
    loaded = PeftModel.from_pretrained(digits.load_base(), str(tmp_path))
    own.take(adapter)
    torch.testing.assert_close(
        logits(loaded, digits), logits(own.model, digits), rtol=1e-4, atol=1e-4
    )


def test_dora_loads_in_peft_and_back(tmp_path: Path, tiny: Config, digits: Task):
    own = ResidentModel(digits, tiny.with_overrides({"adapter.type": "dora"}))
    start = own.initial_adapter(0)
    adapter = start.with_tensors({n: t + 0.03 for n, t in start.tensors().items()})
    write_adapter(tmp_path, adapter, own, "card")
    loaded = PeftModel.from_pretrained(digits.load_base(), str(tmp_path))
    theirs, ours = logits(loaded, digits), own_logits(own, adapter, digits)
    assert float((theirs - ours).abs().max()) <= 1e-6
    named = {n for n in get_peft_model_state_dict(loaded) if "magnitude" in n}
    assert named == {n for n in adapter.extras if "magnitude" in n} and len(named) == 12
    assert read_adapter(tmp_path, own).digest() == adapter.digest()
    with pytest.raises(ConfigError, match="use_dora True; this run has False"):
        read_adapter(tmp_path, ResidentModel(digits, tiny))


def test_the_settings_are_pefts_own_and_in_a_stable_order(run: RunDirectory, tiny: Config):
    text = (run.adapter / "adapter_config.json").read_text()
    settings = json.loads(text)
    assert text == json.dumps(settings, indent=2, sort_keys=True) + "\n"
    assert settings["target_modules"] == sorted(settings["target_modules"])
    assert settings["modules_to_save"] == ["classifier"] and settings["inference_mode"]
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (8, 16.0, "LORA")
    assert PeftConfig.from_pretrained(str(run.adapter)).r == 8


def test_equal_adapters_write_equal_files(
    run: RunDirectory, tmp_path: Path, model: ResidentModel, adapter: Adapter
):
    write_adapter(tmp_path / "again", adapter, model, "card")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (run.adapter / name).read_bytes()


def test_a_merged_model_gives_the_same_logits(
    run: RunDirectory, model: ResidentModel, adapter: Adapter, digits: Task, tmp_path: Path
):
    from transformers import AutoModelForImageClassification

    export_merged(run, tmp_path / "merged")
    merged = AutoModelForImageClassification.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    )
    assert not any("lora" in name for name, _ in merged.named_parameters())
    # W0 + s B A is rounded once, where the adapter computes W0 x + s B (A x): 1e-7 of logits near
    # 10, through four layers
    difference = logits(merged, digits) - own_logits(model, adapter, digits)
    assert float(difference.abs().max()) <= 1e-4
    # and it serves as the base of another run
    again = digits.config.with_overrides({"model.base": str(tmp_path / "merged")})
    merged_task = resident_task(again)
    assert resident_model(merged_task, again).base_hash != model.base_hash


def test_an_adapter_folder_is_copied_whole(run: RunDirectory, tmp_path: Path):
    export_adapter(run, tmp_path / "copy")
    for path in run.adapter.iterdir():
        assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()
    (tmp_path / "empty").mkdir()
    export_adapter(run, tmp_path / "empty")
    assert len(list((tmp_path / "empty").iterdir())) == 3


@pytest.mark.parametrize("export", [export_adapter, export_merged])
def test_what_cannot_be_exported(export: Any, run: RunDirectory, tiny: Config, tmp_path: Path):
    unfinished = RunDirectory.create(tmp_path / "unfinished", tiny, "x")
    with pytest.raises(ConfigError, match="has no adapter yet") as caught:
        export(unfinished, tmp_path / "to")
    assert f"--resume {tmp_path / 'unfinished'}" in caught.value.remedy
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    file = tmp_path / "file"
    file.write_text("x")
    for target in (tmp_path / "full", file):
        with pytest.raises(ConfigError, match="exists and is not an empty folder"):
            export(run, target)


def test_a_base_without_save_pretrained_cannot_be_merged(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Merged:
        def merge_and_unload(self) -> object:
            return object()

    monkeypatch.setattr("peft.PeftModel.from_pretrained", lambda *_: Merged())
    with pytest.raises(ModelError, match="a object cannot be saved as a model folder"):
        export_merged(run, tmp_path / "merged")


@pytest.mark.parametrize("there", [True, False], ids=["an-empty-folder", "a-new-one"])
@pytest.mark.parametrize("export", [export_adapter, export_merged])
def test_a_full_disk_is_said_and_nothing_half_written_is_left(
    export: Any, there: bool, run: RunDirectory, full_disk: Path
):
    to = full_disk / "to"
    (full_disk / "ballast").unlink()
    to.mkdir()
    with (full_disk / "ballast").open("wb") as file:  # 60 KiB are left: for small files
        file.write(bytes((1 << 20) - (64 << 10)))
    if not there:
        to.rmdir()
    with pytest.raises(DiskFullError, match=f"the disk is full: {to}") as caught:
        export(run, to)
    assert caught.value.exit_status == 1 and "Free some space" in caught.value.remedy
    assert list(to.iterdir()) == [] if there else not to.exists()
    (full_disk / "ballast").unlink()
    export(run, to)
    assert (to / "README.md").exists() or (to / "model.safetensors").exists()


def test_a_target_that_refuses_the_write_is_named(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What safetensors writes itself comes as an error of its own."""

    def refused(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: Read-only file system (os error 30)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", refused)
    with pytest.raises(RunError, match=r"merged could not be written: .*Read-only") as caught:
        export_merged(run, tmp_path / "merged")
    assert not isinstance(caught.value, DiskFullError) and not (tmp_path / "merged").exists()


def test_a_merged_model_takes_its_tokenizer_along_and_is_quiet(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = save_bert(tmp_path / "bert")
    (tmp_path / "reviews.csv").write_text(
        "text,label\n"
        + "".join(f"a {'good' if k % 2 else 'bad'} film,{k % 2}\n" for k in range(40))
    )
    config = Config().with_overrides(
        {
            "task.name": "text-classification",
            "task.data": str(tmp_path / "reviews.csv"),
            "model.base": str(base),
            "federation.clients": 2,
        }
    )
    own = ResidentModel(resident_task(config), config)
    directory = RunDirectory.create(tmp_path / "run", config, "lineage-9")
    write_adapter(directory.adapter, own.initial_adapter(0), own, "card")
    capfd.readouterr()
    export_merged(directory, tmp_path / "merged")
    assert capfd.readouterr() == ("", "")
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (base, tmp_path / "merged")]
    text = "a very good film"
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged(**tokenizers[1](text, return_tensors="pt")).logits.shape == (1, 2)


def test_a_merged_model_takes_its_image_processor_along(tmp_path: Path):
    from PIL import Image
    from transformers import AutoImageProcessor, ViTImageProcessor

    base = save_vit(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.2] * 3).save_pretrained(base)
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for k in range(12):
            colour = (20 * k, 10 * k, 100)
            Image.new("RGB", (8, 8), colour).save(tmp_path / "images" / label / f"{k}.png")
    config = Config().with_overrides(
        {
            "task.name": "image-classification",
            "task.data": str(tmp_path / "images"),
            "model.base": str(base),
            "federation.clients": 2,
        }
    )
    own = ResidentModel(resident_task(config), config)
    directory = RunDirectory.create(tmp_path / "run", config, "lineage-9")
    write_adapter(directory.adapter, own.initial_adapter(0), own, "card")
    export_merged(directory, tmp_path / "merged")
    assert AutoImageProcessor.from_pretrained(tmp_path / "merged").image_mean[0] == 0.2


# In


def test_an_adapter_to_start_from_is_read_to_the_bit(
    run: RunDirectory, model: ResidentModel, adapter: Adapter
):
    assert read_adapter(run.adapter, model).digest() == adapter.digest()


def test_an_adapter_that_peft_saved_is_read(model: ResidentModel, adapter: Adapter, tmp_path: Path):
    model.load(adapter.tensors())
    model.model.save_pretrained(str(tmp_path / "theirs"))
    assert read_adapter(tmp_path / "theirs", model).digest() == adapter.digest()


def test_an_adapter_in_half_precision_is_read_as_float32(
    run: RunDirectory, model: ResidentModel, adapter: Adapter
):
    halves = {name: tensor.bfloat16() for name, tensor in adapter.tensors().items()}
    write_tensors(run.adapter / "adapter_model.safetensors", halves)
    found = read_adapter(run.adapter, model)
    assert {t.dtype for t in found.tensors().values()} == {torch.float32}
    assert all(torch.equal(t, halves[n].float()) for n, t in found.tensors().items())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adapter.alpha": 8.0}, "trained with alpha 16.0, rank 8, rsLoRA False; this run has 8.0"),
        ({"adapter.rank": 4}, "rank 8, rsLoRA False; this run has 16.0, 4, False"),
        ({"adapter.type": "rslora"}, "rsLoRA False; this run has 16.0, 8, True"),
        ({"adapter.targets": ["q_proj"]}, r"of shape \(8, 64\); this run's is None"),
        ({"adapter.targets": [*TARGETS, "projection"]}, "of shape None; this run's is"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    settings: dict[str, Any], said: str, run: RunDirectory, digits: Task
):
    other = ResidentModel(digits, digits.config.with_overrides(settings))
    with pytest.raises(ConfigError, match=said) as caught:
        read_adapter(run.adapter, other)
    assert "the adapter's own" in caught.value.remedy


def test_a_folder_that_is_no_adapter_is_refused(
    run: RunDirectory, model: ResidentModel, tmp_path: Path
):
    for folder in (tmp_path, tmp_path / "nowhere", run.path):
        with pytest.raises(ConfigError, match=r"adapter\.from is .* has no adapter_model"):
            read_adapter(folder, model)


def test_a_damaged_adapter_is_refused(run: RunDirectory, model: ResidentModel):
    settings = run.adapter / "adapter_config.json"
    text = settings.read_text()
    settings.write_text(text[:-20])
    with pytest.raises(ConfigError, match=r"adapter_config\.json is not valid JSON"):
        read_adapter(run.adapter, model)
    settings.write_text(text)
    weights = run.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"adapter_model\.safetensors cannot be read"):
        read_adapter(run.adapter, model)
