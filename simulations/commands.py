"""`fedgraft simulate` and `fedgraft compare`.

What is slow to load is imported when a command runs, under a sign of life on the screen, and not
for `--help`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from fedgraft.config import Config
from fedgraft.errors import ConfigError
from fedgraft.settings import parse_settings, parse_value
from server.run_command import (
    PATH,
    as_json_option,
    config_file_argument,
    interruptible,
    leave_out,
    settings_option,
    show,
    show_run,
)
from server.screen import Screen, busy

REFERENCES = "base,alone,centralised"


@click.command()
@config_file_argument
@settings_option
@click.option("--out", type=PATH, help="The run's directory, a new one. [default: under runs/]")
@click.option("--resume", type=PATH, help="Continue the run in this directory.")
@click.option(
    "--engine",
    type=click.Choice(["in-process", "ray"]),
    default="in-process",
    show_default=True,
    help="In this process, or in Flower's own simulation.",
)
@as_json_option
def simulate(
    config_file: Path | None,
    settings: tuple[str, ...],
    out: Path | None,
    resume: Path | None,
    engine: str,
    as_json: bool,
) -> None:
    """Run a federation on this machine.

    \b
    Example: fedgraft simulate --set strategy.name=lora-fair --set federation.rounds=10

    A run killed at any moment continues with --resume DIR and ends with the same adapter, bit for
    bit. A finished one goes on with --resume DIR --set federation.rounds=60.

    Without CONFIG.toml the defaults run: six clients read handwritten digits.
    """
    if resume is not None:
        leave_out("--resume", {"CONFIG.toml": config_file, "--out": out})
    with busy("Loading the model and the data") as status:
        from server import session
        from server.summary import strategy_label
        from simulations import simulate as simulation
        from simulations.engine import run_engine

        if resume is not None:
            config, directory = session.resume(resume, parse_settings(settings))
        else:
            config = Config.load(config_file, settings)
            directory = simulation.prepare(config, out, status.console.print)
            config = directory.config()
    with interruptible(["simulate"], directory.path):
        if session.is_finished(config, directory):
            click.echo(session.how_to_go_on(directory), err=True)
        else:
            with Screen({f"{strategy_label(config)}, seed {config.seed}": directory.progress}):
                run_engine(config, directory, "ray" if engine == "ray" else "in-process")
        with busy("Drawing plots and the report"):
            session.draw(directory.path)
    show_run(directory, as_json)


@click.command()
@config_file_argument
@click.option(
    "--strategies",
    metavar="NAMES",
    default="fedavg,ffa-lora,lora-fair",
    show_default=True,
    help="Rules, comma-separated; differences are from the first.",
)
@click.option(
    "--seeds", metavar="NUMBERS", default="0,1,2", show_default=True, help="Comma-separated."
)
@settings_option
@click.option(
    "--grid", metavar="KEY=V1,V2", multiple=True, help="Try values of a key, all combinations."
)
@click.option(
    "--references",
    metavar="NAMES",
    default=REFERENCES,
    show_default=True,
    help="Reference rows, comma-separated, or none.",
)
@click.option("--out", type=PATH, help="A new directory. [default: under runs/]")
@click.option("--resume", type=PATH, help="Go on with the comparison in this directory.")
@as_json_option
@click.pass_context
def compare(
    context: click.Context,
    config_file: Path | None,
    strategies: str,
    seeds: str,
    settings: tuple[str, ...],
    grid: tuple[str, ...],
    references: str,
    out: Path | None,
    resume: Path | None,
    as_json: bool,
) -> None:
    """Compare aggregation strategies over several seeds, with reference rows and a report.

    \b
    Example: fedgraft compare --strategies fedavg,lora-fair --seeds 0,1,2 --out runs/two

    All runs of a seed share the data's partition, the first adapter and the sampled clients. Set
    keys for one strategy in a config file under [compare.<strategy>]; a table of another name that
    sets strategy.name is a variant to name in --strategies.
    """
    if resume is not None:
        given = {
            "CONFIG.toml": config_file,
            **{
                f"--{name}": value
                for name, value in context.params.items()
                if name not in ("config_file", "resume", "as_json", "settings")
                and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
            },
            "--set": settings,
        }
        leave_out("--resume", given)
    chosen = (_words(strategies), _seeds(seeds), _grid(grid), _references(references))
    with busy("Loading the model and the data"):
        from server.session import free_path
        from simulations import compare as comparison
        from simulations.plan import Plan

        if resume is not None:
            plan, path = Plan.read(resume), resume
        else:
            config = Config.load(config_file, settings)
            plan = Plan(config, *chosen)
            path = out or free_path(Path("runs"), "comparison")
    with interruptible(["compare"], path):
        result = comparison.compare(plan, path, resume=resume is not None)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        show(result, path)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in _words(text))
    except ValueError:
        raise ConfigError(f"--seeds is {text!r}", "Write whole numbers like 0,1,2.") from None


def _references(text: str) -> tuple[str, ...]:
    names = () if text == "none" else _words(text)
    for name in names:
        if name not in _words(REFERENCES):
            raise ConfigError(f"--references names {name!r}", f"Choose of {REFERENCES}, or none.")
    return names


def _grid(settings: Iterable[str]) -> dict[str, list[Any]]:
    grid = {}
    for setting in settings:
        key, equals, values = setting.partition("=")
        if not equals or not _words(values):
            raise ConfigError(
                f"--grid {setting!r} is not KEY=V1,V2", "Write it like --grid train.lr=0.004,0.008."
            )
        grid[key.strip()] = [parse_value(word) for word in _words(values)]
    return grid
