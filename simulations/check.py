"""Find what cannot work before anything runs: one place that every simulation goes through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from client.per_example import check_layers
from fedgraft.config import Config
from fedgraft.devices import check_optimizer
from fedgraft.errors import ConfigError
from fedgraft.logs import hushed
from fedgraft.memory_estimate import advice, estimate
from fedgraft.quantization import left_as_they_are
from fedgraft.resident_model import SMALL_MODEL, is_resident, resident_model, resident_task
from fedgraft.tasks.task import Task
from server.export import read_adapter
from strategies.fitness import check_rule
from strategies.registry import build_rule


def check(config: Config, say: Callable[[str], None] = lambda text: None) -> Config:
    """Build rule, task, data and model, and return the config with its threads resolved.

    Args:
        config: what is to run.
        say: told, before a large base is loaded, how much memory it will take, and after that which
            layers are not quantised.

    Raises:
        ConfigError: an unknown strategy or option, a config that the strategy can't honour, or more
            clients than examples.
        DataError: data that cannot be read.
        ModelError: a base that cannot be loaded, or targets that match nothing.
        PrivacyError: a layer that trains, whose per-example gradients are not known.
    """
    check_rule(build_rule(config.strategy.name, config.strategy.options), config)
    with hushed():
        task = resident_task(config)
        for client in range(config.federation.clients):
            if len(task.train(client)) == 0:
                raise ConfigError(
                    f"client {client} of {config.federation.clients} would have no example",
                    "Lower federation.clients, or raise federation.concentration.",
                )
        if not is_resident(config):
            _tell_memory(task, config, say)
        model = resident_model(task, config)
        check_optimizer(config.train.optimizer, model.device)
        if config.privacy.mode == "example":
            check_layers(model.model, model.parameters)
        if text := left_as_they_are(model.unquantised):
            say(text)
        if config.adapter.from_ is not None:
            read_adapter(Path(config.adapter.from_), model)
    return config.with_overrides({"threads": model.threads})


def _tell_memory(task: Task, config: Config, say: Callable[[str], None]) -> None:
    found = estimate(task, config)
    if found is not None and (found.parameters >= SMALL_MODEL or not found.fits):
        say(str(found) if found.fits else f"{found}\n{advice(found, config)}")
