"""What a report's sections say beyond plots and the main table, as plain rows for its template."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedgraft.settings import flatten
from server.guarantee import in_words, terms
from server.results import Results, Run
from server.series import clients_at_chosen_round, natural
from server.units import NOTHING, Unit, clip, listed, number, ranges

_COUNTS = ("examples", "answers")
"""What stands among an evaluation's metrics and says what they were measured on."""


@dataclass(frozen=True)
class ClientRow:
    """One client's cells; `results` are text and whether it is the strategy's worst client."""

    client: str
    description: str
    examples: str
    start: str
    results: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class MetricRow:
    """One metric of the test split: at the start, and each strategy's mean over seeds."""

    name: str
    start: str
    results: tuple[str, ...]


@dataclass(frozen=True)
class Incident:
    """A client that failed, or an update that was refused, in the same rounds of these seeds."""

    label: str
    seeds: str
    client: str
    kind: str
    reason: str
    rounds: str


@dataclass(frozen=True)
class Setting:
    """A config key in which strategies differ, with each one's value."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class RunRow:
    """One run's cells, as text; the metrics are of the test split but for `validation`."""

    label: str
    seed: int
    initial: str
    final: str
    best_round: str
    validation: str
    rounds: str
    failed: str
    refused: str
    folder: str


def facts(results: Results) -> list[tuple[str, str]]:
    """Return what was run, in a few words each."""
    runs = [run.summary for run in results.runs]
    seeds = sorted({run.seed for run in results.runs})
    return [
        ("task", str(runs[0]["task"])),
        *_shared_words(results),
        ("metric", results.unit.name),
        ("clients", _distinct(run.get("clients") for run in runs)),
        ("rounds", _distinct(run.get("rounds") for run in runs)),
        ("seeds", ranges(seeds)),
        ("runs", str(len(runs))),
    ]


def _shared_words(results: Results) -> list[tuple[str, str]]:
    """Return what all labels have in common and no table repeats."""
    first = results.labels[0]
    kept = results.names[first].split(" ")
    shared = [word for word in first.split(" ") if word not in kept]
    return [("all of them", " ".join(shared))] if shared else []


def client_rows(results: Results) -> list[ClientRow]:
    """Return every client's validation metric at the chosen round, by strategy."""
    unit = results.unit
    found = {
        label: clients_at_chosen_round(results.of(label), unit.metric) for label in results.labels
    }
    pick = min if results.direction == "max" else max
    worst = {
        label: pick(by_client, key=lambda client: by_client[client].mean)
        for label, by_client in found.items()
        if by_client
    }
    rows = []
    for client in sorted({c for by_client in found.values() for c in by_client}, key=natural):
        known = [by_client[client] for by_client in found.values() if client in by_client]
        examples = known[0].examples
        rows.append(
            ClientRow(
                client=clip(client, 40),
                description=clip(known[0].description, 80),
                examples=f"{examples:,.0f}" if math.isfinite(examples) else NOTHING,
                start=unit.value(known[0].start),
                results=tuple(
                    (unit.value(by_client[client].mean), worst.get(label) == client)
                    if client in by_client
                    else (NOTHING, False)
                    for label, by_client in found.items()
                ),
            )
        )
    return rows


def metric_rows(results: Results) -> list[MetricRow]:
    """Return the test metrics beside the watched one; none where runs measured no other."""
    by_label = [results.of(label) for label in results.labels]
    tests = [[run.summary.get("test") or {} for run in runs] for runs in by_label]
    names = dict.fromkeys(name for runs in tests for test in runs for name in test.get("final", {}))
    rows = []
    for name in names:
        if name in (results.unit.metric, *_COUNTS):
            continue
        unit = Unit(name)
        rows.append(
            MetricRow(
                name=clip(unit.name, 60),
                start=unit.value(_mean_of(tests[0], "initial", name)),
                results=tuple(unit.value(_mean_of(runs, "final", name)) for runs in tests),
            )
        )
    return rows


def _mean_of(tests: Sequence[Mapping[str, Mapping[str, object]]], when: str, name: str) -> float:
    values = [number(test.get(when, {}).get(name)) for test in tests]
    return sum(values) / len(values)


def keeps_back(run: Run) -> bool:
    """Whether a run's records leave out who took part: a private one that is no study."""
    privacy = run.summary.get("privacy")
    return privacy is not None and not privacy["study"]


