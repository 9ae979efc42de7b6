"""Examples run as they are printed, and example configs are found wherever they lie."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call, records, settings
from tiny_models import save_bert, save_model, save_tokenizer

from fedgraft.adapter import Adapter, LoraLayer
from fedgraft.config import Config
from simulations.plan import Plan
from simulations.simulate import simulate
from strategies.aggregation import aggregate
from strategies.spool import UpdateSpool

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path for path in (ROOT / "examples").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_example_configs_are_valid(path: Path) -> None:
    config = Config.load(path)
    assert Plan(config, ("fedavg", "ffa-lora", "lora-fair"), (0,)).variants()


def test_the_instruct_recipe_runs_on_a_local_base_of_the_same_kind(tmp_path: Path) -> None:
    """Its own keys all but sizes: NF4, bfloat16, checkpointing, the chat's marks, samples."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    base = save_model(
        tmp_path / "base",
        AutoModelForCausalLM,
        Qwen2Config(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            eos_token_id=3,
        ),
    )
    save_tokenizer(base)
    rows = [
        {"instruction": "how many is one plus two ?", "input": "", "output": "three"},
        {"instruction": "say hello", "input": "bye", "output": "hello hello"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows * 30)))
    local = {
        "model.base": str(base),
        "model.device": "cpu",
        "task.data": str(tmp_path / "rows.jsonl"),
        "task.max-length": 64,
        "adapter.rank": 4,
        "federation.clients": 2,
        "federation.rounds": 2,
        "train.steps": 2,
        "evaluate.every": 1,
        "evaluate.max-new-tokens": 4,
        "threads": 1,
    }
    config = Config.load(ROOT / "examples" / "instruct-nf4.toml").with_overrides(local)
    path = simulate(config, tmp_path / "run")
    summary = json.loads((path / "summary.json").read_text())
    assert summary["failed_clients"] == summary["refused_updates"] == 0
    assert summary["validation_best"] < summary["test"]["initial"]["loss"] + 0.5
    samples = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    assert len({sample["prompt"] for sample in samples}) == 2
    assert "NF4" in (path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("variant", ["fedadam", "int8", "nf4"])
def test_the_encoder_recipe_runs_on_a_local_base_of_the_same_kind(
    variant: str, tmp_path: Path
) -> None:
    base = save_bert(tmp_path / "base")
    for split, count in (("train", 80), ("dev", 24)):
        rows = [f"a {'good' if k % 2 else 'bad'} film\t{k % 2}" for k in range(count)]
        (tmp_path / f"{split}.tsv").write_text("\n".join(rows))
    local = {
        "model.base": str(base),
        "model.device": "cpu",
        "task.data": str(tmp_path),
        "federation.clients": 2,
        "federation.rounds": 12,
        "train.lr": 0.05,
        "evaluate.every": 1,
        "evaluate.metric": "loss",  # a base this small is soon better, and not soon right
        "threads": 1,
    }
    config = Config.load(ROOT / "examples" / "minilm-sst2.toml").with_overrides(local)
    (chosen,) = Plan(config, (variant,), (0,)).variants().values()
    path = simulate(chosen, tmp_path / "run")
    summary = json.loads((path / "summary.json").read_text())
    assert summary["failed_clients"] == summary["refused_updates"] == 0
    assert summary["test"]["final"]["loss"] < summary["test"]["initial"]["loss"]


def test_the_strategy_works_in_somebody_elses_flower_app(tmp_path: Path) -> None:
    """Run as a script from another folder; its training loss falls by a third and more."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "flower_app.py")],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    losses = [float(loss) for loss in re.findall(r"mean training loss ([0-9.]+)", done.stdout)]
    assert len(losses) == 5
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert losses[-1] < 2 / 3 * losses[0]


def rule_of_the_documentation(folder: Path) -> Any:
    """Write the page's example as the module that it tells its reader to write."""
    text = (ROOT / "docs" / "extending.md").read_text()
    path = folder / "heavy_ball.py"
    path.write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0])
    spec = importlib.util.spec_from_file_location("heavy_ball", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.HeavyBall


def test_the_rule_of_the_documentation(tmp_path: Path) -> None:
    """One layer, r = 1, d = 2, a client whose factors are always 1: by hand with beta = 0.5.

    From 0 the first step is 1 and leads to 1; the second is 0 + 0.5 * 1 and leads to 1.5.
    """
    documented = rule_of_the_documentation(tmp_path)
    rule = documented(documented.Options(beta=0.5))
    ones = {
        "layer.lora_A.weight": torch.ones(1, 2),
        "layer.lora_B.weight": torch.ones(2, 1),
    }
    spool = UpdateSpool(tmp_path / "spool")
    spool.add("a", 1.0, ones)
    adapter = Adapter({"layer": LoraLayer(torch.zeros(1, 2), torch.zeros(2, 1))})
    state: dict[str, torch.Tensor] = {}
    for round, expected in ((1, 1.0), (2, 1.5)):
        made = aggregate(rule, spool, adapter, state, round)
        adapter, state = made.adapter, made.state
        assert torch.equal(adapter.layers["layer"].A, torch.full((1, 2), expected))
        assert torch.equal(adapter.layers["layer"].B, torch.full((2, 1), expected))


def test_a_rule_of_another_package_is_used_by_name_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed as the page says, by an entry point; a resume finds the rule's own state."""
    rule_of_the_documentation(tmp_path)
    installed = tmp_path / "my_rules-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: my-rules\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        "[fedgraft.rules]\nheavy-ball = heavy_ball:HeavyBall\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("server.session.draw", lambda path: None)  # not the subject here
    monkeypatch.delitem(sys.modules, "heavy_ball", raising=False)
    assert "Heavy ball" in call("strategies").out
    wrong = call("simulate", "--set", "strategy.name=heavy-ball", "--set", "strategy.bta=0.5")
    assert wrong.status == 2 and "Did you mean strategy.beta?" in wrong.err

    adapters = {}
    for beta in (0.0, 0.5):
        chosen = settings(
            strategy__name="heavy-ball", strategy__beta=beta, train__schedule="constant"
        )
        whole, parts = tmp_path / f"whole-{beta}", tmp_path / f"parts-{beta}"
        three = ("--set", "federation.rounds=3")
        assert call("simulate", *chosen, *three, "--out", whole).status == 0
        assert call("simulate", *chosen, "--set", "federation.rounds=1", "--out", parts).status == 0
        assert call("simulate", "--resume", parts, *three).status == 0
        adapters[beta], resumed = (
            (path / "adapter" / "adapter_model.safetensors").read_bytes() for path in (whole, parts)
        )
        assert resumed == adapters[beta] and records(parts) == records(whole)
    assert adapters[0.0] != adapters[0.5]
