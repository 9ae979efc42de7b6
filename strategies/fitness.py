"""Whether a rule can honour a config: asked before anything runs."""

from __future__ import annotations

from dataclasses import asdict

from fedgraft.config import Config
from fedgraft.errors import ConfigError
from strategies.ranks import check_ranks
from strategies.registry import rule_class, rule_names
from strategies.rule import Rule


def check_rule(rule: Rule, config: Config) -> None:
    """Refuse a config that the rule can't honour, naming rules that can.

    Raises:
        ConfigError: what in the config does not go with this rule.
    """
    federation = config.federation
    if federation.ranks is not None:
        if not rule.capabilities.mixed_ranks:
            raise ConfigError(
                f"federation.ranks is set, and {rule.name} needs all clients to have one rank",
                f"Leave it out, or use one of {able('mixed_ranks')}.",
            )
        if not isinstance(federation.ranks, str):
            check_ranks(federation.ranks, federation.clients, config.adapter.rank)
    rule.check(config)


def able(capability: str) -> str:
    """Return the names of all installed rules with a capability, for a remedy."""
    classes = {name: rule_class(name) for name in rule_names()}
    return ", ".join(n for n, cls in classes.items() if asdict(cls.capabilities)[capability])
