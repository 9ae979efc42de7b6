"""`fedgraft status`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from server.run_command import PATH, as_json_option

if TYPE_CHECKING:
    from deploy.status import RunStatus


@click.command()
@click.option(
    "--to",
    "server",
    type=PATH,
    default=Path("server.toml"),
    show_default=True,
    help="The server's config, on its own machine.",
)
@as_json_option
def status(server: Path, as_json: bool) -> None:
    """Show a server: its clients, its run, the round, and who is at work.

    \b
    Example: fedgraft status --to server.toml

    A client is "training" while the round waits for it; of a private run nobody is told, and it is
    "online". Bytes are of all messages of the run, as
    the server's SuperLink counts them; epsilon is what clients tell, or the server's own ledger.
    """
    from rich.console import Console
    from rich.table import Table

    from deploy.server_config import ServerConfig
    from deploy.status import status as look

    found = look(ServerConfig.load(server))
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        return
    parts = ", ".join(
        f"{name} {'ready' if part.get('ready') else 'starting'}"
        + (f" (started {part['starts']} times)" if part.get("starts", 1) > 1 else "")
        for name, part in found.parts.items()
    )
    click.echo(f"server   {found.listen}: {parts or 'its supervisor does not run'}")
    click.echo(f"run      {'none yet' if found.run is None else _in_words(found.run)}")
    table = Table(box=None, pad_edge=False)
    for column in ("client", "state", "last heard of", "certificate until"):
        table.add_column(column)
    budgets = any(client.epsilon is not None for client in found.clients)
    for column in ("epsilon spent", "left") if budgets else ():
        table.add_column(column)
    for client in found.clients:
        age = "" if client.heartbeat_age is None else f"{client.heartbeat_age:.0f} s ago"
        row = [client.name, client.state, age, client.certificate_until[:10]]
        if budgets:
            row += [_amount(client.epsilon), _amount(client.epsilon_left)]
        table.add_row(*row)
    if found.clients:
        Console().print(table)
    else:
        click.echo("no client is invited: fedgraft keys client NAME --dir KEYS")


def _amount(epsilon: float | None) -> str:
    return "" if epsilon is None else f"{epsilon:.2f}"


def _in_words(run: RunStatus) -> str:
    words = [run.state]
    if run.round is not None:
        words.append(f"{run.round} of {run.rounds} rounds done")
    if run.at_round is not None:
        words.append(f"round {run.at_round} at work")
    if run.at_work:
        words.append(f"waiting for {', '.join(run.at_work)}")
    words.append(f"{run.bytes_down / 1e6:.1f} MB down, {run.bytes_up / 1e6:.1f} MB up")
    if run.epsilon is not None:
        left = "" if run.epsilon_left is None else f", {run.epsilon_left:.2f} left"
        words.append(f"epsilon {run.epsilon:.2f} spent{left}")
    if run.directory is not None:
        words.append(f"in {run.directory}")
    return "; ".join(words)
