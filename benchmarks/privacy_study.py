"""The study of docs/privacy.md: does training B alone pay off where examples are kept private?

    python benchmarks/privacy_study.py digits --plot docs/images/privacy-study.png
    python benchmarks/privacy_study.py sst2 --base FOLDER --data FOLDER

Three clients whose labels differ train by DP-SGD (`privacy.mode = "example"`), each towards the
same epsilon at delta 1e-5 for each of its examples, however many it has; "none" is the same run
without clipping and noise. All is drawn from seeds: a study, and no release.

First every rule at every epsilon tries some learning rates, on seed 100, and takes the one of the
best validation metric. Then come the seeds that count. Prints, as Markdown,

- the validation metric by learning rate;
- the test metric by rule and epsilon, mean and standard deviation over seeds, with the paired
  difference from FedAvg at the same epsilon and its 95% interval;
- the noise that each epsilon asks for, medians and ranges over clients and seeds;
- how much of a round is noise, layer by layer: the first round of each rule's run of the last seed,
  taken again from the adapter that the run chose, with its noise and without.

Both steps are what `fedgraft compare` does, and the directories below --out hold ordinary
comparisons with their reports; run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from privacy_signal import signal

from fedgraft.config import Config
from fedgraft.privacy.ledger import Ledger
from fedgraft.run_directory import PLAN_FILE
from fedgraft.settings import parse_settings
from server.figure import Sheet, colour, key_of, look, plain_style
from server.results import read_results
from server.statistics import BySeed, finals, mean_and_sd, paired_differences, paired_interval
from server.units import Unit
from simulations.compare import compare
from simulations.plan import Plan

FIRST = "fedavg"
TUNING_SEED = 100
COMMON = {
    "federation.clients": 3,
    "federation.partition": "dirichlet",
    "train.optimizer": "sgd",
    "evaluate.clients": False,
    "checkpoint.every": 1000,
    "threads": 1,
}
DIGITS = COMMON | {
    "adapter.targets": ["q_proj", "v_proj"],
    "federation.concentration": 0.3,
    "federation.rounds": 10,
    "train.steps": 4,
    "train.batch-size": 52,
    "evaluate.every": 5,
}
SST2 = COMMON | {
    "task.name": "text-classification",
    "task.text-field": "sentence",
    "task.max-length": 24,
    "task.samples": 6000,
    "adapter.targets": ["query", "value"],
    "adapter.rank": 4,
    "federation.concentration": 1.0,
    "federation.rounds": 8,
    "train.optimizer": "adamw",
    "train.steps": 6,
    "train.batch-size": 48,
    "evaluate.every": 4,
    "evaluate.samples": 400,
}


@dataclass(frozen=True)
class Experiment:
    """A comparison of rules at some budgets.

    Attributes:
        words: what it looks for.
        settings: of all its runs.
        rules: FedAvg first.
        rates: learning rates to try by epsilon; None is training without privacy.
    """

    words: str
    settings: dict[str, Any]
    rules: tuple[str, ...]
    rates: dict[float | None, tuple[float, ...]]

    @property
    def budgets(self) -> tuple[float | None, ...]:
        """The epsilons, in the order of tables."""
        return tuple(self.rates)

    def variants(self, budgets: Sequence[float | None]) -> dict[str, tuple[str, float | None]]:
        """Return rule and budget by the name that a comparison knows them by."""
        return {variant(rule, budget): (rule, budget) for budget in budgets for rule in self.rules}


EXPERIMENTS = {
    "digits": Experiment(
        "handwritten digits, a small vision transformer, Dirichlet 0.3 over labels",
        DIGITS,
        (FIRST, "ffa-lora", "lora-fair", "fedsvd"),
        {
            None: (0.4, 0.8, 1.6, 3.2),
            6.0: (0.4, 0.8, 1.6, 3.2),
            3.0: (0.2, 0.4, 0.8, 1.6),
            1.0: (0.1, 0.2, 0.4, 0.8),
        },
    ),
    "sst2": Experiment(
        "sentiment of 6,000 sentences, MiniLM, Dirichlet 1 over labels",
        SST2,
        (FIRST, "ffa-lora"),
        {None: (0.004, 0.008, 0.016), 3.0: (0.002, 0.008)},
    ),
}


def named(budget: float | None) -> str:
    return "none" if budget is None else f"{budget:g}"


def variant(rule: str, budget: float | None) -> str:
    return f"{rule}-{named(budget)}"


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    experiment = narrowed(EXPERIMENTS[args.study], args)
    path = args.out / args.study
    print(f"## {args.study}: {experiment.words}\n\nLearning rates, by validation:\n")
    print("\n".join(rates_table(experiment, path, args)), flush=True)
    study = path / "study"
    run(planned(experiment, experiment.budgets, args, best_rates(experiment, path)), study)
    for lines in (table, noise_table, signal_table):
        print("\n" + "\n".join(lines(study, experiment)), flush=True)
    if args.plot is not None:
        draw(study, experiment, args.plot)
    return 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=list(EXPERIMENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", help="only these")
    parser.add_argument("--budgets", nargs="+", help="only these epsilons, or none")
    parser.add_argument("--out", type=Path, default=Path("runs/privacy"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--base", help="sst2: the model's folder or Hub id")
    parser.add_argument("--data", help="sst2: a file or folder of rows")
    parser.add_argument("--plot", type=Path, help="draw the table, into this file")
    return parser.parse_args(argv)


def narrowed(experiment: Experiment, args: argparse.Namespace) -> Experiment:
    """Return the part of a study that the command line asks for."""
    rules = tuple(rule for rule in experiment.rules if rule in (args.rules or experiment.rules))
    rates = {
        budget: rates
        for budget, rates in experiment.rates.items()
        if not args.budgets or named(budget) in args.budgets
    }
    return replace(experiment, rules=rules, rates=rates)


def planned(
    experiment: Experiment,
    budgets: Sequence[float | None],
    args: argparse.Namespace,
    rates: Mapping[str, float] | None = None,
) -> Plan:
    """Return the comparison of the rules at some budgets.

    Args:
        experiment: the study.
        budgets: some of its own, or one where the learning rates are to be found.
        args: the command line's.
        rates: each variant's; None to try those of the one budget.
    """
    settings = dict(experiment.settings)
    if "task.name" in settings:
        settings |= {"model.base": args.base, "task.data": args.data}
    variants = experiment.variants(budgets)
    for name, (rule, budget) in variants.items():
        settings[f"compare.{name}.strategy.name"] = rule
        if budget is not None:
            settings[f"compare.{name}.privacy.mode"] = "example"
            settings[f"compare.{name}.privacy.target-epsilon"] = budget
        if rates is not None:
            settings[f"compare.{name}.train.lr"] = rates[name]
    config = Config().with_overrides(settings | parse_settings(args.set))
    if rates is not None:
        return Plan(config, tuple(variants), tuple(args.seeds), references=())
    (budget,) = budgets
    grid = {"train.lr": list(experiment.rates[budget])}
    return Plan(config, tuple(variants), (TUNING_SEED,), grid, references=())


def run(plan: Plan, path: Path) -> None:
    """Run a comparison, or what of it is not done yet."""
    if (path / PLAN_FILE).is_file():
        compare(Plan.read(path), path, resume=True)
    else:
        compare(plan, path)


# What came of it


def rates_table(experiment: Experiment, path: Path, args: argparse.Namespace) -> Iterator[str]:
    """Find the learning rates, and yield the validation metric of each."""
    yield "| epsilon | rule | validation, by learning rate |"
    yield "|---|---|---|"
    for budget in experiment.budgets:
        run(planned(experiment, [budget], args), rates_path(path, budget))
        unit, found = validation(rates_path(path, budget))
        for rule in experiment.rules:
            metrics = found[variant(rule, budget)]
            cells = [f"{rate:g}: {unit.value(metric)}" for rate, metric in metrics.items()]
            yield f"| {named(budget)} | `{rule}` | {', '.join(cells)} |"


def rates_path(path: Path, budget: float | None) -> Path:
    return path / f"rates-{named(budget)}"


def validation(path: Path) -> tuple[Unit, dict[str, dict[float, float]]]:
    """Return the best validation metric by variant and learning rate, and its unit."""
    results = read_results([path])
    found: dict[str, dict[float, float]] = {}
    for summary in results.comparison["runs"]:
        name, rate = summary["label"].split(" train.lr=")
        found.setdefault(name, {})[float(rate)] = summary["validation_best"]
    return results.unit, found


def best_rates(experiment: Experiment, path: Path) -> dict[str, float]:
    """Return each variant's learning rate of the best validation metric."""
    return {
        name: max(metrics, key=lambda rate: metrics[rate])
        for budget in experiment.budgets
        for name, metrics in validation(rates_path(path, budget))[1].items()
    }


