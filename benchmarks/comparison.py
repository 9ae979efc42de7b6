"""The comparisons of docs/strategies.md: every rule on the digits, and where rules part.

    python benchmarks/comparison.py --list
    python benchmarks/comparison.py domain label-skew
    python benchmarks/comparison.py tune tune-sgd --seeds 100
    python benchmarks/comparison.py tune-sst2 --base FOLDER --data train.tsv --seeds 100
    python benchmarks/comparison.py sst2 --base FOLDER --data train.tsv --seeds 0 1 2
    python benchmarks/comparison.py stories --base FOLDER --data gsm8k --seeds 0

Each is what `fedgraft compare` does: settings are those of examples/every-rule.toml, with the
experiment's own over them, and the directory below --out holds an ordinary comparison with its
report. Run again, it goes on where it stopped. Prints a Markdown table: test metric, mean and
standard deviation over seeds; the paired difference from the first row with its 95% interval;
megabytes of a whole run, all clients together; seconds of training and of combining; and the
relative aggregation bias that the rule leaves, in the first round and the mean over rounds.

The tuning ones print which learning rate is best on validation for each rule; every-rule.toml holds
what they found.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from fedgraft.config import Config
from fedgraft.errors import FedGraftError
from fedgraft.run_directory import PLAN_FILE
from fedgraft.settings import parse_settings
from server.results import read_results
from server.series import EXACT, bias_by_round
from server.table import reference_rows, strategy_rows
from simulations.compare import compare
from simulations.plan import Plan

SETTINGS = Path(__file__).parents[1] / "examples" / "every-rule.toml"
SHORT = {"federation.rounds": 25}
LABEL_SKEW = {**SHORT, "federation.partition": "dirichlet", "federation.concentration": 0.1}
EVERY_RULE = (
    *("fedavg", "fedprox", "ffa-lora", "lora-fair", "lora-fair-cosine", "flora", "flexlora"),
    *("hetlora", "fedex-lora", "fedsa-lora", "rolora", "lora-a2", "fedsvd", "fedrot-lora"),
    *("fed-sb", "flasc", "fedrpca", "fedavg-sgd", "scaffold", "fedavgm", "fedadam", "fedyogi"),
    *("fedadagrad", "krum", "multi-krum", "trimmed-mean", "coordinate-median"),
    *("geometric-median", "norm-bounding"),
)
TELLING = ("fedavg", "ffa-lora", "lora-fair", "flexlora", "fedex-lora", "rolora")
SENTIMENT = ("fedavg", "ffa-lora", "lora-fair", "flexlora", "rolora")
SST2 = {
    "task.name": "text-classification",
    "task.max-length": 32,
    "task.samples": 4000,
    "evaluate.samples": 300,
    "evaluate.every": 16,
    "federation.partition": "dirichlet",
    "federation.concentration": 1.0,
    "federation.rounds": 16,
    "train.steps": 8,
    "train.batch-size": 8,
    "train.lr": 0.002,
    "compare.flexlora.train.lr": 0.002,
    "compare.rolora.train.lr": 0.002,
    "compare.ffa-lora.train.lr": 0.008,
    "threads": 1,
}
STORIES = {
    "task.name": "causal-lm",
    "task.samples": 3000,
    "task.max-length": 256,
    "evaluate.samples": 200,
    "evaluate.every": 15,
    "evaluate.clients": False,
    "federation.clients": 10,
    "federation.partition": "iid",
    "federation.rounds": 15,
    "train.steps": 5,
    "train.batch-size": 8,
    "train.lr": 0.003,
    "train.loss": "all",
    "threads": 1,
} | {
    f"compare.{rule}-{kind}": {"strategy.name": rule, "model.quantization": kind}
    for rule in ("fedavg", "ffa-lora", "lora-fair")
    for kind in ("none", "int8", "nf4")
}
MIXABLE = ("multi-krum", "trimmed-mean", "coordinate-median", "geometric-median")
MIXED = {
    f"compare.{rule}-mixing": {"strategy.name": rule, "strategy.mixing": True} for rule in MIXABLE
}
PLAIN_SGD = ("fedavg-sgd", "scaffold")


@dataclass(frozen=True)
class Experiment:
    """A comparison: what it looks for, its settings, and who takes part."""

    words: str
    settings: dict[str, Any] = field(default_factory=dict)
    strategies: tuple[str, ...] = TELLING
    references: tuple[str, ...] = ()
    grid: dict[str, list[Any]] = field(default_factory=dict)


EXPERIMENTS = {
    "tune": Experiment(
        "learning rates for every rule, by validation, on a seed of its own",
        strategies=tuple(name for name in EVERY_RULE if name not in PLAIN_SGD),
        grid={"train.lr": [0.004, 0.008, 0.016, 0.032]},
    ),
    "tune-sgd": Experiment(
        "the same for plain SGD",
        strategies=PLAIN_SGD,
        grid={"train.lr": [0.05, 0.1, 0.2, 0.4]},
    ),
    "domain": Experiment(
        "every rule; six sites with a scanner each", {}, EVERY_RULE, ("base", "centralised")
    ),
    "label-skew": Experiment(
        "every rule; six clients, Dirichlet 0.1 over labels",
        LABEL_SKEW,
        EVERY_RULE,
        ("base", "centralised"),
    ),
    "mixing": Experiment(
        "robust rules without and with nearest-neighbour mixing, nobody hostile; six scanners",
        MIXED,
        ("fedavg", *(name for rule in MIXABLE for name in (rule, f"{rule}-mixing"))),
    ),
    "rank-1": Experiment("rank 1", {**SHORT, "adapter.rank": 1, "adapter.alpha": 2.0}),
    "rank-2": Experiment("rank 2", {**SHORT, "adapter.rank": 2, "adapter.alpha": 4.0}, TELLING[:4]),
    "many-clients": Experiment(
        "sixty clients of thirteen examples each, a fifth of them a round",
        {
            **SHORT,
            "federation.partition": "iid",
            "federation.clients": 60,
            "federation.fraction": 0.2,
        },
    ),
    "many-steps": Experiment(
        "eight rounds of forty steps at a constant rate, Dirichlet 0.1",
        {
            **LABEL_SKEW,
            "federation.rounds": 8,
            "train.steps": 40,
            "train.schedule": "constant",
            "evaluate.every": 1,
        },
        ("fedavg", "fedprox", "ffa-lora", "lora-fair", "flexlora", "fedex-lora"),
    ),
    "constant-rate": Experiment(
        "a constant learning rate", {**SHORT, "train.schedule": "constant"}, TELLING[:4]
    ),
    "mixed-ranks": Experiment(
        "six clients of ranks 8, 8, 4, 2, 1, 1",
        {**SHORT, "federation.ranks": [8, 8, 4, 2, 1, 1]},
        ("fedavg", "ffa-lora", "flora", "flexlora", "flexlora-rank-aware", "hetlora"),
    ),
    "stories": Experiment(
        "grade-school maths, ten clients, a 260K-parameter Llama in float32, INT8 and NF4",
        STORIES,
        tuple(name.removeprefix("compare.") for name in STORIES if name.startswith("compare.")),
        ("base", "centralised"),
    ),
    "tune-sst2": Experiment(
        "learning rates for sentiment, by validation, on a seed of its own",
        SST2,
        SENTIMENT,
        grid={"train.lr": [0.002, 0.004, 0.008]},
    ),
    "sst2": Experiment(
        "sentiment of 4,000 sentences, six clients by Dirichlet 1 over labels, MiniLM",
        SST2,
        SENTIMENT,
        ("base", "centralised"),
    ),
}


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    unknown = set(args.experiments) - set(EXPERIMENTS)
    if args.list or not args.experiments or unknown:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:14} {experiment.words}")
        return 2 if unknown else 0
    for name in args.experiments:
        path = args.out / name
        try:
            if (path / PLAN_FILE).is_file():
                compare(Plan.read(path), path, resume=True)
            else:
                compare(planned(EXPERIMENTS[name], args), path)
        except FedGraftError as error:
            print(f"{error.message}\n{error.remedy}", file=sys.stderr)
            return error.exit_status
        print(f"\n## {name}: {EXPERIMENTS[name].words}\n")
        print("\n".join(tuned(path) if EXPERIMENTS[name].grid else table(path)), flush=True)
    return 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--strategies", nargs="+", help="only these")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--base", help="stories, sst2: the model's folder or Hub id")
    parser.add_argument("--data", help="stories, sst2: a file or folder of rows")
    return parser.parse_args(argv)


def planned(experiment: Experiment, args: argparse.Namespace) -> Plan:
    settings = dict(experiment.settings)
    if "task.name" in settings:
        settings |= {"model.base": args.base, "task.data": args.data}
    config = Config.load(SETTINGS).with_overrides(settings | parse_settings(args.set))
    strategies = tuple(args.strategies or experiment.strategies)
    return Plan(config, strategies, tuple(args.seeds), experiment.grid, experiment.references)


# What came of it


def table(path: Path) -> Iterator[str]:
    """Yield the lines of the table of a comparison's directory."""
    results = read_results([path])
    titles = (
        "strategy",
        "test",
        "difference, 95%",
        "MB up",
        "down",
        "train, s",
        "combine, s",
        "bias",
    )
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    for row in strategy_rows(results.comparison):
        cells = (row.result, row.difference_and_interval, row.up, row.down, row.train)
        bias = remaining(results.of(row.label))
        yield f"| `{row.label}` | " + " | ".join((*cells, row.aggregate, bias)) + " |"
    for reference in reference_rows(results.comparison):
        yield f"| *{reference.label}* | {reference.result} | | | | | | |"


def remaining(runs: Any) -> str:
    """The relative aggregation bias in the first round, and the mean over rounds."""
    after = bias_by_round(runs, "after").mean
    known = after[np.isfinite(after)]
    if not len(known):
        return "-"
    return "0" if known.max() < EXACT else f"{known[0]:.3f}, {known.mean():.3f}"


def tuned(path: Path) -> Iterator[str]:
    """Yield for each rule the best validation by learning rate, and the best of them."""
    runs = json.loads((path / "comparison.json").read_text())["runs"]
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        strategy, rate = run["label"].split(" train.lr=")
        found[strategy][rate].append(run["validation_best"])
    rates = list(next(iter(found.values())))
    yield "| strategy | " + " | ".join(rates) + " | best |"
    yield "|---" * (len(rates) + 2) + "|"
    for strategy, by_rate in found.items():
        means = {rate: fmean(by_rate[rate]) for rate in rates}
        cells = [f"{100.0 * means[rate]:.1f}" for rate in rates]
        best = max(rates, key=lambda rate: means[rate])
        yield f"| `{strategy}` | " + " | ".join([*cells, best]) + " |"


if __name__ == "__main__":
    sys.exit(main())
