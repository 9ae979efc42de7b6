"""Find rules by name: the entry points of the group `fedgraft.rules`.

Another package adds a rule with one file and one line in its pyproject.toml:
`[project.entry-points."fedgraft.rules"]`, `my-rule = "my_package.my_rule:MyRule"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError

from fedgraft.config_errors import config_error
from fedgraft.errors import ConfigError
from fedgraft.registry import load_plugin
from strategies.options import SETTINGS_OF, SteppedOptions
from strategies.rule import Rule

GROUP = "fedgraft.rules"


def rule_names() -> list[str]:
    """Return the names of all installed rules, sorted."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def rule_class(name: str) -> type[Rule]:
    """Return a rule's class.

    Raises:
        ConfigError: no installed rule has that name; the nearest one is suggested.
    """
    if name == "fedprox" and name not in rule_names():
        raise ConfigError(
            "strategy.name is 'fedprox', which is no rule of its own",
            "Set train.proximal-mu, which adds FedProx's term under any rule: FedProx is fedavg "
            "with it.",
        )
    loaded = load_plugin(GROUP, name, key="strategy.name")
    if not (isinstance(loaded, type) and issubclass(loaded, Rule)):
        raise ConfigError(
            f"the entry point {name!r} of {GROUP} is {loaded!r}, not a Rule",
            "Let it name a subclass of strategies.rule.Rule.",
        )
    return loaded


def option_names(name: str) -> list[str]:
    """Return the options that a rule knows, as they are written after `strategy.`.

    Raises:
        ConfigError: no installed rule has that name.
    """
    return [f.alias or key for key, f in rule_class(name).Options.model_fields.items()]


def able(capability: str) -> str:
    """Return the names of all installed rules with a capability, for a remedy."""
    classes = {name: rule_class(name) for name in rule_names()}
    return ", ".join(n for n, cls in classes.items() if getattr(cls.capabilities, capability))


def build_rule(name: str, options: Mapping[str, Any] | None = None) -> Rule:
    """Return a rule with its options checked.

    Raises:
        ConfigError: an unknown rule, an unknown option or a value out of range.
    """
    cls = rule_class(name)
    _check_stepped(cls, options or {})
    if options and not cls.Options.model_fields:
        raise ConfigError(
            f"strategy.{next(iter(options))} is set, and {name} has no options", "Leave it out."
        )
    try:
        checked = cls.Options.model_validate(dict(options or {}))
    except ValidationError as error:
        known = [f"strategy.{option}" for option in option_names(name)]
        raise config_error(error, known, prefix="strategy.") from None
    rule = cls.build(checked)
    if isinstance(checked, SteppedOptions):
        rule.server_optimizer = checked.optimizer()
    return rule


def unused_settings(name: str, options: Mapping[str, Any]) -> set[str]:
    """Return the settings of a server optimiser that a rule with these options does not use.

    Args:
        name: the rule's.
        options: without the prefix `strategy.`.
    """
    field = rule_class(name).Options.model_fields.get("server_optimizer")
    stepped = {field.alias or key for key, field in SteppedOptions.model_fields.items()}
    stepped -= {"server-optimizer"}
    if field is None:
        return set()
    kind = str(options.get("server-optimizer", field.default))
    return stepped if kind == "none" else stepped - set(SETTINGS_OF.get(kind, stepped))


def _check_stepped(cls: type[Rule], options: Mapping[str, Any]) -> None:
    """Refuse a server optimiser where none can go on top, and settings that it does not use.

    Raises:
        ConfigError: names the rules that take one, or what to leave out.
    """
    known = {field.alias or key for key, field in cls.Options.model_fields.items()}
    stepped = {field.alias or key for key, field in SteppedOptions.model_fields.items()}
    asked = sorted(stepped & options.keys() - known)
    if asked and not cls.capabilities.server_optimizer:
        raise ConfigError(
            f"strategy.{asked[0]} is set, and {cls.name} takes no server optimiser",
            f"Leave it out, or use one of {able('server_optimizer')}.",
        )
    field = cls.Options.model_fields.get("server_optimizer")
    own = field.default if field else "none"
    # where the optimiser is a choice, a grid over it has settings that one of them does not use
    used = stepped if own == "none" else {"server-optimizer", *SETTINGS_OF.get(own, stepped)}
    unused = sorted(stepped & options.keys() - used)
    if unused:
        raise ConfigError(
            f"strategy.{unused[0]} is set, and {cls.name} does not use it", "Leave it out."
        )
