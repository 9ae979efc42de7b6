"""What several rules cannot honour in a config, and how they say so."""

from __future__ import annotations

from fedgraft.config import Config
from fedgraft.errors import ConfigError


def refuse_kept_optimizer(config: Config, rule: str, why: str) -> None:
    """Refuse `train.optimizer-state = "keep"` under a rule whose factors do not keep their meaning.

    Args:
        config: the run's.
        rule: the rule's name.
        why: what becomes of the factors between two rounds of a client.

    Raises:
        ConfigError: the config keeps the optimizer's state.
    """
    if config.train.optimizer_state == "keep":
        raise ConfigError(
            f'train.optimizer-state is "keep", and under {rule} {why}: the moments kept would be '
            "those of other numbers",
            'Set it to "reset", or use fedavg, ffa-lora or lora-fair.',
        )


def refuse_init(config: Config, rule: str, why: str) -> None:
    """Refuse any `adapter.init` but the default under a rule that does not go on from it.

    Args:
        config: the run's.
        rule: the rule's name.
        why: what the rule does with the first factors.

    Raises:
        ConfigError: the config sets adapter.init.
    """
    if config.adapter.init != "default":
        raise ConfigError(
            f'adapter.init is "{config.adapter.init}", and {rule} {why}: nothing would be left of '
            "it",
            "Leave adapter.init out, or use fedavg, fedex-lora or lora-fair.",
        )


def refuse_lr_ratio(config: Config, rule: str, why: str) -> None:
    """Refuse `train.lr-ratio` under a rule for which B's rate over A's says nothing.

    Args:
        config: the run's.
        rule: the rule's name.
        why: what of A and B the rule trains, and how.

    Raises:
        ConfigError: the config sets train.lr-ratio.
    """
    if config.train.lr_ratio != 1.0:
        raise ConfigError(
            f"train.lr-ratio is {config.train.lr_ratio:g}, the learning rate of B over that of A, "
            f"and {rule} {why}",
            "Leave it out and set train.lr, or use fedavg, lora-fair or rolora.",
        )
