"""`fedgraft keys`: the federation's certificates and node keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from deploy.keys import Client, Keys

FOLDER = click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path),
    required=True,
    metavar="KEYS",
    help="The folder of the federation's keys.",
)
DAYS = click.option(
    "--days",
    type=click.IntRange(1, 3650),
    default=365,
    show_default=True,
    help="How long the certificate holds.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.group()
def keys() -> None:
    """Make the certificates and node keys of a federation, show and revoke them.

    \b
    Example: fedgraft keys init --dir KEYS --host fl.example.org
             fedgraft keys client hospital-1 --dir KEYS
             fedgraft keys show --dir KEYS

    The folder holds the federation's own CA: keep a backup of it, and keep it from others.
    """


@keys.command()
@FOLDER
@click.option(
    "--host",
    "hosts",
    multiple=True,
    required=True,
    metavar="NAME",
    help="Name or address that clients reach the server by; may be given again.",
)
@DAYS
@click.option("--renew", is_flag=True, help="Only a new server certificate, of the same CA.")
@JSON
def init(folder: Path, hosts: tuple[str, ...], days: int, renew: bool, as_json: bool) -> None:
    """Make a CA and the server's certificate.

    \b
    Example: fedgraft keys init --dir KEYS --host fl.example.org

    The certificate is also for localhost and 127.0.0.1. A server reads it when it starts.
    """
    from deploy.keys import Keys

    if renew:
        made = Keys(folder)
        made.renew_server(hosts, days)
    else:
        made = Keys.create(folder, hosts, days)
    if as_json:
        click.echo(json.dumps(_state(made), indent=2))
        return
    end = made.certificates()["server"].not_valid_after_utc.date()
    click.echo(
        f"The server's certificate for {', '.join(hosts)} in {made.server} holds until {end}."
    )
    if renew:
        click.echo("Restart the server to use it.")
    else:
        click.echo(f"Next: fedgraft keys client NAME --dir {folder}")


@keys.command()
@click.argument("name")
@FOLDER
@DAYS
@click.option("--renew", is_flag=True, help="A new certificate; the node key stays.")
@JSON
def client(name: str, folder: Path, days: int, renew: bool, as_json: bool) -> None:
    """Invite a client: make the folder that is handed to it.

    \b
    Example: fedgraft keys client hospital-1 --dir KEYS

    A server that runs with these keys lets it in before this command ends, any other when it
    starts. Hand the folder over on a way that nobody else reads, and delete it here.
    """
    from deploy.keys import Keys

    made = Keys(folder)
    one = made.renew(name, days) if renew else made.invite(name, days)
    line = _told(made, "The running server lets it in from now on.")
    if as_json:
        one = made.invited()[name]  # with its node's id
        handed = {"folder": str(made.client_folder(name)), **_client(one)}
        click.echo(json.dumps(handed, indent=2))
        return
    click.echo(f"Hand {made.client_folder(name)} to {name}; it holds until {one.expires.date()}.")
    click.echo(line)


@keys.command()
@click.argument("name")
@FOLDER
@JSON
def revoke(name: str, folder: Path, as_json: bool) -> None:
    """Shut a client out: its certificates and its node, at once.

    \b
    Example: fedgraft keys revoke hospital-1 --dir KEYS

    A server that runs with these keys shuts it out before this command ends. Where the server has
    a copy of the folder, copy crl.pem and clients.json there: it takes them in at once.
    """
    from deploy.keys import Keys

    made = Keys(folder)
    one = made.revoke(name)
    line = _told(made, "The running server shuts it out from now on.")
    if as_json:
        click.echo(json.dumps(_client(one), indent=2))
        return
    click.echo(f"Client {name} is revoked.")
    click.echo(line)


@keys.command()
@FOLDER
@JSON
def show(folder: Path, as_json: bool) -> None:
    """Show who is invited, which certificates expire when, and who was revoked.

    \b
    Example: fedgraft keys show --dir KEYS

    What expires within 30 days is warned of.
    """
    from deploy.keys import Keys

    made = Keys(folder)
    state = _state(made)
    if as_json:
        click.echo(json.dumps(state, indent=2))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in ("", "holds until", "days", "node", "state"):
        table.add_column(title, overflow="fold")
    for row in (*state["certificates"], *state["clients"]):
        node = row.get("node_id")
        shown = "" if "node_id" not in row else "not registered" if node is None else str(node)
        table.add_row(
            row["name"],
            row["expires"][:10],
            f"{row['days_left']:.0f}",
            "" if row["state"] == "revoked" else shown,
            row["state"],
            style={"good": "", "revoked": "dim"}.get(row["state"], "bold red"),
        )
    console.print(table)
    for line in state["warnings"]:
        console.print(f"Warning: {line}", markup=False, style="bold red")


def _told(made: Keys, done: str) -> str:
    """Wait for a server that runs with these keys; say what it did, or that none runs."""
    from deploy.admission import wait_for_server

    if wait_for_server(made):
        return done
    return "No server runs here with these keys: it will know when it starts."


def _state(made: Keys) -> dict[str, Any]:
    """Return all there is to show."""
    from datetime import UTC, datetime

    from deploy.certificates import WARN_DAYS, days_left

    rows: list[dict[str, Any]] = []
    for name, certificate in made.certificates().items():
        if name in ("CA", "server"):
            left = days_left(certificate)
            end = certificate.not_valid_after_utc.isoformat()
            rows.append({"name": name, "expires": end, "days_left": left})
    clients = []
    for one in made.clients():
        left = (one.expires - datetime.now(UTC)).total_seconds() / 86400
        clients.append({**_client(one), "days_left": left})
    for row in (*rows, *clients):
        left = row["days_left"]
        good = "expired" if left < 0 else "expires soon" if left < WARN_DAYS else "good"
        row["state"] = "revoked" if row.get("revoked") else good
    warnings = [
        f"{row['name']} expired on {row['expires'][:10]}"
        if row["state"] == "expired"
        else f"{row['name']} expires on {row['expires'][:10]}, in {row['days_left']:.0f} days"
        for row in (*rows, *clients)
        if row["state"] in ("expired", "expires soon")
    ]
    return {"certificates": rows, "clients": clients, "warnings": warnings}


def _client(one: Client) -> dict[str, Any]:
    return {
        "name": one.name,
        "expires": one.expires.isoformat(),
        "node_id": one.node_id,
        "revoked": one.revoked,
        "serials": [certificate.serial for certificate in one.certificates],
    }
