"""Whether a rule can honour a config: asked before anything runs."""

from __future__ import annotations

from fedgraft.config import Config
from fedgraft.errors import ConfigError
from strategies.ranks import check_ranks
from strategies.registry import able
from strategies.rule import Rule


def check_rule(rule: Rule, config: Config) -> None:
    """Refuse a config that the rule can't honour, naming rules that can.

    Raises:
        ConfigError: what in the config does not go with this rule.
    """
    federation = config.federation
    if federation.ranks is not None:
        check_mixed_ranks(rule, "federation.ranks")
        if not isinstance(federation.ranks, str):
            check_ranks(federation.ranks, federation.clients, config.adapter.rank)
    rule.check(config)


def check_mixed_ranks(rule: Rule, setting: str) -> None:
    """Refuse clients of different ranks under a rule that needs one, naming rules that do not.

    Raises:
        ConfigError: the rule needs all clients to have one rank.
    """
    if not rule.capabilities.mixed_ranks:
        raise ConfigError(
            f"{setting} is set, and {rule.name} needs all clients to have one rank",
            f"Leave it out, or use one of {able('mixed_ranks')}.",
        )
