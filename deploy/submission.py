"""A run handed to a server: wait for clients, start it, follow it, start it again after a death.

A Flower run that failed never goes on. What goes on is the run directory: a new Flower run of the
same directory continues from its last checkpoint, with the same lineage, so that clients find
their personal state and their ledgers.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from deploy.keys import Keys
from deploy.runs_folder import RunsFolder
from deploy.server_config import ServerConfig
from fedgraft.adapter import natural_order
from fedgraft.config import RUN_CONFIG_KEY, Config
from fedgraft.errors import DIVERGED, ConfigError, FedGraftError, RunError
from fedgraft.flower import write_app
from fedgraft.nodes import nodes_of
from fedgraft.run_directory import OUT_KEY, RunDirectory
from fedgraft.runs import AwayError, Runs
from server.progress import FAILED, FINISHED, ProgressReader, failure
from server.session import free_path
from strategies.fitness import check_rule
from strategies.registry import build_rule

log = logging.getLogger(__name__)
CLIENT_APP = "client.relay:app"
"""What SuperNodes start for a message: it hands it to the client's resident trainer."""
_POLL_SECONDS, _ASK_SECONDS = 0.1, 1.0
_SERVER_SECONDS = 60.0
"""How long a server that was started just before may take to answer."""
_END_SECONDS = 90.0
"""How long a ServerApp may take to notice that its run is over."""
_LONGEST_PAUSE = 30.0
_ATTEMPTS = 10
"""Attempts that may fail one after the other without a round that is done."""
_LOCAL = ("task.data", "evaluate.data", "model.base", "adapter.from")
"""Keys that may name a file or folder of this machine."""
_RUNS = Path("runs")
"""Where runs lie that name no folder of their own."""
Say = Callable[[str], None]


class DeathError(RunError):
    """A run's ServerApp or SuperLink ended without saying why."""


def prepare(config: Config, out: Path | None) -> RunDirectory:
    """Start the directory of a new run.

    What takes the base or the data is found by the ServerApp, which says it before the first round.

    Args:
        config: the run's.
        out: the directory; `runs/<strategy>-seed<seed>` with a number by default.

    Raises:
        ConfigError: an unknown strategy, a config that it cannot honour, or a directory in use.
    """
    check_rule(build_rule(config.strategy.name, config.strategy.options), config)
    path = out or free_path(_RUNS, f"{config.strategy.name}-seed{config.seed}")
    RunDirectory.check_free(path)
    whole = _with_whole_paths(config)
    return RunDirectory.create(path, whole, uuid.uuid4().hex, deployed=True)


def _with_whole_paths(config: Config) -> Config:
    """Make paths absolute: the ServerApp stands in another folder."""
    tree = config.to_dict()
    whole = {}
    for key in _LOCAL:
        group, name = key.split(".")
        given = tree.get(group, {}).get(name)
        if isinstance(given, str) and Path(given).exists():
            whole[key] = str(Path(given).absolute())
    return config.with_overrides(whole) if whole else config


