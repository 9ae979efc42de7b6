"""Rules by name: found by entry point, options checked, what is wrong said."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pytest

from fedgraft import registry as plugins
from fedgraft.errors import ConfigError
from strategies import registry
from strategies.fedavg import FedAvg
from strategies.lora_fair import LoRAFair, LoRAFairCosine, LoRAFairOptions
from strategies.registry import build_rule, rule_class, rule_names


def install(monkeypatch: pytest.MonkeyPatch, name: str, target: str) -> None:
    """Add an entry point, as another package's pyproject.toml would."""
    mine = EntryPoint(name, target, registry.GROUP)

    def found(*, group: str) -> list[EntryPoint]:
        return [*entry_points(group=group), *([mine] if group == registry.GROUP else [])]

    monkeypatch.setattr(registry, "entry_points", found)
    monkeypatch.setattr(plugins, "entry_points", found)


def test_the_three_rules_are_installed():
    assert {"fedavg", "ffa-lora", "lora-fair"} <= set(rule_names())
    assert rule_names() == sorted(rule_names())


@pytest.mark.parametrize("name", rule_names())
def test_every_rule_is_what_it_is_called_and_cites_its_paper(name: str):
    cls = rule_class(name)
    assert cls.name == name and cls.title
    assert "arXiv:" in cls.citation
    assert "arxiv.org/abs/" in (sys.modules[cls.__module__].__doc__ or "")
    assert isinstance(build_rule(name), cls)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("fedavgg", "fedavg"), ("ffa_lora", "ffa-lora"), ("lora_fair", "lora-fair")],
)
def test_an_unknown_rule_is_refused_with_the_nearest(wrong: str, nearest: str):
    with pytest.raises(ConfigError, match=f"strategy.name is '{wrong}'") as caught:
        build_rule(wrong)
    assert caught.value.remedy.startswith(f"Did you mean {nearest}? Installed: ")


def test_a_rule_like_no_other_lists_all():
    with pytest.raises(ConfigError) as caught:
        build_rule("xyz")
    assert caught.value.remedy.startswith(f"Installed: {', '.join(rule_names())}")


def test_options_reach_the_rule():
    rule = build_rule("lora-fair", {"lambda": 0.25})
    assert isinstance(rule, LoRAFair) and isinstance(rule.options, LoRAFairOptions)
    assert rule.options.lambda_ == 0.25
    assert isinstance(build_rule("lora-fair", {"objective": "cosine"}), LoRAFairCosine)
    assert build_rule("lora-fair").options == LoRAFairOptions()


@pytest.mark.parametrize(
    ("name", "options", "said", "remedy"),
    [
        (
            "lora-fair",
            {"lamda": 1.0},
            "unknown config key strategy.lamda",
            "Did you mean strategy.lambda?",
        ),
        ("fedavg", {"lambda": 1.0}, "unknown config key strategy.lambda", "strategy.server-"),
        ("lora-fair", {"lambda": -1.0}, "config key strategy.lambda is -1.0", "--set strategy.lam"),
        ("lora-fair", {"lambda": "much"}, "strategy.lambda is 'much'", "--set strategy.lambda"),
        ("lora-fair", {"lambda": True}, "strategy.lambda is True", "--set strategy.lambda"),
        ("lora-fair", {"objective": "sine"}, "strategy.objective is 'sine'", "--set"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], said: str, remedy: str):
    with pytest.raises(ConfigError) as caught:
        build_rule(name, options)
    assert said in caught.value.message and remedy in caught.value.remedy
    assert caught.value.exit_status == 2


def test_a_rule_of_another_package_is_found(monkeypatch: pytest.MonkeyPatch):
    install(monkeypatch, "mine", "strategies.fedavg:FedAvg")
    assert "mine" in rule_names() and isinstance(build_rule("mine"), FedAvg)


def test_an_entry_point_that_is_no_rule_is_refused(monkeypatch: pytest.MonkeyPatch):
    install(monkeypatch, "odd", "strategies.fedavg:MEANS")
    with pytest.raises(ConfigError, match=r"the entry point 'odd' of fedgraft\.rules is .* not a"):
        build_rule("odd")
