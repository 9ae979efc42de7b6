"""The front door: `fedgraft COMMAND`.

Commands are entry points of the group `fedgraft.commands`, each a click command. Only the one that
was asked for is imported; what `fedgraft --help` lists is read from the commands' source without
importing them, so it answers in a moment.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
import sys
import traceback
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import click

from fedgraft import __version__
from fedgraft.errors import FedGraftError
from fedgraft.foreign import FLOORS, import_ours

GROUP = "fedgraft.commands"
_LOCAL = ("simulate", "compare", "report", "export", "data", "privacy", "strategies")
_DEPLOYED = ("keys", "server", "client", "submit", "status", "doctor")
_ORDER = (*_LOCAL, *_DEPLOYED)


class Commands(click.Group):
    """A group whose commands are entry points, imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the installed commands, the usual order first."""
        names = set(_commands())
        return [n for n in _ORDER if n in names] + sorted(names - set(_ORDER))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command; None where there is none of that name."""
        entry = _commands().get(cmd_name)
        return None if entry is None else _load(entry)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments name; suggest the nearest where there is none."""
        names = self.list_commands(ctx)
        if args and args[0] not in names and not args[0].startswith("-"):
            nearest = difflib.get_close_matches(args[0], names, n=1)
            guess = f" Did you mean {nearest[0]}?" if nearest else ""
            ctx.fail(f"There is no command {args[0]!r}.{guess}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with the first sentence of each."""
        entries = _commands()
        rows = [(name, _first_sentence(entries[name])) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fedgraft")
def fedgraft() -> None:
    """Fine-tune one base model across many data owners with LoRA, and compare how.

    \b
    Try:  fedgraft simulate --set federation.rounds=5 --out runs/first
          fedgraft compare --strategies fedavg,ffa-lora,lora-fair --seeds 0,1,2 --out runs/three

    Every command has --help with an example; --debug shows the traceback of an error.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: exit 0, or 1 (the run failed), or 2 (wrong usage or config)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        status = fedgraft.main(arguments, prog_name="fedgraft", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except FedGraftError as error:
        if debug:
            traceback.print_exc()
        _complain(error.message, error.remedy)
        sys.exit(error.exit_status)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        used = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
        _complain(error.format_message(), f"See {used or 'fedgraft'} --help.")
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _complain("interrupted", "")
        sys.exit(1)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        first = next(iter(str(error).splitlines()), "")
        _complain(f"{type(error).__name__}: {first}", "This is a bug; --debug shows where.")
        sys.exit(1)


def _complain(message: str, remedy: str) -> None:
    click.secho("Error: ", fg="red", bold=True, nl=False, err=True)
    click.echo(message, err=True)
    if remedy:
        click.echo(f"       {remedy}", err=True)


def _commands() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _load(entry: EntryPoint) -> click.Command:
    if entry.module.split(".")[0] in FLOORS:
        import_ours(entry.module)
    command = entry.load()
    if not isinstance(command, click.Command):
        raise FedGraftError(f"the entry point {entry.name!r} of {GROUP} is {command!r}, no command")
    return command


def _first_sentence(entry: EntryPoint) -> str:
    """Read the first line of a command's docstring from its source, without importing it."""
    package, _, module = entry.module.rpartition(".")
    parent = importlib.util.find_spec(package) if package else None
    for folder in (parent.submodule_search_locations or []) if parent is not None else []:
        source = Path(folder) / f"{module}.py"
        if not source.is_file():
            continue
        for node in ast.parse(source.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == entry.attr:
                return (ast.get_docstring(node) or "").split("\n")[0]
    return ""