class Submission:
    """One run on one server.

    Args:
        server: whose SuperLink runs it.
        config: the run's.
        directory: the run's, new or to be continued.
        say: shows a line to whoever waits.
        client_app: what the SuperNodes start.
    """

    def __init__(
        self,
        server: ServerConfig,
        config: Config,
        directory: RunDirectory,
        say: Say,
        client_app: str = CLIENT_APP,
    ) -> None:
        self.server, self.config, self.directory = server, config, directory
        self._say = say
        self._client_app = client_app
        self._submitted = RunsFolder(server)

    def run(self, *, until_done: bool = False) -> None:
        """Run it to its end.

        Args:
            until_done: after a failure, wait for server and clients and continue.

        Raises:
            FedGraftError: it failed; what went wrong and what to do.
            KeyboardInterrupt: Ctrl-C; the Flower run has been stopped.
        """
        fresh = not self.directory.checkpoints.exists()
        idle = 0  # failures since the last round that was done
        while True:
            before = self._rounds_done()
            try:
                self._attempt(until_done)
                return
            except FedGraftError as error:
                if error.exit_status == ConfigError.exit_status and fresh and before < 0:
                    self._forget()
                idle = 0 if self._rounds_done() > before else idle + 1
                if not until_done or not _may_pass(error) or idle >= _ATTEMPTS:
                    raise
                why = error.message
            pause = min(_LONGEST_PAUSE, 2.0**idle / 2)
            self._say(f"{why}; trying again after round {max(0, self._rounds_done())}")
            time.sleep(pause)

    def _forget(self) -> None:
        """Remove the directory of a run that could not begin, so that its name is free again."""
        if not self.directory.rounds():
            shutil.rmtree(self.directory.path, ignore_errors=True)
            if self.directory.path.parent == _RUNS:
                with suppress(OSError):  # other runs are in it
                    _RUNS.rmdir()

    def _rounds_done(self) -> int:
        return max((int(record["round"]) for record in self.directory.rounds()), default=-1)

    def _attempt(self, until_done: bool) -> None:
        runs = Runs(self.server.superlink_port, self.server.keys / "server" / "ca.crt")
        with closing(runs):
            run_id = self._at_work(runs)
            if run_id is None:
                self._wait_for_clients(until_done)
                if self.directory.busy:
                    raise RunError(
                        f"another process is at work on the run in {self.directory.path}",
                        "Let it finish, or end it first.",
                    )
                reader = ProgressReader(self.directory.progress)
                run_id = self._start(runs)
            else:
                self._say("The run is at work already; following it")
                reader = ProgressReader.of_session(self.directory.progress)
            try:
                self._follow(runs, run_id, reader, until_done)
            except BaseException:
                self._end(runs, run_id)
                raise

    def _at_work(self, runs: Runs) -> int | None:
        """Return the Flower run that works on this directory, where a submit was cut off."""
        if not self.directory.busy:
            return None
        run_id = self._submitted.run_of(self.directory.path)
        if run_id is None or runs.get(run_id).finished:
            return None
        return run_id

    def _start(self, runs: Runs) -> int:
        run_config: Mapping[str, str] = {
            RUN_CONFIG_KEY: self.config.to_json(),
            OUT_KEY: str(self.directory.path.absolute()),
        }
        with tempfile.TemporaryDirectory(prefix="fedgraft-app-") as folder:
            write_app(Path(folder), run_config, client_app=self._client_app)
            run_id = runs.start(Path(folder))
        self._submitted.note(run_id, self.directory.path)
        return run_id

    # Waiting

    def _wait_for_clients(self, patient: bool) -> None:
        """Wait until federation.min-clients are online, and say whom it waits for.

        Raises:
            ConfigError: fewer are invited.
            RunError: they are not online within federation.deadline, unless patient.
        """
        least = self.config.federation.min_clients
        began = time.monotonic()
        end = began + self.config.federation.deadline
        told = ""
        while True:
            invited = sorted(Keys(self.server.keys).invited(), key=natural_order)
            if len(invited) < least:
                raise ConfigError(
                    f"federation.min-clients is {least}, and {len(invited)} clients are invited"
                    f"{': ' if invited else ''}{', '.join(invited)}",
                    f"Invite more: fedgraft keys client NAME --dir {self.server.keys}; or lower "
                    "federation.min-clients.",
                )
            try:
                online = self.online()
            except RunError as error:
                if not patient and time.monotonic() - began > _SERVER_SECONDS:
                    raise
                text = f"Waiting: {error.message}"
            else:
                there = [name for name in invited if name in online]
                if len(there) >= least:
                    return
                absent = ", ".join(name for name in invited if name not in online)
                text = (
                    f"Waiting for {least - len(there)} more of {least} clients; not there: {absent}"
                )
            if text != told:
                self._say(text)
                told = text
            if time.monotonic() > end and not patient:
                raise RunError(
                    f"{text}, within {self.config.federation.deadline:g} s",
                    "Start them (fedgraft client), or lower federation.min-clients.",
                )
            time.sleep(_ASK_SECONDS)

    def online(self) -> set[str]:
        """Return the names of the clients that are online.

        Raises:
            RunError: the SuperLink does not answer.
        """
        certificate = self.server.keys / "server" / "ca.crt"
        with nodes_of(self.server.superlink_port, certificate) as nodes:
            return {node.name for node in nodes.all() if node.status == "online"}

    # Following

    def _follow(self, runs: Runs, run_id: int, reader: ProgressReader, patient: bool) -> None:
        """Wait for the end of a Flower run.

        Raises:
            FedGraftError: what the ServerApp said of its failure.
            DeathError: it, or the SuperLink, is gone without a word.
        """
        began, away = False, ""
        next_ask = 0.0
        while True:
            # In this order: whoever let go of the directory has written all its events.
            busy = self.directory.busy
            if _ended(reader.events()):
                return
            if began and not busy:
                raise DeathError(f"the ServerApp died{f' ({away})' if away else ''}")
            began = began or busy
            if time.monotonic() >= next_ask:
                next_ask = time.monotonic() + _ASK_SECONDS
                try:
                    found, away = runs.get(run_id), ""
                except AwayError as error:
                    away = error.message
                    if not busy and not patient:
                        raise
                else:
                    if found.finished:
                        if _ended(reader.events()):
                            return
                        why = found.details or "it does not say why"
                        raise DeathError(f"Flower ended the run: {found.outcome} ({why})")
            time.sleep(_POLL_SECONDS)

    def _end(self, runs: Runs, run_id: int) -> None:
        """End a Flower run, and wait until nobody works on the directory any more."""
        end = time.monotonic() + _END_SECONDS
        stopped = False
        while time.monotonic() < end:
            if not stopped:
                with suppress(RunError):  # it is away, and will have failed the run when it is back
                    runs.stop(run_id)
                    stopped = True
            if not self.directory.busy:
                return
            time.sleep(_POLL_SECONDS)
        log.warning("The ServerApp of run %d still works on %s", run_id, self.directory.path)


def _ended(events: list[dict[str, Any]]) -> bool:
    """Whether these events tell of the run's end.

    Raises:
        FedGraftError: they tell of its failure.
    """
    for event in events:
        if event["event"] == FAILED:
            raise failure(event)
        if event["event"] == FINISHED:
            return True
    return False


def _may_pass(error: FedGraftError) -> bool:
    """Whether another attempt may do better: not after a wrong config, nor after a divergence."""
    return error.exit_status != ConfigError.exit_status and DIVERGED not in error.message
