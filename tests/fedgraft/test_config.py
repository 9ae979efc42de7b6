"""One typed config: from a file, from --set and over the wire, strict about keys and types."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedgraft.config import RUN_CONFIG_KEY, Config, known_keys
from fedgraft.config_errors import config_error
from fedgraft.errors import ConfigError
from fedgraft.settings import flatten, parse_settings, parse_value, read_toml


def complaint(tree: dict[str, Any], **options: str) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(tree, **options)
    assert caught.value.exit_status == 2
    return str(caught.value)


# Keys


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("federation.cliens", "federation.clients"),
        ("federation.min_client", "federation.min-clients"),
        ("train.lrr", "train.lr"),
        ("adapter.alfa", "adapter.alpha"),
        ("thread", "threads"),
        ("clients", "federation.clients"),  # the group forgotten
        ("federation.lr", "train.lr"),  # the wrong group
        ("federtion.rounds", "federation.rounds"),  # a group that is none
        ("evaluation.every", "evaluate.every"),
        ("train.learning-rate", "train.lr"),  # other programs' words
        ("train.learning_rate", "train.lr"),
        ("learning-rate", "train.lr"),
        ("adapter.lora_alpha", "adapter.alpha"),
        ("adapter.r", "adapter.rank"),
        ("federtion.round", "federation.rounds"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(key: str, nearest: str):
    said = complaint({key: 3})
    assert said == f"unknown config key {key}\nDid you mean {nearest}?"


def test_an_unknown_key_like_no_other_lists_all():
    said = complaint({"xyzzyq": 1})
    assert "Known keys: task.name" in said and "compare" in said
    assert "Known keys: track.tensorboard." in complaint({"track.wandb": True})  # of its group


def test_the_file_is_named():
    assert complaint({"federation": {"roundz": 1}}, source="my.toml").startswith(
        "unknown config key federation.roundz in my.toml\n"
    )
    assert complaint({"seed": -1}, source="my.toml").startswith("config key seed in my.toml is -1")


@pytest.mark.parametrize("wrong", ["5", 5.5, 5.0, True, [5], {"a": 1}])
def test_whole_numbers_are_whole_numbers(wrong: object):
    said = complaint({"federation.rounds": wrong})
    assert said.startswith(f"config key federation.rounds is {wrong!r}: input should be a valid")
    assert said.endswith("or with --set federation.rounds=...")


@pytest.mark.parametrize("wrong", ["0.1", True, [0.1], float("nan"), float("inf")])
def test_numbers_are_numbers(wrong: object):
    assert complaint({"train.lr": wrong}).startswith(f"config key train.lr is {wrong!r}: input")


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("evaluate.clients", 1),
        ("evaluate.clients", "yes"),
        ("track.tensorboard", 0),
        ("task.name", 3),
        ("adapter.targets", ["q_proj", 3]),
        ("train.optimizer", "adam"),
        ("federation.partition", "Dirichlet"),
        ("model.dtype", "float64"),
        ("compare", 3),
        ("compare.ffa-lora", 3),
    ],
)
def test_other_wrong_types_name_key_and_value(key: str, wrong: object):
    said = complaint({key: wrong})
    assert said.startswith(f"config key {key} is {wrong if wrong != ['q_proj', 3] else 3!r}: ")


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("adapter.rank", 0),
        ("adapter.rank", -8),
        ("adapter.alpha", 0.0),
        ("adapter.dropout", 1.0),
        ("federation.clients", 0),
        ("federation.fraction", 0.0),
        ("federation.fraction", 1.5),
        ("federation.deadline", 0),
        ("train.batch-size", 0),
        ("train.micro-batch", 0),
        ("train.lr", 0.0),
        ("train.epochs", 0.0),
        ("train.momentum", 1.0),
        ("train.grad-clip", -1.0),
        ("train.proximal-mu", -0.1),
        ("evaluate.every", 0),
        ("evaluate.fraction", 0.5),
        ("evaluate.patience", 0),
        ("checkpoint.keep", 0),
        ("threads", 0),
        ("seed", -1),
    ],
)
def test_values_out_of_range_are_refused(key: str, wrong: float):
    assert complaint({key: wrong}).startswith(f"config key {key} is {wrong!r}: input should be ")


def test_a_value_where_a_group_belongs():
    said = complaint({"strategy": "fedavg"})
    assert said.startswith("config key strategy is 'fedavg', but it is a group of keys\n")
    assert said.endswith("Set one of strategy.name.")
    with pytest.raises(ConfigError, match="seed is not a group of keys"):
        Config().with_overrides({"seed.x": 1})


def test_contradictions_are_refused():
    said = complaint({"federation.clients": 2, "federation.min-clients": 3})
    assert "federation.min-clients is 3, more than federation.clients (2)" in said
    said = complaint({"train.steps": 3, "train.epochs": 1.0})
    assert "train.steps and train.epochs exclude each other" in said


def test_one_key_in_two_spellings_is_refused():
    # With neither refused one of the two values would be dropped without a word.
    assert "federation.min_clients" in complaint(
        {"federation.min_clients": 2, "federation.min-clients": 1}
    )


def test_options_of_a_rule_are_kept_for_the_rule_to_check():
    config = Config.from_dict({"strategy": {"name": "lora-fair", "lambda": 0.5}})
    assert config.strategy.options == {"lambda": 0.5}
    assert Config.from_dict(config.to_dict()).strategy.options == {"lambda": 0.5}
    assert Config().strategy.options == {}


def test_a_config_is_frozen():
    with pytest.raises(ValidationError):
        Config().train.lr = 1.0  # type: ignore[misc]


# Values that follow from others


def test_adapters_that_contradict_themselves_are_refused():
    for settings, message in (
        ({"adapter.init": "pissa", "adapter.from": "x"}, "names an adapter to start from"),
        ({"adapter.init": "olora", "adapter.type": "dora"}, "the norm of adapter.type"),
        ({"adapter.init": "pissa", "adapter.dropout": 0.1}, "adapter.dropout 0.1 would drop it"),
        ({"adapter.init": "orthogonal", "adapter.rank": 3}, "even ranks, and one is 3"),
        ({"adapter.init": "orthogonal", "adapter.rank-pattern": {"q": 5}}, "and one is 5"),
        ({"adapter.targets": 3}, 'adapter.targets is 3, and may be "all-linear", a list of names'),
        ({"adapter.rank-pattern": {"q": 0}}, "adapter.rank-pattern.q is 0: input should be"),
        ({"adapter.type": "ia3"}, "'ia3': input should be 'lora', 'rslora' or 'dora'"),
        ({"adapter.type": "vera"}, "'vera': input should be 'lora', 'rslora' or 'dora'"),
        ({"adapter.init": "loftq"}, "'default', 'gaussian', 'orthogonal', 'pissa' or 'olora'"),
        ({"adapter.init": "eva"}, "'default', 'gaussian', 'orthogonal', 'pissa' or 'olora'"),
        ({"train.lr-ratio": 0.0}, "train.lr-ratio is 0.0"),
    ):
        assert message in complaint(settings)


def test_names_with_dots_stay_whole(tmp_path: Path):
    pattern = {"layers.0.q_proj": 4, "v_proj": 2}
    config = Config().with_overrides({"adapter.rank-pattern": pattern})
    own = {"adapter": {"rank-pattern": pattern}}
    config = config.with_overrides({"compare": {"ffa-lora": own}})
    (tmp_path / "config.toml").write_text(config.to_toml())
    for again in (
        Config.load(tmp_path / "config.toml"),
        Config.from_dict(flatten(config.to_dict())),
        Config.load(settings=['adapter.rank-pattern={"layers.0.q_proj" = 4, v_proj = 2}']),
    ):
        assert again.adapter.rank_pattern == pattern and again.adapter.patterned
    assert Config.load(tmp_path / "config.toml").compare == {"ffa-lora": own}
    assert flatten(own) == {"adapter.rank-pattern": pattern}


def test_scaling():
    assert Config().adapter.scaling == 2.0
    rslora = Config().with_overrides({"adapter.type": "rslora", "adapter.rank": 4})
    assert rslora.adapter.scaling == 8.0


@pytest.mark.parametrize(
    ("settings", "examples", "steps"),
    [
        ({}, 1000, 5),
        ({"train.steps": 7}, 1000, 7),
        ({"train.epochs": 1.0, "train.batch-size": 25}, 130, 5),
        ({"train.epochs": 2.0, "train.batch-size": 25}, 130, 10),
        ({"train.epochs": 0.1, "train.batch-size": 25}, 30, 1),  # at least one
    ],
)
def test_steps_of_a_round(settings: dict[str, Any], examples: int, steps: int):
    assert Config().with_overrides(settings).train.steps_for(examples) == steps


# There and back


FULL: dict[str, Any] = {
    "task.data": 'a "quoted"\npath\\with everything',
    "adapter.targets": ["q_proj", "v_proj"],
    "adapter.from": "runs/a/adapter",
    "train.lr": 1e-7,
    "train.epochs": 0.1,
    "strategy.name": "lora-fair",
    "strategy.lambda": 0.3,
    "evaluate.patience": 4,
    "threads": 2,
    "seed": 2**40,
    "compare.ffa-lora.train.lr": 0.016,
}


@pytest.mark.parametrize("settings", [{}, FULL], ids=["defaults", "everything"])
def test_toml_json_and_dicts_give_the_config_back(settings: dict[str, Any], tmp_path: Path):
    config = Config().with_overrides(settings)
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml())
    assert Config.load(file) == config
    assert Config.from_dict(json.loads(config.to_json())) == config
    assert Config.from_dict(flatten(config.to_dict())) == config
    assert config.to_json() == Config.from_dict(config.to_dict()).to_json()


def test_every_key_can_be_set_to_its_own_default():
    defaults = flatten(Config().to_dict())
    unset = set(known_keys()) - set(defaults) - {"compare"}
    assert {"task.data", "adapter.from", "train.steps", "threads"} <= unset
    for key, value in defaults.items():
        assert key in known_keys()
        assert Config().with_overrides({key: value}) == Config()
    for key in unset:
        assert Config().with_overrides({key: None}) == Config()


def test_overrides_replace_what_they_name_and_are_checked_anew():
    config = Config().with_overrides(FULL)
    changed = config.with_overrides({"train.lr": 0.5, "train.epochs": None, "train.steps": 2})
    assert (changed.train.lr, changed.train.epochs, changed.train.steps) == (0.5, None, 2)
    assert changed.strategy == config.strategy and config.train.lr == 1e-7
    with pytest.raises(ConfigError, match=r"Did you mean train\.lr\?"):
        config.with_overrides({"train.ler": 1.0})
    with pytest.raises(ConfigError, match="exclude each other"):
        config.with_overrides({"train.steps": 2})


def test_a_key_may_be_written_with_underscores_in_python():
    config = Config.from_dict({"federation": {"min_clients": 2}})
    assert config.federation.min_clients == 2
    assert config.to_dict()["federation"]["min-clients"] == 2


def test_dotted_and_nested_keys_mix_in_any_order():
    nested = {"train": {"lr": 0.1}, "train.steps": 3}
    dotted = {"train.steps": 3, "train": {"lr": 0.1}}
    for tree in (nested, dotted):
        config = Config.from_dict(tree)
        assert (config.train.lr, config.train.steps) == (0.1, 3)
    assert nested == {"train": {"lr": 0.1}, "train.steps": 3}  # and is left as it was


# Files and --set


def test_settings_come_on_top_of_the_file(tmp_path: Path):
    file = tmp_path / "c.toml"
    file.write_text("seed = 4\n[train]\nlr = 0.1\nsteps = 9\n")
    config = Config.load(file, ["train.lr=0.2", "strategy.name=ffa-lora"])
    assert (config.seed, config.train.lr, config.train.steps) == (4, 0.2, 9)
    assert config.strategy.name == "ffa-lora"
    assert Config.load() == Config() and Config.load(None, ["seed=3"]).seed == 3


def test_a_runs_own_config_is_a_config(tmp_path: Path):
    file = tmp_path / "config.toml"
    file.write_text(Config().to_toml() + '[run]\nlineage = "x"\n[versions]\ntorch = "2"\n')
    assert Config.load(file) == Config()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-1", -1),
        ("1e-3", 1e-3),
        ("true", True),
        ("fedavg", "fedavg"),
        ('"5"', "5"),
        ('["q", "v"]', ["q", "v"]),
        ("all-linear", "all-linear"),
        ("/a/b c", "/a/b c"),
        ("", ""),
        ("1\nseed = 2", "1\nseed = 2"),  # a line break starts no second key
        ("Question: {question}\nAnswer:", "Question: {question}\nAnswer:"),
    ],
)
def test_values_are_toml_or_text(text: str, value: object):
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


def test_settings_are_split_at_the_first_equals_sign():
    found = parse_settings(["a.b = 1", "task.template=x={y}", "train.lr=0.1", "train.lr=0.2"])
    assert found == {"a.b": 1, "task.template": "x={y}", "train.lr": 0.2}


@pytest.mark.parametrize("setting", ["train.lr", "=3", " = 3", ""])
def test_a_setting_without_key_or_value_is_refused(setting: str):
    with pytest.raises(ConfigError, match=r"--set .* is not key=value"):
        parse_settings([setting])


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ConfigError, match="there is no config file"):
        Config.load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="is a folder, not a config file"):
        Config.load(tmp_path)
    bad = tmp_path / "bad.toml"
    bad.write_text("[train]\nlr = \n")
    with pytest.raises(ConfigError, match=r"not valid TOML.*line 2"):
        read_toml(bad)
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_toml(bad)


# Over the wire


def test_the_run_config_holds_json():
    config = Config().with_overrides(FULL)
    assert Config.from_run_config({RUN_CONFIG_KEY: config.to_json(), "fedgraft.out": "x"}) == config


def test_the_run_config_holds_scalar_keys():
    # What `flwr run .` gives a ServerApp: [tool.flwr.app.config] flattened to dotted keys.
    table = tomllib.loads(
        """
        [tool.flwr.app.config]
        federation.rounds = 3
        train.lr = 0.1
        strategy.name = "lora-fair"
        strategy.lambda = 1.0
        evaluate.clients = false
        fedgraft.out = "runs/x"
        """
    )
    run_config = flatten(table["tool"]["flwr"]["app"]["config"])
    config = Config.from_run_config(run_config)
    assert (config.federation.rounds, config.train.lr) == (3, 0.1)
    assert config.strategy.options == {"lambda": 1.0} and not config.evaluate.clients
    assert Config.from_run_config({}) == Config()
    with pytest.raises(ConfigError, match=re.escape("in [tool.flwr.app.config]")):
        Config.from_run_config({"train.lrr": 1})


def test_a_rules_options_complain_in_the_same_words():
    try:
        Config.model_validate({"train": {"lr": "x"}})
    except ValidationError as error:
        said = config_error(error, ["strategy.lambda"], prefix="strategy.")
    assert str(said).startswith("config key strategy.train.lr is 'x'")