def by_budget(path: Path, experiment: Experiment) -> dict[float | None, dict[str, BySeed]]:
    """Return the test metric by budget, rule and seed."""
    found = finals(read_results([path]).comparison["runs"])
    made: dict[float | None, dict[str, BySeed]] = {}
    for name, (rule, budget) in experiment.variants(experiment.budgets).items():
        if name in found:
            made.setdefault(budget, {})[rule] = found[name]
    return made


def table(path: Path, experiment: Experiment) -> Iterator[str]:
    """Yield the lines of the table of rules and budgets."""
    results = read_results([path])
    unit = results.unit
    found = by_budget(path, experiment)
    rules = list(dict.fromkeys(rule for by_rule in found.values() for rule in by_rule))
    yield f"untouched start: {unit.value(results.comparison['runs'][0]['initial'])}\n"
    yield f"| epsilon | {' | '.join(f'`{rule}`' for rule in rules)} |"
    yield "|---" * (len(rules) + 1) + "|"
    for budget, by_rule in found.items():
        first = by_rule[rules[0]]
        cells = [told(unit, first, by_rule[rule]) for rule in rules]
        yield f"| {named(budget)} | {' | '.join(cells)} |"


def noise_table(path: Path, experiment: Experiment) -> Iterator[str]:
    """Yield the noise that the budgets asked for, from the clients' ledgers."""
    runs = json.loads((path / "comparison.json").read_text())["runs"]
    yield "| epsilon | noise multiplier | noise on a mean gradient, in clips | sampling rate |"
    yield "|---|---|---|---|"
    for budget in experiment.budgets:
        releases = [
            Ledger(file).entries[0].release
            for run in runs
            if run["label"] == variant(FIRST, budget)
            for file in sorted((path / run["directory"] / "ledgers").glob("*.jsonl"))
        ]
        if releases:
            batch = experiment.settings["train.batch-size"]
            noise = [release.noise_multiplier for release in releases]
            cells = (noise, [z / batch for z in noise], [r.sampling_rate for r in releases])
            yield f"| {named(budget)} | {' | '.join(map(ranged, cells))} |"


