"""`fedgraft status`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from deploy.health import Health
    from deploy.status import RunStatus

PATH = click.Path(path_type=Path)


@click.command()
@click.option(
    "--to",
    "server",
    type=PATH,
    default=Path("server.toml"),
    show_default=True,
    help="The server's config, on its own machine.",
)
@click.option("--client", type=PATH, help="A client's config: its parts, in place of a server.")
@click.option("--parts", "only_parts", is_flag=True, help="Of the server its parts alone; cheap.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def status(server: Path, client: Path | None, only_parts: bool, as_json: bool) -> int | None:
    """Show a server: its clients, its run, the round, and who is at work.

    \b
    Example: fedgraft status --to server.toml
             fedgraft status --to server.toml --parts     # for a watchdog
             fedgraft status --client client.toml         # on a client's machine

    A client is "training" while the round waits for it; of a private run nobody is told, and it is
    "online". Bytes are of all messages of the run, as the server's SuperLink counts them; epsilon
    is what clients tell, or the server's own ledger.
    With --parts or --client the exit status is 1 where a part does not answer.
    """
    if client is not None:
        from deploy.client_config import ClientConfig
        from deploy.health import client_health

        return _told(client_health(ClientConfig.load(client)), as_json)
    if only_parts:
        from deploy.health import server_health
        from deploy.server_config import ServerConfig

        return _told(server_health(ServerConfig.load(server)), as_json)
    _show(server, as_json)
    return None


def _told(found: list[Health], as_json: bool) -> int:
    """Print how parts are, and return the exit status."""
    good = all(one.good for one in found)
    if as_json:
        click.echo(json.dumps({"good": good, "parts": [asdict(one) for one in found]}, indent=2))
    else:
        for one in found:
            click.echo(f"{one.part:<11}{one.text}")
    return 0 if good else 1


def _show(server: Path, as_json: bool) -> None:
    """Print all that a server knows."""
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
