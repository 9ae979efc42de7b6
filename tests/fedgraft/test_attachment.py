"""Which layers LoRA goes to, and each one's rank and alpha."""

from __future__ import annotations

import pytest

from fedgraft.attachment import attach, peft_scalings
from fedgraft.errors import ConfigError, ModelError
from fedgraft.resident_model import ResidentModel
from fedgraft.tasks.task import Task

PREFIX = "base_model.model.vit.layers."


def build(task: Task, **settings: object) -> ResidentModel:
    keys = {f"adapter.{name.replace('_', '-')}": value for name, value in settings.items()}
    return ResidentModel(task, task.config.with_overrides(keys))


def test_an_expression_chooses_by_whole_names(digits: Task):
    model = build(digits, targets=r".*layers\.1\.attention\.(q|v)_proj")
    assert list(model.ranks) == [f"{PREFIX}1.attention.{p}_proj" for p in "qv"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_proj", "no whole name of a module matches"),
        (r".*\.query", "no whole name of a module matches"),
        ("(", "no regular expression: missing"),
        (r".*attention", "a ViTAttention with layers inside"),
        (".*", "matches 'the whole base'"),
        ([], "an empty list"),
    ],
)
def test_targets_that_cannot_be_are_refused_with_the_layers_there(
    targets: object, message: str, digits: Task
):
    with pytest.raises(ModelError, match=message) as caught:
        build(digits, targets=targets)
    assert "Linear modules here: fc1, fc2, k_proj, o_proj, q_proj, v_proj" in caught.value.remedy


@pytest.mark.parametrize(
    ("kind", "scalings"), [("lora", (2, 4, 0.5)), ("rslora", (5.6569, 8, 1.4142))]
)
def test_layers_have_ranks_and_scalings_of_their_own(
    kind: str, scalings: tuple[float, ...], digits: Task
):
    """alpha / r = 16 / 8, 16 / 4 and 4 / 8; over the roots for rsLoRA."""
    model = build(
        digits, type=kind, rank_pattern={r"layers\.0\..*q_proj": 4}, alpha_pattern={"k_proj": 4.0}
    )
    plain, q, k = (f"{PREFIX}0.attention.{name}_proj" for name in "vqk")
    assert [model.ranks[name] for name in (plain, q, k)] == [8, 4, 8]
    assert model.ranks[q.replace("layers.0", "layers.1")] == 8
    found = [model.scaling[name] for name in (plain, q, k)]
    assert found == pytest.approx(scalings, abs=1e-4)
    start = model.initial_adapter(0)
    assert start.layers[q].A.shape == (4, 64) and start.scalings == model.scaling
    # the same from the settings that PEFT writes
    assert peft_scalings(model.peft_config(), model.ranks) == pytest.approx(model.scaling)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"query": 4}}, "adapter.rank-pattern has 'query', and no layer"),
        ({"alpha_pattern": {"q_proj": 1.0, "0.attention.q_proj": 2.0}}, "is left for it to match"),
        ({"alpha_pattern": {"(": 1.0}}, "adapter.alpha-pattern has .* no regular expression"),
        (
            {"rank_pattern": {"k_proj": 65}},
            "adapter.rank-pattern is 65, and the weight of .*k_proj",
        ),
    ],
)
def test_patterns_that_cannot_be_are_refused(
    settings: dict[str, object], message: str, digits: Task
):
    with pytest.raises(ConfigError, match=message):
        build(digits, **settings)


def test_dora_on_int8_on_the_cpu_is_refused(digits: Task, monkeypatch: pytest.MonkeyPatch):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = digits.load_base()
    name, plain = next((n, m) for n, m in base.named_modules() if n.endswith("q_proj"))
    layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
    base.set_submodule(name, layer.to("cpu"))
    config = digits.config.with_overrides({"adapter.type": "dora"})
    with pytest.raises(ConfigError, match="q_proj is an INT8 layer on the CPU"):
        attach(base, digits, config)
