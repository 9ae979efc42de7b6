from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_llama, save_model, shared
from torch import nn

from client.batch_gradient import backward
from fedgraft.config import Config
from fedgraft.errors import ConfigError
from fedgraft.resident_model import ResidentModel
from fedgraft.tasks.causal_lm import CausalLM
from fedgraft.tasks.packed_attention import packed_scores, way_of
from fedgraft.tasks.packing import IGNORED, best_fit, packed
from fedgraft.tasks.text_classification import TextClassification


def test_best_fit_by_hand() -> None:
    # 7 opens one of 10, 5 another; 4 leaves 1 beside 5, 3 fills the first, and 1 the second
    assert best_fit([3, 5, 1, 7, 4], 10) == [[3, 0], [1, 4, 2]]
    assert best_fit([2, 2, 2], 4) == [[0, 1], [2]]
    assert best_fit([9], 4) == [[0]]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_every_row_is_in_one_sequence_that_holds_it(lengths: list[int]) -> None:
    packs = best_fit(lengths, 20)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    filled = [sum(lengths[row] for row in pack) for pack in packs]
    assert max(filled) <= 20
    # no two sequences would fit into one: what best fit promises
    assert len(filled) < 2 or sum(sorted(filled)[:2]) > 20


def test_a_packed_batch_by_hand() -> None:
    rows = [np.array(row) for row in ([11, 12], [21, 22, 23], [31])]
    labels = [np.array(row) for row in ([11, 12], [IGNORED, IGNORED, 23], [31])]
    batch = packed(rows, labels, pad=7, capacity=4)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[21, 22, 23, 31], [11, 12, 7, 7]],
        "position_ids": [[0, 1, 2, 0], [0, 1, 0, 1]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "labels": [[IGNORED, IGNORED, 23, IGNORED], [IGNORED, 12, IGNORED, IGNORED]],
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def config(base: Path, data: Path, **train: Any) -> Config:
    return Config.from_dict(
        {
            "task": {"name": "causal-lm", "data": str(data), "max-length": 48},
            "model": {"base": str(base), "device": "cpu"},
            "federation": {"clients": 2},
            "train": train,
        }
    )


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    rows = [
        {"question": "how many is one plus two ?", "answer": " ".join(["three"] * (1 + k % 9))}
        for k in range(30)
    ]
    return write(tmp_path / "sums.jsonl", rows)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("loss", ["response", "all"])
def test_packing_equals_no_packing(tmp_path: Path, sums: Path, attention: str, loss: str) -> None:
    """The same terms, loss and gradients, whole or in micro-batches; and one row's own scores."""
    base = save_llama(tmp_path / "llama")
    plain, packing = (
        CausalLM(config(base, sums, packing=on, loss=loss, **{"batch-size": 8}))
        for on in (False, True)
    )
    model = ResidentModel(packing, packing.config)
    model.model.set_attn_implementation(attention)  # type: ignore[operator]
    with torch.no_grad():  # B is zero at the start, and A without a gradient
        for name, parameter in model.parameters.items():
            parameter.add_(0.1 * torch.sin(torch.arange(parameter.numel())).view_as(parameter))
            assert "lora" in name
    indices = np.array([3, 0, 17, 8, 21, 5, 9, 2])
    batches = [task.train().batch(indices) for task in (plain, packing)]
    assert len(batches[1]["input_ids"]) < len(batches[0]["input_ids"]) == 8
    counts = [task.count(b) for task, b in zip((plain, packing), batches, strict=True)]
    assert counts[0] == counts[1] > 0

    found = []
    for task, micro in ((plain, None), (packing, None), (packing, 3)):
        for parameter in model.parameters.values():
            parameter.grad = None
        mean = backward(model, task, task.train(), indices, micro or len(indices))
        found.append((float(mean), [p.grad.clone() for p in model.parameters.values()]))  # type: ignore[union-attr]
    for mean, gradients in found[1:]:
        assert mean == pytest.approx(found[0][0], abs=1e-5)
        largest = max(float(gradient.abs().max()) for gradient in found[0][1])
        for one, other in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * largest)
    measured = [model.evaluate(t, model.adapter(), t.validation()) for t in (plain, packing)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("settings", [{}, {"num_key_value_heads": 1}, {"sliding_window": 3}])
def test_packed_rows_have_the_logits_they_have_alone(
    tmp_path: Path, settings: dict[str, int], checkpointing: bool
) -> None:
    """By the attention of each row alone: with fewer key heads, a sliding window, recomputation."""
    from transformers import AutoModelForCausalLM, MistralConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = MistralConfig(
        **({"num_key_value_heads": 2, "sliding_window": None} | sizes | settings),
        intermediate_size=24,
        vocab_size=40,
        initializer_range=0.5,
    )
    folder = save_model(tmp_path, AutoModelForCausalLM, base)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    rows = [np.arange(4, 4 + length) for length in (7, 4, 5, 9, 2)]
    batch = packed(rows, rows, pad=0, capacity=12)
    scores, labels = packed_scores(model, batch)
    assert way_of(model) == "row by row" and model.training
    assert scores.shape[:2] == labels.shape == (1, 27)
    at, alone = 0, []
    for pack in best_fit([len(row) for row in rows], 12):
        for row in pack:
            alone.append(model(input_ids=torch.tensor(rows[row])[None]).logits[0])
            end = at + len(rows[row])
            torch.testing.assert_close(scores[0, at:end], alone[-1], atol=1e-4, rtol=0)
            at = end
    found = []
    for whole in (scores[0], torch.cat(alone)):
        model.zero_grad()
        whole.sin().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_model_that_packs_takes_padded_batches_as_before(tmp_path: Path, sums: Path) -> None:
    base = save_llama(tmp_path / "llama")
    plain = CausalLM(config(base, sums))
    model, batch = plain.load_base(), plain.train().batch(np.arange(6))
    before = plain.loss(model, batch)
    assert way_of(model) == "row by row"
    torch.testing.assert_close(plain.loss(model, batch), before)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    assert way_of(model) == "masked"


def test_other_architectures_that_pack(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

    gpt2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=64)
    qwen = Qwen2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        vocab_size=40,
    )
    for number, base in enumerate((gpt2, qwen)):
        folder = save_model(tmp_path / str(number), AutoModelForCausalLM, base)
        for attention, way in (("sdpa", "row by row"), ("eager", "masked")):
            model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
            assert way_of(model.eval()) == way


