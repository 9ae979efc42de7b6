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
