from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_models import save_bert, save_llama, save_vit
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from fedgraft.config import Config
from fedgraft.errors import ConfigError, ModelError
from fedgraft.seeds import stream
from fedgraft.tasks.base_models import (
    head_modules,
    load_config,
    load_model,
    load_tokenizer,
    structure_of,
)


def config(base: Path | str, **model: Any) -> Config:
    return Config.from_dict(
        {"task": {"name": "text-classification"}, "model": {"base": str(base), **model}}
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


def edit(folder: Path, copy: Path, **settings: Any) -> Path:
    """Copy a model folder with other settings in its config.json."""
    shutil.copytree(folder, copy)
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return copy


def test_the_base_is_loaded_as_it_is(bert: Path) -> None:
    loaded = load_model(AutoModelForSequenceClassification, config(bert), num_labels=3)
    saved = transformers.AutoModel.from_pretrained(bert).state_dict()
    assert not loaded.training
    backbone = loaded.get_submodule("bert").state_dict()
    assert backbone.keys() == saved.keys()
    assert all(torch.equal(backbone[name], saved[name]) for name in saved)


def test_a_new_head_is_the_same_on_every_machine(bert: Path) -> None:
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = load_model(AutoModelForSequenceClassification, config(bert), num_labels=3)
        heads.append(model.get_submodule("classifier").state_dict())
    name = "classifier.weight"
    expected = stream(0, "new-weights", client=name).normal(0.0, 0.02, (3, 16))
    for head in heads:
        assert np.array_equal(head["weight"].numpy(), expected.astype(np.float32))
        assert torch.equal(head["bias"], torch.zeros(3))


def test_weights_outside_the_head_are_drawn_too(bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = edit(bert, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    gone = ("pooler.dense.weight", "encoder.layer.1.output.LayerNorm.weight")
    kept = {name: tensor for name, tensor in tensors.items() if name not in gone}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_model(AutoModelForSequenceClassification, config(folder))
    weights = dict(model.named_parameters())
    name = "bert.pooler.dense.weight"
    expected = stream(0, "new-weights", client=name).normal(0.0, 0.02, (16, 16))
    assert np.array_equal(weights[name].detach().numpy(), expected.astype(np.float32))
    assert torch.equal(weights[f"bert.{gone[1]}"], torch.ones(16))


def test_a_head_for_other_classes_is_drawn_anew(bert: Path, tmp_path: Path) -> None:
    five = load_model(AutoModelForSequenceClassification, config(bert), num_labels=5)
    five.save_pretrained(tmp_path)
    kept = load_model(AutoModelForSequenceClassification, config(tmp_path), num_labels=5)
    with torch.no_grad():
        head = kept.get_submodule("classifier").weight
        assert torch.equal(head, five.get_submodule("classifier").weight)
    two = load_model(
        AutoModelForSequenceClassification, config(tmp_path), heads=("classifier",), num_labels=2
    )
    assert tuple(two.get_submodule("classifier").weight.shape) == (2, 16)


def test_dtype(bert: Path) -> None:
    model = load_model(AutoModelForSequenceClassification, config(bert, dtype="bfloat16"))
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}


def test_a_hub_id_takes_its_revision_and_never_code_or_pickles() -> None:
    asked: dict[str, Any] = {}

    class Fake:
        @staticmethod
        def from_pretrained(source: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
            asked.update(options, source=source)
            return nn.Linear(2, 2), {"missing_keys": [], "mismatched_keys": []}

    load_model(Fake, config("owner/name", revision="v2"))
    assert (asked["source"], asked["revision"]) == ("owner/name", "v2")
    assert asked["trust_remote_code"] is False and asked["use_safetensors"] is True


@pytest.mark.parametrize("base", ["./absent", "/no/such/folder", "models/of/mine", "~/absent"])
def test_a_folder_that_is_not_there(base: str) -> None:
    with pytest.raises(ModelError, match="that folder is not there") as caught:
        load_model(AutoModelForCausalLM, config(base))
    assert repr(base) in caught.value.message


def test_folders_that_hold_no_base(bert: Path, tmp_path: Path) -> None:
    def message(base: Path, auto_class: Any = AutoModelForSequenceClassification) -> str:
        with pytest.raises(ModelError) as caught:
            load_model(auto_class, config(base))
        assert "\n" not in caught.value.message
        return caught.value.message

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no config.json" in message(empty)
    assert "is a file, not a folder" in message(bert / "config.json")

    garbled = edit(bert, tmp_path / "garbled")
    (garbled / "config.json").write_text("{")
    assert "config.json is not valid JSON" in message(garbled)

    pickled = edit(bert, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "safetensors" in message(pickled)

    short = edit(bert, tmp_path / "short")
    weights = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "cannot be loaded" in message(short)

    mute = edit(bert, tmp_path / "mute")
    for path in mute.glob("token*"):
        path.unlink()
    with pytest.raises(ModelError, match="brings no tokenizer"):
        load_tokenizer(config(mute))

    coded = edit(
        bert,
        tmp_path / "coded",
        model_type="mine",
        auto_map={"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.M"},
    )
    (coded / "code.py").write_text("raise SystemExit('the code of the base ran')")
    assert "brings its own code" in message(coded)

    assert "cannot be loaded" in message(bert, AutoModelForImageClassification)


def test_weights_that_do_not_fit_the_config(bert: Path, tmp_path: Path) -> None:
    wide = edit(bert, tmp_path / "wide", intermediate_size=32)
    with pytest.raises(ModelError, match=r"do not fit its config\.json.*intermediate"):
        load_model(AutoModelForSequenceClassification, config(wide), heads=("classifier",))
    other = edit(bert, tmp_path / "other", model_type="distilbert")
    with pytest.raises(ModelError, match=r"do not fit its config\.json"):
        load_model(AutoModelForSequenceClassification, config(other), heads=("classifier",))


def test_a_base_must_be_named() -> None:
    unnamed = Config.from_dict({"task": {"name": "causal-lm"}})
    with pytest.raises(ConfigError, match=r"causal-lm needs a base model"):
        load_tokenizer(unnamed)


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_config, load_tokenizer):
        with pytest.raises(ModelError) as caught:
            load(config("nobody/nothing-at-all"))
        assert caught.value.message == (
            "model.base 'nobody/nothing-at-all' is no local folder, and as a Hub id it cannot be "
            "loaded: the Hub cannot be reached and nothing of it is in the local cache"
        )
        assert caught.value.remedy


def test_head_modules(bert: Path, tmp_path: Path) -> None:
    text, image = AutoModelForSequenceClassification, AutoModelForImageClassification
    llama = save_llama(tmp_path / "llama")
    vit = save_vit(tmp_path / "vit")
    assert head_modules(text, load_config(config(bert))) == ("classifier",)
    assert head_modules(text, load_config(config(llama))) == ("score",)
    assert head_modules(image, load_config(config(vit))) == ("classifier",)
    assert head_modules(text, transformers.DistilBertConfig(n_layers=1)) == (
        "pre_classifier",
        "classifier",
    )
    with pytest.raises(ModelError, match="AutoModelForSequenceClassification for a base of type"):
        head_modules(text, load_config(config(vit)))


def test_an_attention_that_is_not_installed_is_told(bert: Path) -> None:
    chosen = config(bert, attention="flash_attention_2")
    with pytest.raises(ModelError, match=r"attention cannot be used here.*[Ff]lash"):
        structure_of(AutoModelForSequenceClassification, chosen)
    with pytest.raises(ModelError, match=r"cannot be loaded.*[Ff]lash"):
        load_model(AutoModelForSequenceClassification, chosen)


def test_the_attention_is_the_one_that_is_asked_for(bert: Path) -> None:
    chosen = config(bert, attention="eager")
    model: Any = load_model(AutoModelForSequenceClassification, chosen)
    assert model.config._attn_implementation == "eager"


def test_offline_asks_for_local_files_only() -> None:
    asked: dict[str, Any] = {}

    class Fake:
        @staticmethod
        def from_pretrained(source: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
            asked.update(options)
            return nn.Linear(2, 2), {"missing_keys": [], "mismatched_keys": []}

    load_model(Fake, config("owner/name", offline=True))
    assert asked["local_files_only"] is True


def test_a_base_that_is_not_in_the_cache_is_told_at_once_when_offline() -> None:
    with pytest.raises(ModelError, match="nothing of it is in the local cache"):
        load_config(config("nobody/no-such-base", offline=True))
