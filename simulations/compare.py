"""Compare strategies: strategies x seeds on identical partitions, adapters and client samples.

Every run is an ordinary simulation in a directory of its own; several run side by side where there
are cores. A comparison that was interrupted goes on where it stopped: what is done is not done
again, and a run that was cut short continues from its checkpoint.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fedgraft.config import Config, flatten, read_toml
from fedgraft.errors import ConfigError, RunError
from fedgraft.files import write_json, write_text
from fedgraft.logs import hushed
from fedgraft.run_directory import RunDirectory
from server.screen import Screen
from server.statistics import build_comparison
from simulations.check import check
from simulations.engine import run_engine
from simulations.references import NAMES, reference
from simulations.simulate import draw, free_path, is_finished, lineage

PLAN_FILE = "comparison.toml"


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        config: common to all; its `compare` group sets keys for one strategy.
        strategies: rules by name; differences are from the first.
        seeds: each is run with every strategy.
        grid: further keys with values to try, all combinations.
        references: names of reference rows.
    """

    config: Config
    strategies: tuple[str, ...]
    seeds: tuple[int, ...]
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    references: tuple[str, ...] = NAMES

    def __post_init__(self) -> None:
        for name, values in (("--strategies", self.strategies), ("--seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ConfigError(
                    f"{name} is {','.join(map(str, values)) or 'empty'}",
                    "Name at least one, and each only once.",
                )

    def variants(self) -> dict[str, Config]:
        """Return the configs to run by label, seed 0's of each; the first strategy's come first.

        Raises:
            ConfigError: a key of [compare.<strategy>] or of the grid is unknown.
        """
        common = self.config.to_dict()
        overrides = common.pop("compare", {})
        found: dict[str, Config] = {}
        for strategy in self.strategies:
            base = Config.from_dict(common).with_overrides(
                _options_dropped(common, strategy) | flatten(overrides.get(strategy, {}))
            )
            for values in itertools.product(*self.grid.values()):
                settings = dict(zip(self.grid, values, strict=True))
                label = " ".join([strategy, *(f"{k}={v}" for k, v in settings.items())])
                found[label] = base.with_overrides(settings)
        return found

    def to_toml(self) -> str:
        """Return the plan as TOML, from which a resume reads it back."""
        return tomli_w.dumps(
            {
                "strategies": list(self.strategies),
                "seeds": list(self.seeds),
                "grid": {key: list(values) for key, values in self.grid.items()},
                "references": list(self.references),
                "config": self.config.to_dict(),
            }
        )

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read what `to_toml` wrote.

        Raises:
            ConfigError: there is no comparison in the directory.
        """
        file = path / PLAN_FILE
        if not file.is_file():
            raise ConfigError(f"{path} holds no comparison: it has no {PLAN_FILE}")
        tree = read_toml(file)
        return cls(
            Config.from_dict(tree["config"], source=str(file)),
            tuple(tree["strategies"]),
            tuple(tree["seeds"]),
            tree["grid"],
            tuple(tree["references"]),
        )


@dataclass(frozen=True)
class Job:
    """One run, or one reference row.

    Attributes:
        label: what tables call it: the strategy with its grid values, or the reference row.
        config: with its seed.
        path: a run's directory, or a reference row's file.
        reference: the row's name; "" for a run.
    """

    label: str
    config: Config
    path: Path
    reference: str = ""

    @property
    def title(self) -> str:
        """What the screen calls it."""
        return f"{self.label}, seed {self.config.seed}"


def compare(plan: Plan, out: Path | None = None, *, resume: bool = False) -> dict[str, Any]:
    """Run a comparison and return comparison.json's content.

    Args:
        plan: what to compare.
        out: the directory; a new one under runs/ by default.
        resume: go on with the comparison that `out` holds.

    Raises:
        FedGraftError: what went wrong and what to do; what is done is kept.
    """
    path = out or free_path(Path("runs"), "comparison")
    if not resume:
        RunDirectory.check_free(path)
    jobs = _jobs(plan, path)
    threads = {job.config.threads or 1 for job in jobs}
    write_text(path / PLAN_FILE, plan.to_toml())
    workers = max(1, (os.cpu_count() or 1) // max(threads))
    results = _run_all(jobs, min(workers, len(jobs)))
    runs = [
        results[job.path] | {"label": job.label, "directory": str(job.path.relative_to(path))}
        for job in jobs
        if not job.reference
    ]
    references = [results[job.path] for job in jobs if job.reference]
    comparison = dict(build_comparison(runs, references))
    write_json(path / "comparison.json", comparison)
    draw(path)
    return comparison


def _options_dropped(common: Mapping[str, Any], strategy: str) -> dict[str, Any]:
    """Return the strategy's name as a setting.

    Raises:
        ConfigError: the config sets options of one rule, which another one would not know.
    """
    options = sorted(key for key in common["strategy"] if key != "name")
    if options and common["strategy"]["name"] != strategy:
        raise ConfigError(
            f"strategy.{options[0]} is set for all strategies, and {strategy} may not know it",
            f"Set it under [compare.{common['strategy']['name']}] as strategy.{options[0]}.",
        )
    return {"strategy.name": strategy}


def _jobs(plan: Plan, path: Path) -> list[Job]:
    """Return all jobs with checked configs, runs first in the order of the table."""
    jobs = []
    for label, variant in plan.variants().items():
        checked = check(variant.with_overrides({"seed": plan.seeds[0]}))
        for seed in plan.seeds:
            config = checked.with_overrides({"seed": seed})
            folder = path / "runs" / f"{_slug(label)}-seed{seed}"
            jobs.append(Job(label, config, folder))
    first = jobs[0].config
    for name, seed in itertools.product(plan.references, plan.seeds):
        file = path / "references" / f"{name}-seed{seed}.json"
        config = first.with_overrides({"seed": seed})
        jobs.append(Job(name, config, file, name))
    return jobs


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", label)


def _run_all(jobs: Sequence[Job], workers: int) -> dict[Path, dict[str, Any]]:
    """Run the jobs in worker processes and return each one's result by its path."""
    results: dict[Path, dict[str, Any]] = {}
    screen = Screen({job.title: RunDirectory(job.path) for job in jobs if not job.reference})
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, initializer=_ignore_interrupts)
    waiting: dict[Future[dict[str, Any]], Job] = {}
    with screen:
        try:
            waiting = {executor.submit(_run_job, job): job for job in jobs}
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    job = waiting.pop(future)
                    results[job.path] = future.result()
                    if job.reference:
                        screen.say(f"[green]done[/green] {job.title}")
        except BrokenProcessPool as error:
            raise RunError(
                "a worker process died; most likely memory ran out",
                "Set threads to the number of cores, so that one run goes at a time, and resume.",
            ) from error
        except BaseException:
            _kill_workers(executor)
            raise
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
    return results


def _ignore_interrupts() -> None:
    """Leave Ctrl-C to the parent, which ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _kill_workers(executor: ProcessPoolExecutor) -> None:
    """End the workers at once; their runs continue from their checkpoints."""
    for process in list((executor._processes or {}).values()):
        process.terminate()


def _run_job(job: Job) -> dict[str, Any]:
    """Run one job in a worker; a job that was finished before is only read."""
    if job.reference:
        if not job.path.exists():
            with hushed():
                write_json(job.path, reference(job.reference, job.config))
        row: dict[str, Any] = json.loads(job.path.read_text())
        return row
    if (job.path / "config.toml").exists():
        directory = RunDirectory.open(job.path)
    else:
        directory = RunDirectory.create(job.path, job.config, lineage(job.config))
    if not is_finished(job.config, directory):
        run_engine(job.config, directory)
    summary = directory.summary()
    if summary is None:
        raise RunError(f"the run in {job.path} left no summary", f"See {directory.log}.")
    return summary
