"""Which rule takes which adapter: refused beforehand, with the names of rules that do."""

from __future__ import annotations

from typing import Any

import pytest

from fedgraft.config import Config
from fedgraft.errors import ConfigError
from strategies.fitness import check_rule
from strategies.registry import build_rule, rule_class, rule_names

STARTS = ["orthogonal", "pissa", "olora"]


def check(name: str, settings: dict[str, Any]) -> None:
    config = Config().with_overrides({"strategy.name": name} | settings)
    check_rule(build_rule(name, config.strategy.options), config)


def refused_by(settings: dict[str, Any]) -> set[str]:
    """The rules that refuse settings which they take without these."""
    found = set()
    for name in rule_names():
        own = {"train.optimizer": "sgd", "train.grad-clip": 0.0} if name == "scaffold" else {}
        check(name, own)
        try:
            check(name, own | settings)
        except ConfigError:
            found.add(name)
    return found


def test_who_refuses_what() -> None:
    assert refused_by({"adapter.type": "dora"}) == {"flora", "fedex-lora"}
    assert refused_by({"adapter.type": "rslora"}) == set()
    assert refused_by({"adapter.init": "gaussian"}) == {"flora", "fed-sb"}
    for init in ("pissa", "olora"):
        assert refused_by({"adapter.init": init}) == {"flora", "fed-sb", "hetlora"}
    halves = {"flora", "fed-sb", "hetlora", "ffa-lora"}
    assert refused_by({"adapter.init": "orthogonal"}) == halves
    assert refused_by({"adapter.rank-pattern": {"q_proj": 4}}) == {"hetlora"}
    assert refused_by({"adapter.alpha-pattern": {"q_proj": 4.0}}) == {"hetlora"}
    ratio = {"ffa-lora", "fedsvd", "fed-sb", "lora-a2", "scaffold"}
    assert refused_by({"train.lr-ratio": 4.0}) == ratio
    poisson = {"federation.sampling": "poisson", "federation.fraction": 0.4}
    opening = {"fed-sb", "fedsa-lora", "rolora", "lora-a2"}  # of whom round 1 may have nobody
    assert refused_by(poisson) - {"krum", "multi-krum", "trimmed-mean"} == opening
    assert not refused_by(poisson | {"federation.fraction": 1.0})
    under = {"strategy.under": "rolora", "train.optimizer": "sgd", "train.grad-clip": 0.0}
    with pytest.raises(ConfigError, match="round 1 may have no client"):
        check("scaffold", under | poisson)


@pytest.mark.parametrize("name", rule_names())
def test_nothing_stands_outside_doras_norm(name: str) -> None:
    able = rule_class(name).capabilities
    assert able.dora != able.base_residual


@pytest.mark.parametrize(
    ("name", "settings", "message", "remedy"),
    [
        ("flora", {"adapter.type": "dora"}, "outside the norm", "or use one of coordinate-median"),
        (
            "hetlora",
            {"adapter.init": "pissa"},
            "first B is not zero",
            "fedavgm, fedex-lora",
        ),
        (
            "flexlora",
            {"adapter.init": "olora", "federation.ranks": [8] * 6},
            "federation.ranks would cut it",
            "Leave federation.ranks out",
        ),
        (
            "flexlora",
            {"adapter.alpha-pattern": {"q": 1.0}, "federation.ranks": [8] * 6},
            "adapter.alpha-pattern and federation.ranks are both set",
            "Leave one of them out",
        ),
        (
            "fedex-lora",
            {"adapter.init": "pissa", "strategy.energy": 0.99},
            "must take away exactly",
            "Leave both out",
        ),
        (
            "flasc",
            {"adapter.init": "pissa", "strategy.density-down": 0.5},
            "a part of its product only",
            "density-down to 1",
        ),
        (
            "lora-a2",
            {"train.lr-ratio": 4.0},
            "train.lr-ratio is 4, .* a ratio of its own, strategy.lr-ratio",
            "rolora",
        ),
        (
            "scaffold",
            {"train.lr-ratio": 4.0, "train.optimizer": "sgd", "train.grad-clip": 0.0},
            "plain SGD steps, and train.lr-ratio is 4",
            "train.lr-ratio=1",
        ),
    ],
)
def test_refusals_say_why_and_what_to_do(
    name: str, settings: dict[str, Any], message: str, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check(name, settings)
    assert remedy in caught.value.remedy


def test_flasc_and_fedex_take_a_start_whole() -> None:
    for init in STARTS:
        check("flasc", {"adapter.init": init})
        check("fedex-lora", {"adapter.init": init})
    check("fedex-lora", {"adapter.init": "orthogonal", "strategy.energy": 0.99})


EXAMPLE = {"privacy.mode": "example", "privacy.noise-multiplier": 1.0}


def test_which_rules_keep_to_one_private_training() -> None:
    assert refused_by(EXAMPLE) == {"fed-sb", "lora-a2", "fedsa-lora"}
    with pytest.raises(ConfigError, match=r"clients of fed-sb look at their data") as caught:
        check("fed-sb", EXAMPLE)
    named = caught.value.remedy.removeprefix("Use one of ").removesuffix(".").split(", ")
    assert set(named) == set(rule_names()) - {"fed-sb", "lora-a2", "fedsa-lora"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"task.name": "causal-lm", "train.packing": True}, "train.packing lays several examples"),
        ({"adapter.type": "dora"}, "gradient of the magnitudes"),
        ({"model.dtype": "float16"}, "leave the range of model.dtype float16"),
    ],
)
def test_what_no_example_can_be_clipped_in(settings: dict[str, Any], words: str) -> None:
    check("fedavg", settings)
    with pytest.raises(ConfigError, match=words):
        check("fedavg", settings | EXAMPLE)
