"""`fedgraft simulate` and `fedgraft compare`.

What is slow to load is imported when a command runs, under a sign of life on the screen, and not
for `--help`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from rich.console import Console

from fedgraft.config import Config
from fedgraft.errors import ConfigError, FedGraftError, RunError
from fedgraft.settings import parse_settings, parse_value
from server.screen import Screen, busy

if TYPE_CHECKING:
    from fedgraft.run_directory import RunDirectory

PATH = click.Path(path_type=Path)
REFERENCES = "base,alone,centralised"

_config_file = click.argument("config_file", metavar="[CONFIG.toml]", type=PATH, required=False)
_settings = click.option(
    "--set", "settings", metavar="KEY=VALUE", multiple=True, help="Set one key; may be repeated."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.command()
@_config_file
@_settings
@click.option("--out", type=PATH, help="The run's directory, a new one. [default: under runs/]")
@click.option("--resume", type=PATH, help="Continue the run in this directory.")
@click.option(
    "--engine",
    type=click.Choice(["in-process", "ray"]),
    default="in-process",
    show_default=True,
    help="In this process, or in Flower's own simulation.",
)
@_json
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
        _leave_out("--resume", {"CONFIG.toml": config_file, "--out": out})
    with busy("Loading the model and the data") as status:
        from server.summary import strategy_label
        from simulations import simulate as simulation
        from simulations.engine import run_engine

        if resume is not None:
            config, directory = simulation.resume(resume, parse_settings(settings))
        else:
            config = Config.load(config_file, settings)
            directory = simulation.prepare(config, out, status.console.print)
            config = directory.config()
    with _interruptible("simulate", directory.path):
        if simulation.is_finished(config, directory):
            click.echo(simulation.how_to_go_on(directory), err=True)
        else:
            with Screen({f"{strategy_label(config)}, seed {config.seed}": directory.progress}):
                run_engine(config, directory, "ray" if engine == "ray" else "in-process")
        with busy("Drawing plots and the report"):
            simulation.draw(directory.path)
    _show_run(directory, as_json)


@click.command()
@_config_file
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
@_settings
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
@_json
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
        _leave_out("--resume", given)
    chosen = (_words(strategies), _seeds(seeds), _grid(grid), _references(references))
    with busy("Loading the model and the data"):
        from simulations import compare as comparison
        from simulations.plan import Plan
        from simulations.simulate import free_path

        if resume is not None:
            plan, path = Plan.read(resume), resume
        else:
            config = Config.load(config_file, settings)
            plan = Plan(config, *chosen)
            path = out or free_path(Path("runs"), "comparison")
    with _interruptible("compare", path):
        result = comparison.compare(plan, path, resume=resume is not None)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        _show(result, path)


def _show_run(directory: RunDirectory, as_json: bool) -> None:
    from server.statistics import build_comparison

    summary = directory.summary()
    assert summary is not None
    if as_json:
        click.echo(json.dumps(summary, indent=2))
        return
    _show(dict(build_comparison([summary | {"directory": "."}], [])), directory.path)


def _show(result: dict[str, Any], path: Path) -> None:
    from server.table import fitting_table
    from server.verdict import verdict

    console = Console()
    whole = not console.is_terminal  # a terminal breaks lines between words, a pipe not at all
    console.print()
    console.print(fitting_table(result, console))
    for line in verdict(result).split("\n"):
        console.print(line, highlight=False, markup=False, soft_wrap=whole)
    console.print(
        f"\nReport: {path / 'report.html'}", highlight=False, markup=False, soft_wrap=True
    )


@contextmanager
def _interruptible(name: str, path: Path) -> Iterator[None]:
    """Say how to go on when Ctrl-C or a failure ends the work.

    Raises:
        RunError: the work was interrupted.
    """
    command = f"fedgraft {name} --resume {shlex.quote(str(path))}"
    try:
        yield
    except KeyboardInterrupt:
        raise RunError(
            "interrupted; everything up to the last checkpoint is kept", f"Continue with: {command}"
        ) from None
    except FedGraftError as error:
        if error.exit_status == 1 and "resume" not in error.remedy:  # of which it may advise
            error.remedy = f"{error.remedy} Continue with: {command}".strip()
        raise


def _leave_out(option: str, given: Mapping[str, object]) -> None:
    """Refuse what an option excludes.

    Raises:
        ConfigError: one of the given things is there.
    """
    for name, value in given.items():
        if value:
            raise ConfigError(
                f"{option} takes that from the directory, and {name} is given as well",
                f"Leave {name} out, or {option}.",
            )


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
