"""A federation on one machine, with faults injected throughout: does it finish, and does it leak?

    python benchmarks/soak.py                              # 20 clients, 20 rounds
    python benchmarks/soak.py --clients 3 --rounds 6       # a short form

`fedgraft server`, its clients and `fedgraft submit --until-done` run as a user starts them, over
TLS with node keys, on loopback. In every round seeded faults strike at seeded moments: kill -9 of
SuperLink, ServerApp, gateway, SuperNodes, trainers and ClientApps, processes stopped for some
seconds, garbage sent to the gateway, and one client cut off for two minutes and back.

The run is submitted for three rounds, then prolonged to all of them; at rest after either,
processes, descriptors, memory and files are counted, and the second count is held against the
first. What is left when all has been told to stop is counted, too. The result is printed as
Markdown.

Exits with status 1 where the run did not complete, a round is missing, anything has leaked, or
anything is left over.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from leaks import MANY, PASSING, Look, Process, leaks
from soak_faults import FAULTS, Injector, plan
from soak_federation import START_SECONDS, Federation, federation, stop, until

EARLY = 3
"""The round after which the first count is taken."""
REST_SECONDS = 20.0
_RUN_SECONDS = 3600.0


@dataclass(frozen=True)
class Outcome:
    """What a soak has come to.

    Attributes:
        early, late: the counts after round three and at the end.
        faults: how many struck, by kind.
        rounds: the run's records.
        tries: how often the run was submitted again after a failure.
        seconds: of both submissions together.
        online: clients that the server had heard of at the end.
        wrong: all that is not as it should be, a line each.
    """

    early: Look
    late: Look
    faults: Counter[str]
    rounds: Sequence[dict[str, Any]]
    tries: int
    seconds: float
    online: int
    wrong: Sequence[str]


def soak(
    folder: Path, clients: int, rounds: int, fraction: float, seed: int, say: Callable[[str], None]
) -> Outcome:
    """Run it.

    Raises:
        TimeoutError: something does not get ready, or does not come to rest.
    """
    settings = {
        "federation.clients": clients,
        "federation.fraction": fraction,
        "federation.min-clients": max(1, round(clients * fraction * 0.4)),
        "federation.deadline": 45,
        "federation.partition": "iid",
        "train.steps": 20,
        "train.batch-size": 8,
        "evaluate.clients": "false",
        "model.device": "cpu",
        "threads": 1,
        "seed": seed,
    }
    faults = plan(rounds, seed)
    directory = folder / "run"
    wrong: list[str] = []
    looks, seconds = [], 0.0
    with federation(folder, clients) as made:
        say(f"{clients} clients are there")
        injector = Injector(made, directory / "progress.jsonl", seed, say)
        for last, more in ((EARLY, ["--out", "run"]), (rounds, ["--resume", "run"])):
            given = {**settings, "federation.rounds": last}
            if looks:
                given = {"federation.rounds": last}
            now = [f for f in faults if (f.round <= EARLY) == (last == EARLY)]
            began = time.monotonic()
            with injector.striking(now):
                wrong += submitted(made, more, given)
            seconds += time.monotonic() - began
            rest(made)
            looks.append(made.look())
            say(f"counted after round {last}: {looks[-1].proportional / 1024:.1f} GiB in all")
        online = made.online()
        wrong += stop(made)
    early, late = looks
    records = [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]
    if [record["round"] for record in records] != list(range(rounds + 1)):
        wrong.append(f"rounds {[record['round'] for record in records]} are in rounds.jsonl")
    if online < clients:
        wrong.append(f"{online} of {clients} clients are online at the end")
    wrong += [f"{kind} never struck" for kind in FAULTS if not injector.struck[kind]]
    wrong += leaks(early, late)
    tries = (folder / "submit.log").read_text().count("trying again after round")
    return Outcome(early, late, injector.struck, records, tries, seconds, online, wrong)


def submitted(made: Federation, more: Sequence[str], settings: dict[str, Any]) -> list[str]:
    """Submit the run with these settings until it is done; return what went wrong."""
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = ["submit", "--to", "server.toml", *more, "--until-done", *words]
    with (made.folder / "submit.log").open("ab") as said:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "fedgraft", *command],
                cwd=made.folder,
                env=made.environment(),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                timeout=_RUN_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return [f"the run was not done in {_RUN_SECONDS:g} s"]
    return [f"submit ended with exit status {done.returncode}"] if done.returncode else []


def rest(made: Federation) -> None:
    """Wait until all parts answer, nothing is at work, and connections have had time to close."""
    until(made.ready, START_SECONDS, "the return of all parts")
    until(lambda: not any(map(made.apps, PASSING)), START_SECONDS, "the end of all apps")
    until(lambda: not made.unfinished(), START_SECONDS, "the end of all runs, also of killed ones")
    time.sleep(REST_SECONDS)


def _median_memory(processes: Sequence[Process]) -> str:
    return f"{statistics.median(one.anonymous for one in processes):.0f}"


def markdown(outcome: Outcome, command: str) -> str:
    """Return the result as it goes into BENCHMARKS.md."""
    early, late = outcome.early, outcome.late
    lines = [
        f"`{command}`, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} cores, load "
        f"average {os.getloadavg()[2]:.1f}",
        "",
        f"| | after round {EARLY} | at the end |",
        "|---|---|---|",
    ]
    for kind in sorted({*early.kinds(), *late.kinds()}):
        lines.append(f"| {kind}: processes | {_each(early, late, kind, len)} |")
        largest = _each(early, late, kind, lambda found: f"{max(p.anonymous for p in found):.0f}")
        lines.append(f"| {kind}: memory of the largest, MiB | {largest} |")
        if len(late.kinds().get(kind, [])) >= MANY:
            middle = _each(early, late, kind, _median_memory)
            lines.append(f"| {kind}: memory of the median one, MiB | {middle} |")
        for sort in ("socket", "pipe", "file"):
            most = _each(
                early, late, kind,
                lambda found, sort=sort: max(p.descriptors.get(sort, 0) for p in found),
            )  # fmt: skip
            lines.append(f"| {kind}: {sort}s, most | {most} |")
    lines.append(
        f"| all: PSS, GiB | {early.proportional / 1024:.2f} | {late.proportional / 1024:.2f} |"
    )
    lines.append(f"| zombies | {early.zombies} | {late.zombies} |")
    for name, count in early.counts.items():
        size = ["", ""]
        if name in early.mebibytes:
            size = [f", {one.mebibytes[name]:.1f} MiB" for one in (early, late)]
        lines.append(f"| {name} | {count}{size[0]} | {late.counts[name]}{size[1]} |")
    asked = [record for record in outcome.rounds if record["round"]]
    used = [len(record["clients"]) for record in asked]
    lines += [
        "",
        f"Faults: {', '.join(f'{kind} {often}' for kind, often in outcome.faults.items())}. "
        f"The run was submitted again {outcome.tries} times after a failure. {len(asked)} rounds "
        f"in {outcome.seconds / 60:.1f} min; {min(used)} to {max(used)} clients a round, "
        f"{statistics.median(used):g} in the median. {outcome.online} clients online at the end.",
        "",
        "Wrong: nothing." if not outcome.wrong else "Wrong:",
        *(f"- {line}" for line in outcome.wrong),
    ]
    return "\n".join(lines)


def _each(early: Look, late: Look, kind: str, say: Callable[[Any], object]) -> str:
    found = [one.kinds().get(kind, []) for one in (early, late)]
    return " | ".join("-" if not one else str(say(one)) for one in found)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--fraction", type=float, default=0.5, help="of the clients, a round")
    parser.add_argument("--seed", type=int, default=0, help="of the faults, and of the run")
    parser.add_argument("--keep", type=Path, help="run in this new folder, and leave it there")
    args = parser.parse_args(argv)
    if args.rounds <= EARLY:
        parser.error(f"--rounds must be more than {EARLY}")
    folder = args.keep or Path(tempfile.mkdtemp(prefix="soak-"))
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=args.keep is None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left running
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {line}", file=sys.stderr, flush=True)

    outcome = soak(folder, args.clients, args.rounds, args.fraction, args.seed, say)
    words = f"--clients {args.clients} --rounds {args.rounds} --fraction {args.fraction:g}"
    print(markdown(outcome, f"python benchmarks/soak.py {words} --seed {args.seed}"))
    if args.keep is None and not outcome.wrong:
        shutil.rmtree(folder)
    elif outcome.wrong:
        print(f"Logs and states are in {folder}.", file=sys.stderr)
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
