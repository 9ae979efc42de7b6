"""`fedgraft server`."""

from __future__ import annotations

from pathlib import Path

import click

PATH = click.Path(path_type=Path)


@click.command()
@click.option("--config", type=PATH, help="The server.toml to run.")
@click.option("--init", type=PATH, help="Write an example server.toml there and end.")
@click.option("--keys", type=PATH, help="With --init: what `fedgraft keys init` made.")
@click.option("--quiet", is_flag=True, help="Write the log to its file only.")
def server(config: Path | None, init: Path | None, keys: Path | None, quiet: bool) -> None:
    """Run a server: Flower's SuperLink, and before it a gateway that lets only clients in.

    \b
    Example: fedgraft server --config server.toml

    Make the keys with fedgraft keys, and an example of the config with --init and --keys. It runs
    until Ctrl-C or SIGTERM; a part that dies is started again. Everything it keeps lies in the
    state folder that server.toml names, its log in log/server.log there.
    """
    if (config is None) == (init is None):
        raise click.UsageError("Say --config FILE to run a server, or --init FILE for an example.")
    if (init is None) != (keys is None):
        raise click.UsageError("--init FILE and --keys KEYS go together.")
    if init is not None and keys is not None:
        from deploy.keys import Keys
        from deploy.server_config import write_example

        Keys(keys)
        write_example(init, keys)
        click.echo(f"Wrote {init}. Start the server: fedgraft server --config {init}")
    elif config is not None:
        from deploy.server import serve
        from deploy.server_config import ServerConfig

        serve(ServerConfig.load(config), screen=not quiet)
