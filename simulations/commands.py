"""`fedgraft simulate` and `fedgraft compare`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedgraft.config import Config, parse_settings, parse_value
from fedgraft.errors import ConfigError, FedGraftError, RunError
from fedgraft.run_directory import RunDirectory
from server.screen import Screen
from server.statistics import build_comparison
from server.summary import strategy_label
from server.table import results_table
from server.verdict import verdict
from simulations import compare as comparison
from simulations import simulate as simulation
from simulations.engine import Engine, run_engine
from simulations.references import NAMES

ConfigFile = Annotated[
    Path | None, typer.Argument(help="A TOML config; the defaults run when there is none.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one key; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON for machines.")]


def simulate(
    config_file: ConfigFile = None,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(help="The run directory, which must not hold a run.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this directory.")] = None,
    engine: Annotated[
        str, typer.Option(help="in-process, or ray (Flower's own simulation).")
    ] = "in-process",
    as_json: Json = False,
) -> None:
    """Run a federation on this machine.

    Example: fedgraft simulate --set strategy.name=lora-fair --set federation.rounds=10

    A run killed at any moment continues with --resume DIR and ends with the same adapter, bit for
    bit; a finished one goes on with --resume DIR --set federation.rounds=60.
    """
    chosen = _engine(engine)
    if resume is not None:
        if config_file is not None or out is not None:
            raise ConfigError(
                "--resume takes its config and directory from the run",
                "Leave CONFIG.toml and --out away; --set may change a few keys.",
            )
        config, directory = simulation.resume(resume, parse_settings(settings or []))
        if simulation.is_finished(config, directory):
            typer.echo(
                f"{resume} is finished after {config.federation.rounds} rounds; "
                "to go on: --set federation.rounds=N",
                err=True,
            )
            _show_run(directory, as_json)
            return
    else:
        config = Config.load(config_file, settings or [])
        directory = simulation.prepare(config, out)
        config = directory.config()
    label = f"{strategy_label(config)}, seed {config.seed}"
    with _interruptible(f"fedgraft simulate --resume {directory.path}"):
        with Screen({label: directory}):
            run_engine(config, directory, chosen)
        simulation.draw(directory.path)
    _show_run(directory, as_json)


def compare(
    config_file: ConfigFile = None,
    strategies: Annotated[
        str, typer.Option(help="Rules, comma-separated; differences are from the first.")
    ] = "fedavg,ffa-lora,lora-fair",
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated.")] = "0,1,2",
    settings: Settings = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="Try values of a key, all combinations."),
    ] = None,
    references: Annotated[
        str, typer.Option(help="Reference rows, comma-separated, or none.")
    ] = ",".join(NAMES),
    out: Annotated[Path | None, typer.Option(help="A new directory for the comparison.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the comparison in this directory.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare aggregation strategies over several seeds, with reference rows and a report.

    Example: fedgraft compare --strategies fedavg,lora-fair --seeds 0,1,2 --out runs/two

    All runs of a seed share the data's partition, the first adapter and the sampled clients. Set
    keys for one strategy in a config file under [compare.<strategy>].
    """
    if resume is not None:
        plan, path = comparison.Plan.read(resume), resume
    else:
        plan = comparison.Plan(
            Config.load(config_file, settings or []),
            tuple(_words(strategies)),
            tuple(_seeds(seeds)),
            _grid(grid or []),
            tuple(_references(references)),
        )
        path = out or simulation.free_path(Path("runs"), "comparison")
    with _interruptible(f"fedgraft compare --resume {path}"):
        result = comparison.compare(plan, path, resume=resume is not None)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    _show(result, path)


def _show_run(directory: RunDirectory, as_json: bool) -> None:
    summary = directory.summary()
    assert summary is not None
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    _show(dict(build_comparison([summary | {"directory": "."}], [])), directory.path)


def _show(result: dict[str, Any], path: Path) -> None:
    console = Console()
    console.print(results_table(result))
    for line in verdict(result).split("\n"):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"\nReport: {path / 'report.html'}", highlight=False, soft_wrap=True)


@contextmanager
def _interruptible(command: str) -> Iterator[None]:
    """Say how to go on when Ctrl-C or a failure ends the work.

    Raises:
        RunError: the work was interrupted.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise RunError(
            "interrupted; everything up to the last checkpoint is kept", f"Continue with: {command}"
        ) from None
    except FedGraftError as error:
        if error.exit_status == 1 and command not in error.remedy:
            error.remedy = f"{error.remedy} Continue with: {command}".strip()
        raise


def _engine(name: str) -> Engine:
    if name == "in-process":
        return "in-process"
    if name == "ray":
        return "ray"
    raise ConfigError(f"--engine is {name!r}", "Choose in-process or ray.")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _seeds(text: str) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise ConfigError(f"--seeds is {text!r}", "Write whole numbers like 0,1,2.") from None


def _references(text: str) -> list[str]:
    names = [] if text == "none" else _words(text)
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"--references names {name!r}", f"Choose of {', '.join(NAMES)}.")
    return names


def _grid(settings: list[str]) -> dict[str, list[Any]]:
    grid = {}
    for setting in settings:
        key, equals, values = setting.partition("=")
        if not equals or not _words(values):
            raise ConfigError(
                f"--grid {setting!r} is not KEY=V1,V2", "Write it like --grid train.lr=0.004,0.008."
            )
        grid[key.strip()] = [parse_value(word) for word in _words(values)]
    return grid
