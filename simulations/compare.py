"""Compare strategies: strategies x seeds on identical partitions, adapters and client samples.

Every run is an ordinary simulation in a directory of its own; several run side by side where there
are cores. A comparison that was interrupted goes on where it stopped: what is done is not done
again, and a run that was cut short continues from its checkpoint.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgraft.config import Config
from fedgraft.errors import FedGraftError, RunError
from fedgraft.files import write_json, write_text
from fedgraft.logs import hushed
from fedgraft.run_directory import PLAN_FILE, RunDirectory
from fedgraft.settings import flatten
from server import session
from server.screen import Screen, busy
from server.statistics import build_comparison
from simulations.check import check
from simulations.engine import run_engine
from simulations.plan import Plan
from simulations.references import depends_on, reference
from simulations.simulate import lineage
from simulations.workers import at_work


@dataclass(frozen=True)
class Job:
    """One run, or one reference row.

    Attributes:
        label: what tables call it: the strategy with its grid values, or the reference row.
        config: with its seed.
        path: a run's directory, or a reference row's file.
        reference: the row's name; "" for a run.
        runs: the runs that a reference row belongs to; empty where it belongs to all.
    """

    label: str
    config: Config
    path: Path
    reference: str = ""
    runs: tuple[Path, ...] = ()

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
    path = out or session.free_path(Path("runs"), "comparison")
    if not resume:
        RunDirectory.check_free(path)
    with busy("Loading the model and the data"):
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
    references = [
        results[job.path]
        | (
            {"label": job.label, "runs": [str(r.relative_to(path)) for r in job.runs]}
            if job.runs
            else {}
        )
        for job in jobs
        if job.reference
    ]
    comparison = dict(build_comparison(runs, references))
    write_json(path / "comparison.json", comparison)
    with busy("Drawing plots and the report"):
        session.draw(path)
    return comparison


def _jobs(plan: Plan, path: Path) -> list[Job]:
    """Return all jobs with checked configs, runs first in the order of the table."""
    jobs: list[Job] = []
    threads: dict[str, int | None] = {}
    for label, variant in plan.variants().items():
        checked = check(variant.with_overrides({"seed": plan.seeds[0]}))
        threads[label] = checked.threads
        for seed in plan.seeds:
            config = checked.with_overrides({"seed": seed})
            folder = path / "runs" / f"{_slug(label)}-seed{seed}"
            jobs.append(Job(label, config, folder))
    beside = {
        label: config.with_overrides({"threads": threads[label]})
        for label, config in plan.beside().items()
    }
    runs = list(jobs)
    for name in plan.references:
        rows = _rows(name, beside)
        for (label, labels), seed in itertools.product(rows.items(), plan.seeds):
            config = beside[labels[0]].with_overrides({"seed": seed})
            file = path / "references" / f"{_slug(label)}-seed{seed}.json"
            own = [r.path for r in runs if r.label in labels and r.config.seed == seed]
            jobs.append(Job(label, config, file, name, tuple(own) if len(rows) > 1 else ()))
    return jobs


def _rows(name: str, beside: Mapping[str, Config]) -> dict[str, list[str]]:
    """Return the rows that a reference needs, with the labels of the runs that each belongs to.

    A row's label is the reference's name, with the keys in which the rows differ.
    """
    flat = {
        label: {k: v for k, v in flatten(config.to_dict()).items() if depends_on(name, k)}
        for label, config in beside.items()
    }
    keys = dict.fromkeys(key for config in flat.values() for key in config)
    differing = [k for k in keys if len({repr(config.get(k)) for config in flat.values()}) > 1]
    rows: dict[str, list[str]] = {}
    for label, config in flat.items():
        said = (f"{key}={config.get(key, 'unset')}" for key in differing)
        rows.setdefault(" ".join([name, *said]), []).append(label)
    return rows


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", label)


def _run_all(jobs: Sequence[Job], workers: int) -> dict[Path, dict[str, Any]]:
    """Run the jobs in worker processes and return each one's result by its path."""
    results: dict[Path, dict[str, Any]] = {}
    runs = {job.title: RunDirectory(job.path).progress for job in jobs if not job.reference}
    rows = [job.title for job in jobs if job.reference]
    with Screen(runs, rows) as screen, at_work(workers, _run_job, jobs) as waiting:
        while waiting:
            for job in list(waiting.values())[:workers]:  # they are taken in this order
                screen.started(job.title)
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                job = waiting.pop(future)
                try:
                    results[job.path] = future.result()
                except FedGraftError as error:
                    error.message = f"{job.title}: {error.message}"
                    raise
                screen.done(job.title, results[job.path]["metric"], results[job.path]["final"])
    return results


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
    if not session.is_finished(job.config, directory):
        run_engine(job.config, directory)
    summary = directory.summary()
    if summary is None:
        raise RunError(f"the run in {job.path} left no summary", f"See {directory.log}.")
    return summary
