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
    check_privacy(rule, config)
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


def check_privacy(rule: Rule, config: Config) -> None:
    """Refuse what a guarantee for every example could not cover; a client asks this itself, too.

    Whatever else a rule does on a client (rotations, sparse updates, control variates), it does to
    what DP-SGD made, and so does everything on the server: that is post-processing.

    Raises:
        ConfigError: names what works.
    """
    if config.privacy.mode != "example":
        return
    mode = 'privacy.mode is "example"'
    if rule.capabilities.personal:
        raise ConfigError(
            f"{mode}, and what {rule.name} leaves on the clients is judged by metrics of their own "
            "data, which have no noise",
            f"Use one of {_trains_privately()}.",
        )
    if not rule.capabilities.one_training:
        raise ConfigError(
            f"{mode}, and clients of {rule.name} look at their data beside one training a round",
            f"Use one of {_trains_privately()}.",
        )
    if config.train.packing:
        raise ConfigError(
            f"{mode}, and train.packing lays several examples into one sequence",
            "Set train.packing to false.",
        )
    if config.adapter.type == "dora":
        raise ConfigError(
            f'{mode}, and no example\'s own gradient of the magnitudes of adapter.type "dora" is '
            "known",
            'Set adapter.type to "lora" or "rslora".',
        )
    if config.model.dtype == "float16":
        raise ConfigError(
            f"{mode}, and gradients of single examples leave the range of model.dtype float16",
            'Set model.dtype to "bfloat16" or "float32".',
        )


def _trains_privately() -> str:
    personal = able("personal").split(", ")
    return ", ".join(name for name in able("one_training").split(", ") if name not in personal)


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
