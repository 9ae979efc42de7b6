"""The Python API: what the commands do, as functions.

from fedgraft import simulate, compare, load_run

run = simulate({"federation.rounds": 5}, out="runs/first")
print(run.summary["final"], run.adapter().layers.keys())
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedgraft.adapter import Adapter, parse_factor
from fedgraft.attachment import peft_scalings
from fedgraft.config import Config
from fedgraft.errors import ConfigError
from fedgraft.files import read_tensors
from fedgraft.foreign import import_ours
from fedgraft.run_directory import RunDirectory

Settings = Config | Mapping[str, Any] | str | Path | None
"""A config, dotted keys on top of the defaults, the path of a TOML file, or the defaults."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its run directory.
        config: the resolved config.
        summary: summary.json.
        rounds: the records of rounds.jsonl, round 0 first.
    """

    path: Path
    config: Config
    summary: dict[str, Any]
    rounds: list[dict[str, Any]]

    def adapter(self) -> Adapter:
        """Return the chosen adapter, float32.

        Raises:
            RunError: its file is missing or damaged.
        """
        folder = RunDirectory(self.path).adapter
        tensors, _ = read_tensors(folder / "adapter_model.safetensors")
        layers = {parsed[0] for name in tensors if (parsed := parse_factor(name)) is not None}
        settings = json.loads((folder / "adapter_config.json").read_bytes())
        return Adapter.from_tensors(tensors, peft_scalings(settings, layers))


def load_run(path: str | Path) -> Run:
    """Read a finished run.

    Raises:
        ConfigError: there is no run, or it has not finished.
    """
    directory = RunDirectory.open(Path(path))
    summary = directory.summary()
    if summary is None:
        raise ConfigError(
            f"the run in {path} has not finished",
            f"Continue it with {directory.resume_command()}.",
        )
    return Run(directory.path, directory.config(), summary, directory.rounds())


def simulate(
    settings: Settings = None,
    *,
    out: str | Path | None = None,
    engine: Literal["in-process", "ray"] = "in-process",
) -> Run:
    """Run a federation on this machine and return it.

    Args:
        settings: the config.
        out: the run directory, which must not hold a run; a new one under runs/ by default.
        engine: in this process, or Flower's Ray simulation.

    Raises:
        FedGraftError: what went wrong and what to do.
    """
    simulation = import_ours("simulations.simulate")
    path = simulation.simulate(_config(settings), Path(out) if out else None, engine)
    return load_run(path)


def compare(
    settings: Settings = None,
    *,
    strategies: Sequence[str] = ("fedavg", "ffa-lora", "lora-fair"),
    seeds: Sequence[int] = (0, 1, 2),
    grid: Mapping[str, Sequence[Any]] | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Run strategies x seeds with reference rows and return comparison.json's content.

    Args:
        settings: the config; its `compare` group sets keys for one strategy.
        strategies: names of rules; differences are from the first.
        seeds: each is run with every strategy.
        grid: further keys with the values to try, all combinations.
        out: a new directory for the comparison; one under runs/ by default.

    Raises:
        FedGraftError: what went wrong and what to do.
    """
    comparison = import_ours("simulations.compare")
    planning = import_ours("simulations.plan")
    plan = planning.Plan(_config(settings), tuple(strategies), tuple(seeds), dict(grid or {}))
    result: dict[str, Any] = comparison.compare(plan, Path(out) if out else None)
    return result


def _config(settings: Settings) -> Config:
    if isinstance(settings, Config):
        return settings
    if isinstance(settings, str | Path):
        return Config.load(Path(settings))
    return Config().with_overrides(settings or {})
