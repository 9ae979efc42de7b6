"""`fedgraft doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from server.run_command import PATH, as_json_option
from server.screen import busy

_SIGNS = {"good": ("ok", "green"), "warning": ("warning", "yellow"), "wrong": ("WRONG", "red")}


@click.command()
@click.option("--server", type=PATH, help="A server.toml: look at this machine as a server.")
@click.option("--client", type=PATH, help="A client.toml: look at this machine as a client.")
@click.option("--against", type=PATH, help="A run's config that it should be able to work on.")
@as_json_option
def doctor(server: Path | None, client: Path | None, against: Path | None, as_json: bool) -> int:
    """Find what would keep a server or a client from its work, and say what to do.

    \b
    Example: fedgraft doctor --client client.toml --against config.toml

    Looks at certificates, ports, disk, GPU, clock, users and policy, and with a run's config at
    its data, the memory that training takes, and the base. Exit status 1 where something is wrong.
    """
    if (server is None) == (client is None):
        raise click.UsageError("Name one of --server FILE and --client FILE.")
    with busy("Looking"):
        from deploy.client_config import ClientConfig
        from deploy.doctor_client import examine_client
        from deploy.doctor_server import examine_server
        from deploy.server_config import ServerConfig
        from fedgraft.config import Config

        config = None if against is None else Config.load(against)
        if server is not None:
            findings = examine_server(ServerConfig.load(server), config)
        else:
            assert client is not None
            findings = examine_client(ClientConfig.load(client), config)
    wrong = any(finding.verdict == "wrong" for finding in findings)
    if as_json:
        told = {"good": not wrong, "findings": [asdict(finding) for finding in findings]}
        click.echo(json.dumps(told, indent=2))
        return int(wrong)
    for finding in findings:
        sign, colour = _SIGNS[finding.verdict]
        click.secho(f"{sign:8}", fg=colour, nl=False)
        click.echo(f"{finding.subject}: {finding.text}")
        if finding.remedy and finding.verdict != "good":
            click.echo(f"        {finding.remedy}")
    return int(wrong)