def incidents(results: Results) -> list[Incident]:
    """Return the failed clients and the refused updates, alike ones of several seeds together.

    Of a run that keeps back who took part: the clients whose policy refused a round, and not when.
    """
    rounds: dict[tuple[str, str, str, str], dict[int, list[int]]] = {}
    for run in results.runs:
        for r, record in run.rounds.items():
            for kind in ("failed", "refused"):
                for client, reason in (record.get(kind) or {}).items():
                    what = (run.label, clip(client, 40), kind, clip(str(reason), 300))
                    rounds.setdefault(what, {}).setdefault(run.seed, []).append(r)
    rows = [
        Incident(run.label, str(run.seed), clip(client, 40), "failed", clip(why, 300), NOTHING)
        for run in results.runs
        if keeps_back(run)
        for client, why in (run.summary.get("policy_refusals") or {}).items()
    ]
    for (label, client, kind, reason), by_seed in rounds.items():
        alike: dict[str, list[int]] = {}
        for seed, found in by_seed.items():
            alike.setdefault(ranges(found), []).append(seed)
        rows += [
            Incident(label, ranges(seeds), client, kind, reason, when)
            for when, seeds in alike.items()
        ]
    return rows


def notes(results: Results) -> list[str]:
    """Return what rules and runs had to say, each once, with the runs that said it."""
    said: dict[str, dict[str, list[int]]] = {}
    for run in results.runs:
        for note in _notes(run):
            seeds = said.setdefault(note, {}).setdefault(run.label, [])
            if run.seed not in seeds:
                seeds.append(run.seed)
    found = list(results.notes)
    for note, by_label in said.items():
        who = listed([f"{label}, seed {ranges(seeds)}" for label, seeds in by_label.items()])
        found.append(f"{note} ({who})")
    return found


def run_rows(results: Results) -> list[RunRow]:
    """Return every run's own numbers."""
    unit = results.unit
    return [
        RunRow(
            label=run.label,
            seed=run.seed,
            initial=unit.value(number(run.summary.get("initial"))),
            final=unit.value(number(run.summary["final"])),
            best_round=_text(run.summary["best_round"]),
            validation=unit.value(number(run.summary.get("validation_best"))),
            rounds=_text(run.summary.get("rounds")),
            failed=_text(run.summary.get("failed_clients")),
            refused=_text(run.summary.get("refused_updates")),
            folder=run.name,
        )
        for run in results.runs
    ]


def settings(results: Results) -> list[Setting]:
    """Return the config keys in which the strategies' runs differ, other than the seed."""
    flat = {label: flatten(results.of(label)[0].config) for label in results.labels}
    keys = dict.fromkeys(key for config in flat.values() for key in config)
    rows = [
        Setting(key, tuple(_text(config.get(key)) for config in flat.values()))
        for key in keys
        if key not in ("seed", "strategy.name")
    ]
    return [row for row in rows if len(set(row.values)) > 1]


def promises(results: Results) -> list[str]:
    """Return what the epsilons of the runs stand for, each way once."""
    private = [run.summary["privacy"] for run in results.runs if run.summary.get("privacy")]
    return list(dict.fromkeys(f"Epsilon is {terms(promised)}." for promised in private))


def versions(results: Results) -> list[tuple[str, str]]:
    """Return the versions that computed the runs, all of them where runs differ."""
    packages = dict.fromkeys(package for run in results.runs for package in run.versions)
    return [
        (package, _distinct(run.versions.get(package) for run in results.runs))
        for package in packages
    ]


def _notes(run: Run) -> Iterable[str]:
    if run.summary.get("privacy"):
        yield f"Differential privacy: {in_words(run.summary['privacy'])}."
    if run.summary.get("stopped_early"):
        yield "Stopped early: validation had not improved for evaluate.patience evaluations."
    if run.summary.get("budget_spent"):
        yield "Stopped early: the clients had no privacy budget left for another round."
    for note in run.summary.get("notes") or ():
        yield str(note)
    for record in run.rounds.values():
        for note in record.get("notes") or ():
            yield str(note)


def _distinct(values: Iterable[object]) -> str:
    return " / ".join(dict.fromkeys(str(value) for value in values if value is not None))


def _text(value: object) -> str:
    if value is None:
        return NOTHING
    return str(value).lower() if isinstance(value, bool) else str(value)
