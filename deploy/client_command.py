"""`fedgraft client`: what runs on an edge machine."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import click
from click.core import ParameterSource

from deploy.config_file import DEFAULT_GATEWAY, NODE, TRAINER


@click.command()
@click.option("--config", "file", type=click.Path(path_type=Path), help="The client's file.")
@click.option("--only", type=click.Choice([TRAINER, NODE]), help="Run this one of the two parts.")
@click.option("--init", type=click.Path(path_type=Path), help="Write an example of that file.")
@click.option("--keys", type=click.Path(path_type=Path), help="With --init: KEYS/clients/NAME.")
@click.option(
    "--server", default=DEFAULT_GATEWAY, show_default=True, help="With --init: HOST:PORT."
)
@click.option("--partition", type=click.IntRange(min=0), help="With --init: of the digits task.")
@click.option("--partitions", default=3, show_default=True, help="With --init: of how many.")
def client(
    file: Path | None,
    only: str | None,
    init: Path | None,
    keys: Path | None,
    server: str,
    partition: int | None,
    partitions: int,
) -> None:
    """Take part in a federation with the data of this machine.

    \b
    Example: fedgraft client --config client.toml

    Write that file first: fedgraft client --init client.toml --keys KEYS/clients/NAME.
    It starts the resident trainer, which holds base and data, and Flower's SuperNode, which speaks
    to the server; restarts what dies; and stops on SIGTERM or Ctrl-C. With --only the two are
    started apart, each by a user or in a container of its own.
    """
    if (file is None) == (init is None):
        raise click.UsageError("Name a file with --config, or write one with --init.")
    context = click.get_current_context()
    for name in ("only",) if file is None else ("keys", "server", "partition", "partitions"):
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            goes = "--config" if file is None else "--init"
            raise click.UsageError(f"--{name} goes with {goes}: a client runs as its file says.")
    if init is not None:
        _write(init, keys, server, partition, partitions)
    elif file is not None:
        _run(file, only)


def _write(
    path: Path, keys: Path | None, server: str, partition: int | None, partitions: int
) -> None:
    from deploy.client_config import ClientConfig, write_example

    if keys is None:
        raise click.UsageError("--init needs --keys, the folder that `fedgraft keys client` made.")
    if partition is not None and not 0 <= partition < partitions:
        raise click.UsageError(
            f"--partition {partition} of --partitions {partitions}: take 0 to {partitions - 1}."
        )
    base = "" if partition is None else _digits_base()
    made = {"partition": partition, "partitions": partitions, "base_hash": base}
    policy = write_example(path, keys, server=server, **made)  # type: ignore[arg-type]
    data = ClientConfig.load(path).data.path
    first = f"name your data in it ({data} for now), then " if data is not None else ""
    click.echo(f"wrote {path} and {policy}; {first}start it with: fedgraft client --config {path}")


def _check_free(lock: Path) -> None:
    """Refuse to run both parts beside one that runs apart, and the other way round."""
    from deploy.lock import holder
    from fedgraft.errors import ConfigError

    with suppress(PermissionError):  # of another user, who would meet this one's files
        if pid := holder(lock):
            raise ConfigError(
                f"a client runs already on {lock.parent} (process {pid})",
                "Stop that one first, or give this client another state folder.",
            )


def _digits_base() -> str:
    """Return the hash of the built-in base."""
    from fedgraft.config import Config
    from fedgraft.logs import hushed
    from fedgraft.resident_model import resident_model, resident_task

    with hushed():
        config = Config().with_overrides({"model.device": "cpu"})
        return resident_model(resident_task(config), config).base_hash


def _run(file: Path, only: str | None) -> None:
    from client.policy import Policy
    from deploy.client_config import ClientConfig
    from deploy.client_parts import parts
    from deploy.isolation import check_starter, prepare
    from deploy.lock import only_one
    from deploy.merged_log import MergedLog
    from deploy.supervisor import OWN, Supervisor

    config = ClientConfig.load(file)
    if only != NODE:  # whose user may not read it
        Policy.load(config.policy)
    house = config.house(only)
    check_starter(config, only)
    for other in (TRAINER, NODE) if only is None else (None,):
        _check_free(config.house(other).lock)
    with only_one(house.lock, "client"):
        prepare(config, only)
        log = MergedLog(house.log, screen=True)
        try:
            if not config.two_users:
                log.write(
                    OWN,
                    "trainer and SuperNode are one Unix user: a hostile server's code could read "
                    "this client's data (trainer-user, node-user)",
                )
            if only != NODE and config.data_missing:
                log.write(OWN, f"data.path {config.data.path} is not there: no run can use it yet")
            who = f"client {config.client}" if only is None else f"{only} of {config.client}"
            ready = f"{who} is ready; its server is {config.server}"
            supervisor = Supervisor(parts(config, file, only), log, house.parts)
            supervisor.run(when_ready=lambda: log.write(OWN, ready))
        finally:
            log.close()