def told(unit: Unit, first: BySeed, own: BySeed) -> str:
    """Return mean and deviation of a rule, and its difference from the first with its interval."""
    text = unit.spread(*mean_and_sd(list(own.values())))
    interval = paired_interval(paired_differences(first, own))
    if own is first or interval is None:
        return text
    values = unit.differences(interval.difference, interval.low, interval.high)
    return "{}; {} [{}, {}]".format(text, *values)


def draw(path: Path, experiment: Experiment, file: Path) -> None:
    """Draw each rule's metric and seeds by budget."""
    unit = read_results([path]).unit
    found = by_budget(path, experiment)
    rules = list(dict.fromkeys(rule for by_rule in found.values() for rule in by_rule))
    with plain_style():
        keys: list[Any] = [(key_of(place), rule) for place, rule in enumerate(rules)]
        sheet = Sheet(f"{unit.title} by privacy budget", keys, height=2.6)
        axes = sheet.axes()
        for place, rule in enumerate(rules):
            shift = 0.09 * (place - (len(rules) - 1) / 2)
            at = [x + shift for x in range(len(found))]
            seeds = [[v * unit.scale for v in by_rule[rule].values()] for by_rule in found.values()]
            means = [fmean(values) for values in seeds]
            private = sum(budget is None for budget in found)  # "none" is first, and no epsilon
            for part in (slice(private), slice(private, None)):
                axes.plot(at[part], means[part], **look(place))
            for x, values in zip(at, seeds, strict=True):
                axes.plot(
                    [x] * len(values),
                    values,
                    "o",
                    ms=2.6,
                    mfc="white",
                    mec=colour(place),
                    mew=0.8,
                )
        axes.set_xticks(range(len(found)), [named(budget) for budget in found])
        axes.set(xlabel="epsilon of each example (small: private)", ylabel=f"{unit.axis}, test")
        png = sheet.png()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png)


def signal_table(path: Path, experiment: Experiment) -> Iterator[str]:
    """Yield how much of a round is noise: medians over layers, and ranges."""
    runs = json.loads((path / "comparison.json").read_text())["runs"]
    last = max(run["seed"] for run in runs)
    folders = {run["label"]: path / run["directory"] for run in runs if run["seed"] == last}
    yield "| epsilon | rule | B | A | product | noise times noise, of the product's noise |"
    yield "|---|---|---|---|---|---|"
    for name, (rule, budget) in experiment.variants(experiment.budgets).items():
        if budget is not None:
            parts = signal(folders[name])
            cells = [ranged(x) for x in (parts.B, parts.A, parts.product, parts.share)]
            yield f"| {named(budget)} | `{rule}` | {' | '.join(cells)} |"


def ranged(values: list[float]) -> str:
    if not values:
        return "–"
    if max(values) == 0.0:
        return "0"
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    sys.exit(main())
