"""`fedgraft submit`."""

from __future__ import annotations

from pathlib import Path

import click

from server.run_command import (
    PATH,
    as_json_option,
    config_file_argument,
    interruptible,
    leave_out,
    settings_option,
    show_run,
)
from server.screen import Screen, busy


@click.command()
@config_file_argument
@settings_option
@click.option(
    "--to",
    "server",
    type=PATH,
    default=Path("server.toml"),
    show_default=True,
    help="The server's config; its SuperLink is reached on this machine only.",
)
@click.option("--out", type=PATH, help="The run's directory, a new one. [default: under runs/]")
@click.option("--resume", type=PATH, help="Continue the run in this directory.")
@click.option(
    "--until-done",
    is_flag=True,
    help="After a failure continue from the last checkpoint, until the rounds are done.",
)
@as_json_option
def submit(
    config_file: Path | None,
    settings: tuple[str, ...],
    server: Path,
    out: Path | None,
    resume: Path | None,
    until_done: bool,
    as_json: bool,
) -> None:
    """Run a federation of the clients that are connected to a server.

    \b
    Example: fedgraft submit config.toml --to server.toml --until-done

    The same config as `fedgraft simulate`, the same progress on the screen, and the same run
    directory at the end. It waits for federation.min-clients, and says whom it waits for. Ctrl-C
    stops the run; --resume DIR continues it from its last checkpoint.
    """
    if resume is not None:
        leave_out("--resume", {"CONFIG.toml": config_file, "--out": out})
    with busy("Reading the config"):
        from deploy.server_config import ServerConfig
        from deploy.submission import Submission, prepare
        from fedgraft.config import Config
        from fedgraft.run_directory import RunDirectory
        from fedgraft.settings import parse_settings
        from server import session
        from server.summary import strategy_label

        to = ServerConfig.load(server)
        if resume is not None and not settings and RunDirectory.open(resume).busy:
            directory = RunDirectory(resume)  # a submit that was killed left it running
            config = directory.config()
        elif resume is not None:
            config, directory = session.resume(resume, parse_settings(settings), deployed=True)
        else:
            directory = prepare(Config.load(config_file, settings), out)
            config = directory.config()
    with interruptible(["submit", "--to", str(server)], directory.path):
        if session.is_finished(config, directory):
            click.echo(session.how_to_go_on(directory), err=True)
        else:
            label = f"{strategy_label(config)}, seed {config.seed}"
            with Screen({label: directory.progress}, at_work=directory.busy) as screen:
                submission = Submission(to, config, directory, screen.say)
                submission.run(until_done=until_done)
        with busy("Drawing plots and the report"):
            session.draw(directory.path)
    show_run(directory, as_json)
