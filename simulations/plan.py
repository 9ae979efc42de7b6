"""What a comparison compares: strategies, seeds and grid, and the configs that they make."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fedgraft.config import Config
from fedgraft.errors import ConfigError
from fedgraft.run_directory import PLAN_FILE
from fedgraft.settings import flatten, read_toml
from simulations.references import NAMES, is_tuned
from strategies.registry import option_names, rule_names, unused_settings

_NOT_IN_GRID = {"seed": "--seeds", "strategy.name": "--strategies"}


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        config: common to all; its `compare` group sets keys for one strategy.
        strategies: rules by name, or variants of rules: names of tables [compare.<name>] that set
            `strategy.name`. Differences are from the first.
        seeds: each is run with every strategy.
        grid: further keys with values to try, all combinations.
        references: names of reference rows.

    Raises:
        ConfigError: nothing to compare, a name given twice, or a key that no grid may hold.
    """

    config: Config
    strategies: tuple[str, ...]
    seeds: tuple[int, ...]
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    references: tuple[str, ...] = NAMES

    def __post_init__(self) -> None:
        for name, values in (("--strategies", self.strategies), ("--seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ConfigError(
                    f"{name} is {','.join(map(str, values)) or 'empty'}",
                    "Name at least one, and each only once.",
                )
        for key in self.grid:
            if key in _NOT_IN_GRID:
                raise ConfigError(f"--grid holds {key}", f"Use {_NOT_IN_GRID[key]} for it.")
            if key.startswith("compare."):
                _, strategy, *rest = key.split(".")
                raise ConfigError(
                    f"--grid holds {key}, and a grid is of all strategies",
                    f"Compare {strategy} alone: --strategies {strategy} "
                    f"--grid {'.'.join(rest)}=V1,V2.",
                )

    def variants(self) -> dict[str, Config]:
        """Return the configs to run by label, with seed 0; the first strategy's come first.

        Raises:
            ConfigError: a key of [compare.<strategy>] or of the grid is unknown, or a strategy is.
        """
        common = self.config.to_dict()
        own = common.pop("compare", {})
        self._check_tables(own)
        self._check_options(common)
        found: dict[str, Config] = {}
        used: set[str] = set()
        for strategy in self.strategies:
            settings = {"strategy.name": strategy, **flatten(own.get(strategy, {}))}
            base = Config.from_dict(common).with_overrides(settings)
            for label, chosen in self._labels(strategy):
                found[label] = base.with_overrides(chosen)
                used |= chosen.keys()
        for key in self.grid:
            if key not in used:
                raise ConfigError(
                    f"--grid holds {key}, which nothing uses without a server optimiser",
                    "Set strategy.server-optimizer to one that uses it, or name some in the grid.",
                )
        return found

    def beside(self) -> dict[str, Config]:
        """Return by a run's label the config of the reference rows that it is measured against.

        That is the common config with the grid's values, and with what [compare.<strategy>] says
        about data, federation, steps and rank; a learning rate of a strategy's own is its own.
        """
        common = self.config.to_dict()
        own = common.pop("compare", {})
        common.pop("strategy")
        found: dict[str, Config] = {}
        for strategy in self.strategies:
            settings = flatten(own.get(strategy, {}))
            kept = {key: value for key, value in settings.items() if not is_tuned(key)}
            for label, chosen in self._labels(strategy):
                merged = {k: v for k, v in (kept | chosen).items() if not k.startswith("strategy.")}
                found[label] = Config.from_dict(common).with_overrides(merged)
        return found

    def _labels(self, strategy: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each of a strategy's labels with the grid's values.

        Settings that the grid's server optimiser does not use are left out of it, and what is the
        same without them comes once.
        """
        rule, seen = self._rule(strategy), set[str]()
        for values in itertools.product(*self.grid.values()):
            chosen = dict(zip(self.grid, values, strict=True))
            if rule in rule_names():
                options = self._options(strategy) | _options(chosen)
                unused = {f"strategy.{key}" for key in unused_settings(rule, options)}
                chosen = {key: value for key, value in chosen.items() if key not in unused}
            label = " ".join([strategy, *(f"{k}={v}" for k, v in chosen.items())])
            if label not in seen:
                seen.add(label)
                yield label, chosen

    def _options(self, strategy: str) -> dict[str, Any]:
        """Return what a strategy's options are before the grid's values: of all, and its own."""
        tree = self.config.to_dict()
        own = flatten(tree["compare"].get(strategy, {}))
        return _options(flatten({"strategy": tree["strategy"]})) | _options(own)

    def _rule(self, strategy: str) -> str:
        """Return the rule behind a name: its own, or the one that its table sets."""
        own = flatten(self.config.to_dict()["compare"].get(strategy, {}))
        return str(own.get("strategy.name", strategy))

    def _check_tables(self, own: Mapping[str, Any]) -> None:
        """Refuse a table of a strategy that is not installed; one that is not compared is fine."""
        for name in own:
            if self._rule(name) not in {*rule_names(), *self.strategies}:
                nearest = difflib.get_close_matches(name, rule_names(), n=1)
                raise ConfigError(
                    f"[compare.{name}] is for a strategy that is not installed",
                    f"Did you mean {nearest[0]}?" if nearest else "See fedgraft strategies.",
                )

    def _check_options(self, common: Mapping[str, Any]) -> None:
        """Refuse an option of one rule set for all, which the others would not know."""
        options = {key for key in common["strategy"] if key != "name"}
        options |= {
            key.removeprefix("strategy.") for key in self.grid if key.startswith("strategy.")
        }
        for strategy in self.strategies if len(self.strategies) > 1 else ():
            for option in sorted(options - set(option_names(self._rule(strategy)))):
                raise ConfigError(
                    f"strategy.{option} is set for all strategies, and {strategy} does not know it",
                    f"Set it for one of them, with --set compare.NAME.strategy.{option}=... or "
                    "under [compare.NAME.strategy]; to try several values, compare that one alone.",
                )

    def to_toml(self) -> str:
        """Return the plan as TOML, from which a resume reads it back."""
        return tomli_w.dumps(
            {
                "strategies": list(self.strategies),
                "seeds": list(self.seeds),
                "grid": {key: list(values) for key, values in self.grid.items()},
                "references": list(self.references),
                "config": self.config.to_dict(),
            }
        )

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read what `to_toml` wrote.

        Raises:
            ConfigError: there is no comparison in the directory.
        """
        file = path / PLAN_FILE
        if not file.is_file():
            raise ConfigError(
                f"{path} holds no comparison: it has no {PLAN_FILE}",
                "Name a directory that fedgraft compare wrote.",
            )
        tree = read_toml(file)
        return cls(
            Config.from_dict(tree["config"], source=str(file)),
            tuple(tree["strategies"]),
            tuple(tree["seeds"]),
            tree["grid"],
            tuple(tree["references"]),
        )


def _options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `settings` that are options of a rule, without their prefix."""
    prefix = "strategy."
    return {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}
