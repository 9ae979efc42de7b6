"""The run directory: everything one run leaves behind, and the only place its layout is known.

config.toml    the resolved config, the lineage, and the versions of what computed it
clients.json   what clients last told that anybody may know: privacy spent and left, refusals
rounds.jsonl   one object a round, round 0 being the untouched start
samples.jsonl  what the global adapter writes after fixed prompts, round by round
summary.json   the run in one object, written when it has finished
adapter/       the chosen adapter as PEFT loads it
checkpoints/   what a resume continues from
personal/      what simulated clients keep between rounds
ledgers/       what simulated clients' data, and the server's, have been asked under privacy
spool/         the updates of the round at work
plots/, report.html, run.log, progress.jsonl (what the screen follows)
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tomli_w

from fedgraft.config import RECORDED, Config
from fedgraft.errors import ConfigError, RunError
from fedgraft.files import disk_errors, remove_debris, write_json, write_text
from fedgraft.settings import read_toml

OUT_KEY = "fedgraft.out"
"""Key of Flower's run config that holds the run directory's path."""
PERSONAL_KEY = "fedgraft.personal"
"""Key of Flower's run config that tells simulated clients where to keep personal state."""
LEDGER_KEY = "fedgraft.ledgers"
"""Key of Flower's run config that tells simulated clients where to keep their privacy ledgers."""

PLAN_FILE = "comparison.toml"
"""What tells a comparison's directory from a run's: strategies, seeds, grid and common config."""

