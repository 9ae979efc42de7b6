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
    _check_adapter(rule, config)
    rule.check(config)


def _check_adapter(rule: Rule, config: Config) -> None:
    """Refuse an adapter that the rule would aggregate wrongly.

    Raises:
        ConfigError: its type, its start, or ranks and alphas that differ by layer.
    """
    adapter, ranks = config.adapter, config.federation.ranks
    if adapter.type == "dora" and not rule.capabilities.dora:
        raise ConfigError(
            f'adapter.type is "dora", and what {rule.name} adds to the base would stand outside '
            "the norm that its magnitudes scale",
            f'Set adapter.type to "lora" or "rslora", or use one of {able("dora")}.',
        )
    if adapter.init not in ("default", "gaussian"):
        found = f'adapter.init is "{adapter.init}", whose first B is not zero'
        if not rule.capabilities.any_start:
            raise ConfigError(
                f"{found}, and {rule.name} would not keep that start whole",
                f'Set adapter.init to "default", or use one of {able("any_start")}.',
            )
        if ranks is not None:
            raise ConfigError(
                f"{found}, and federation.ranks would cut it",
                'Leave federation.ranks out, or set adapter.init to "default" or "gaussian".',
            )
    if adapter.patterned:
        found = "adapter.rank-pattern" if adapter.rank_pattern else "adapter.alpha-pattern"
        if ranks is not None:
            raise ConfigError(
                f"{found} and federation.ranks are both set: ranks go by layer or by client",
                "Leave one of them out.",
            )
        if rule.prunes:
            raise ConfigError(
                f"{found} is set, and clients of {rule.name} lower one rank that all layers have",
                f"Leave {found} out, or use fedavg or flexlora.",
            )


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