def test_architectures_that_cannot_pack(tmp_path: Path, sums: Path) -> None:
    from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig

    mamba = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=40, state_size=4)
    bloom = BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=40)
    for base, kind in ((mamba, "mamba"), (bloom, "bloom")):
        folder = save_llama(tmp_path / kind)  # for its tokenizer
        save_model(folder, AutoModelForCausalLM, base)
        task = CausalLM(config(folder, sums, packing=True))
        with pytest.raises(ConfigError, match=f"takes positions, and {kind} does not"):
            task.load_base()


def test_a_base_whose_packed_rows_see_each_other_is_refused() -> None:
    class Leaky(nn.Module):
        """Adds up all that came before, whatever the positions say."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.eye(12))

        def forward(self, input_ids: Any, position_ids: Any, use_cache: bool) -> Any:
            scores = self.table[input_ids].cumsum(1)
            return type("Output", (), {"logits": scores})

    with pytest.raises(ConfigError, match="packed rows see each other in a base of type Leaky"):
        way_of(Leaky())


def test_packing_is_for_causal_lm() -> None:
    tree = {"task.name": "text-classification", "train.packing": True}
    with pytest.raises(ConfigError, match=r"train\.packing is true, and examples of task text-"):
        TextClassification(Config.from_dict(tree))


def test_gsm8k_packed_has_the_loss_it_has_padded() -> None:
    base, data = shared("models/stories260K"), shared("data/gsm8k")
    losses = []
    for packing in (False, True):
        settings = config(base, data, packing=packing).with_overrides(
            {"task.max-length": 512, "task.samples": 20}
        )
        task = CausalLM(settings)
        model, batch = task.load_base(), task.train().batch(np.arange(20))
        with torch.no_grad():
            losses.append(task.loss(model, batch).item() / task.count(batch))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