_PACKAGES = ("fedgraft", "flwr", "torch", "peft", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


class RunDirectory:
    """One run's directory. Use `create` for a new run and `open` for one that exists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.toml"
        self.clients_file = path / "clients.json"
        self.rounds_file = path / "rounds.jsonl"
        self.samples_file = path / "samples.jsonl"
        self.summary_file = path / "summary.json"
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoints"
        self.personal = path / "personal"
        self.ledgers = path / "ledgers"
        self.spool = path / "spool"
        self.plots = path / "plots"
        self.report = path / "report.html"
        self.log = path / "run.log"
        self.progress = path / "progress.jsonl"

    @classmethod
    def create(
        cls, path: Path, config: Config, lineage: str, *, deployed: bool = False
    ) -> RunDirectory:
        """Start a new run's directory.

        Args:
            path: where; it holds no run yet.
            config: the run's.
            lineage: the run's id.
            deployed: its clients are machines of their own, and `fedgraft submit` goes on with it.

        Raises:
            ConfigError: the directory already holds a run, or something that is not a run.
            RunError: the disk is full or refuses the write.
        """
        cls.check_free(path)
        directory = cls(path)
        directory.write_config(config, lineage, deployed=deployed)
        return directory

    @staticmethod
    def check_free(path: Path) -> None:
        """Check that a new run may be written to a path.

        Raises:
            ConfigError: it already holds a run, or something that is not a run.
        """
        comparison = (path / PLAN_FILE).exists()
        if comparison or (path / "config.toml").exists():
            raise ConfigError(
                f"{path} already holds a {'comparison' if comparison else 'run'}",
                f"Continue it with --resume {path}, or choose another --out.",
            )
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(f"{path} exists and is not an empty folder", "Choose another --out.")

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run's directory.

        Raises:
            ConfigError: there is no run in it.
        """
        directory = cls(path)
        if (path / PLAN_FILE).is_file():
            raise ConfigError(
                f"{path} holds a comparison, not a run",
                f"Go on with it: fedgraft compare --resume {path}; or name one of its runs: "
                f"{path}/runs/*.",
            )
        if not directory.config_file.is_file():
            raise ConfigError(
                f"{path} holds no run: it has no config.toml",
                "Name a directory that fedgraft simulate, compare or submit wrote.",
            )
        return directory

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run inside the block, so that no two processes work on it at a time.

        What a killed process left half written is removed first.

        Raises:
            RunError: another process holds it.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"another process is at work on the run in {self.path}",
                    "Let it finish, or end it first.",
                ) from None
            except OSError:
                pass  # a file system without locks
            else:
                remove_debris(self.path)
            yield
        finally:
            os.close(descriptor)

    @property
    def busy(self) -> bool:
        """Whether some process holds the run."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
        finally:
            os.close(descriptor)
        return False

    def write_config(self, config: Config, lineage: str, *, deployed: bool | None = None) -> None:
        """Write config.toml: the resolved config with the run's lineage and versions.

        Args:
            config: resolved.
            lineage: the run's id.
            deployed: see `create`; None keeps what the file says.
        """
        run: dict[str, Any] = {"lineage": lineage}
        if self.deployed if deployed is None else deployed:
            run["deployed"] = True
        tree = config.to_dict() | {"run": run, "versions": versions()}
        write_text(self.config_file, tomli_w.dumps(tree))

    def _config_tree(self) -> dict[str, Any]:
        tree = read_toml(self.config_file)
        if not isinstance(tree.get("run"), dict) or "lineage" not in tree["run"]:
            raise ConfigError(
                f"{self.config_file} is a config, but not one of a run: it names no lineage",
                f"Start a run of it: fedgraft simulate {self.config_file} --out DIR.",
            )
        return tree

    def config(self) -> Config:
        """Return the resolved config that the run was started with."""
        tree = self._config_tree()
        return Config.from_dict(
            {key: value for key, value in tree.items() if key not in RECORDED},
            source=str(self.config_file),
        )

    def lineage(self) -> str:
        """Return the id that a run and its resumes share; personal state is keyed by it."""
        return str(self._config_tree()["run"]["lineage"])

    @property
    def deployed(self) -> bool:
        """Whether the run's clients are machines of their own."""
        if not self.config_file.is_file():
            return False
        return read_toml(self.config_file).get("run", {}).get("deployed") is True

    def resume_command(self) -> str:
        """Return the command that goes on with the run."""
        path = shlex.quote(str(self.path))
        if self.deployed:
            return f"fedgraft submit --resume {path} --to server.toml --until-done"
        return f"fedgraft simulate --resume {path}"

    def write_clients(self, told: Mapping[str, Mapping[str, Any]]) -> None:
        """Write clients.json, as `clients` returns it.

        Raises:
            RunError: the disk is full or refuses the write.
        """
        write_json(self.clients_file, told)

    def clients(self) -> dict[str, dict[str, Any]]:
        """Return what clients last told, by name: epsilon, epsilon-left, policy (a refusal).

        Each is there where a client told it.
        """
        if not self.clients_file.exists():
            return {}
        found: dict[str, dict[str, Any]] = json.loads(self.clients_file.read_text())
        return found

    def append_round(self, record: dict[str, Any]) -> None:
        """Append one round's record to rounds.jsonl.

        Raises:
            RunError: the disk is full or refuses the write.
        """
        _append(self.rounds_file, [record])

    def rounds(self) -> list[dict[str, Any]]:
        """Return the records of rounds.jsonl; a last line cut by a crash is not one of them."""
        return _records(self.rounds_file)

    def append_samples(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append what was written in one round to samples.jsonl.

        Raises:
            RunError: the disk is full or refuses the write.
        """
        _append(self.samples_file, records)

    def samples(self) -> list[dict[str, Any]]:
        """Return the records of samples.jsonl, none where the run wrote no samples."""
        return _records(self.samples_file)

    def keep_rounds(self, last: int) -> None:
        """Drop the records of rounds after `last`, which a resume is about to run again."""
        for path in (self.rounds_file, self.samples_file):
            if path.exists() or path == self.rounds_file:
                kept = [record for record in _records(path) if record["round"] <= last]
                write_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json, the sign that a run has finished."""
        write_json(self.summary_file, summary)

    def summary(self) -> dict[str, Any] | None:
        """Return the run's summary, or None while it has not finished."""
        if not self.summary_file.exists():
            return None
        loaded: dict[str, Any] = json.loads(self.summary_file.read_text())
        return loaded


def _append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON object a line."""
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    with disk_errors(path), path.open("a") as file:
        file.write(lines)


def _records(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object a line; a last line cut by a crash is passed over.

    Raises:
        RunError: another line is damaged.
    """
    records: list[dict[str, Any]] = []
    if not path.exists():
        return records
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise RunError(f"{path}, line {number}, is damaged") from None
    return records
