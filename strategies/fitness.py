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
    _check_sampling(rule, config)
    _check_adapter(rule, config)
    check_privacy(rule, config)
    rule.check(config)


def _check_sampling(rule: Rule, config: Config) -> None:
    """Refuse a first round that may have nobody, where later ones stand on it.

    Under `privacy.mode` client even a round of nobody makes something, of noise.

    Raises:
        ConfigError: the sampling is Poisson's, and the rule's first round has a part of its own.
    """
    poisson = config.federation.sampling == "poisson" and config.federation.fraction < 1.0
    if rule.opens and poisson and config.privacy.mode != "client":
        raise ConfigError(
            f'federation.sampling is "poisson", so round 1 may have no client, and what '
            f"{rule.name} trains in later rounds stands on it",
            'Set federation.sampling to "fixed", or use fedavg or ffa-lora.',
        )


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
    """Refuse what the guarantee of `privacy.mode` could not cover; a client asks this itself, too.

    Raises:
        ConfigError: names what works.
    """
    mode, federation = config.privacy.mode, config.federation
    if mode == "example":
        _check_example_privacy(rule, config)
    elif mode == "local":
        _check_local_privacy(rule)
    elif mode == "client":
        check_client_privacy(rule, mixed_ranks=federation.ranks is not None)
        if federation.sampling == "fixed" and federation.fraction < 1.0:
            raise ConfigError(
                f'privacy.mode is "client", and federation.fraction {federation.fraction:g} with '
                'federation.sampling "fixed" does not sample each client by itself, which the '
                "account of what is spent counts on",
                'Set federation.sampling to "poisson".',
            )


def _check_example_privacy(rule: Rule, config: Config) -> None:
    """Refuse what a guarantee for every example could not cover.

    Whatever else a rule does on a client (rotations, sparse updates, control variates), it does to
    what DP-SGD made, and so does everything on the server: that is post-processing.

    Raises:
        ConfigError: names what works.
    """
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


def _check_local_privacy(rule: Rule) -> None:
    """Refuse a rule that noise on what a client sends does not cover, or that it would spoil.

    Whatever the server makes of the updates is post-processing.

    Raises:
        ConfigError: names what works.
    """
    found = f'privacy.mode is "local", and {rule.name}'
    if rule.capabilities.personal:
        raise ConfigError(
            f"{found} is judged by what clients measure of their own parts, which no noise covers",
            "Use fedavg, or any other rule that leaves nothing on the clients.",
        )
    if not rule.capabilities.noise:
        raise ConfigError(
            f"{found} adds up over rounds what clients send, noise and all, beside what they keep",
            "Use fedavg, ffa-lora, lora-fair or rolora by itself.",
        )
    if rule.prunes:
        raise ConfigError(
            f"{found} lets a client choose its rank by its data, and the size of what it sends "
            "would tell it",
            "Use fedavg or flexlora, which mix ranks that are given.",
        )


def check_client_privacy(rule: Rule, *, mixed_ranks: bool) -> None:
    """Refuse a rule that clipped and noised sums do not make private by client.

    Args:
        rule: the rule, its options set.
        mixed_ranks: the clients' ranks differ.

    Raises:
        ConfigError: the reason, with the rules that work.
    """
    able_rule = rule.capabilities
    remedy = f"Use one of {able('client_privacy')}."
    if not able_rule.client_privacy:
        if not able_rule.sum_only:
            reason = "needs every client's own factors, and noise on a sum covers sums only"
            remedy = (
                f'{remedy[:-1]}; or set privacy.mode to "example" or "local", where clients add '
                "the noise and every rule works on what is private already."
            )
        elif able_rule.personal:
            reason = "is judged by what clients measure of their own parts, which no noise covers"
        else:
            reason = "adds up over rounds what clients send, noise and all, beside what they keep"
        raise ConfigError(f'privacy.mode is "client", and {rule.title} {reason}', remedy)
    if mixed_ranks:
        raise ConfigError(
            'privacy.mode is "client" and federation.ranks is set: which ranks a round holds would '
            "tell who was sampled",
            "Leave federation.ranks out.",
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
