"""Three hostile clients of ten: which rules still learn? Digits, dealt evenly.

    python benchmarks/robustness.py
    python benchmarks/robustness.py --seeds 0 1 2 --rounds 30 --plot docs/images/robustness.png
    python benchmarks/robustness.py --rules "trimmed-mean + mixing" "geometric-median + mixing"

Attacks, each by clients 0, 1 and 2 in every round:

- sign flip: the change of every factor and of the head, turned around and ten times as long;
- noise: normal noise of a hundred times the change's standard deviation, added to it;
- label flip: honest training on wrong labels (digit y is taught as 9 - y).

Prints the test accuracy of the last round's adapter, mean over seeds, as a Markdown table, draws
it, and exits with status 1 where plain FedAvg does not collapse under sign flip and noise, or no
robust rule stays within 5 points of its own clean run under every attack.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message

from fedgraft.settings import parse_settings

HOSTILE = (0, 1, 2)
MIXED = " + mixing"
"""Behind a rule's name: with nearest-neighbour mixing before it."""
RULES = (
    "fedavg",
    "krum",
    "multi-krum",
    "trimmed-mean",
    "coordinate-median",
    "geometric-median",
    "norm-bounding",
)
ATTACKS = ("none", "sign flip", "noise", "label flip")
STRENGTH = {"sign flip": 10.0, "noise": 100.0}
COLLAPSE, ALLOWED = 20.0, 5.0  # points below one's own clean run


@dataclass(frozen=True)
class Trial:
    """One federation: a rule, an attack and a seed."""

    rule: str
    attack: str
    seed: int
    settings: tuple[tuple[str, Any], ...]


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    settings = tuple({"federation.rounds": args.rounds, **parse_settings(args.set)}.items())
    trials = [
        Trial(rule, attack, seed, settings)
        for rule, attack, seed in itertools.product(args.rules, ATTACKS, args.seeds)
    ]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        found = dict(zip(trials, pool.map(accuracy, trials), strict=True))
    results = {
        (rule, attack): [
            100.0 * v for t, v in found.items() if (t.rule, t.attack) == (rule, attack)
        ]
        for rule, attack in itertools.product(args.rules, ATTACKS)
    }
    print(table(results, args.rules))
    if args.plot is not None:
        draw(results, args.rules, args.plot)
    return 0 if args.quick or verdict(results, args.rules) else 1


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="draw the table as bars, into this file")
    parser.add_argument("--quick", action="store_true", help="see that it runs, judge nothing")
    return parser.parse_args(argv)


# One federation


def accuracy(trial: Trial) -> float:
    """Run a federation; return the test accuracy of its last adapter."""
    from fedgraft.config import Config
    from fedgraft.resident_model import resident_model, resident_task
    from server.checkpoint import Checkpoints
    from server.run import run_federation
    from simulations.engine import run_config
    from simulations.in_process import InProcessGrid
    from simulations.simulate import prepare

    settings: dict[str, Any] = {
        "strategy.name": trial.rule.removesuffix(MIXED),
        **({"strategy.mixing": True} if trial.rule.endswith(MIXED) else {}),
        "seed": trial.seed,
        "federation.clients": 10,
        "federation.partition": "iid",
        "evaluate.clients": False,
        "threads": 1,
        **dict(trial.settings),
    }
    settings["evaluate.every"] = settings["federation.rounds"]
    with tempfile.TemporaryDirectory() as folder:
        directory = prepare(Config().with_overrides(settings), Path(folder) / "run")
        config = directory.config()
        app = hostile(trial.attack, trial.seed)
        grid = InProcessGrid(app, config.federation.clients, run_config(config, directory))  # type: ignore[arg-type]
        run_federation(grid, config, directory)
        last = Checkpoints(directory.checkpoints, keep=1).latest()
    assert last is not None
    task = resident_task(config)
    return resident_model(task, config).evaluate(task, last.state.adapter, task.test())["accuracy"]


def hostile(attack: str, seed: int) -> Callable[..., Message]:
    """Return FedGraft's ClientApp with three clients that do what the attack says."""
    from client.app import app
    from fedgraft.adapter import from_arrays, to_arrays
    from fedgraft.messages import Reply, TrainRequest
    from fedgraft.seeds import stream

    def answer(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        if client not in HOSTILE or attack == "none" or message.metadata.message_type != "train":
            return app(message=message, context=context)
        if attack == "label flip":
            with flipped_labels():
                return app(message=message, context=context)
        request = TrainRequest.decode(message.content)
        start = request.tensors()
        reply = app(message=message, context=context)
        told = Reply.decode(reply.content)
        assert told.arrays is not None, told.refusal
        sent = from_arrays(told.arrays)
        random = stream(seed, f"attack: {attack}", round=request.round, client=str(client))
        for name, tensor in sent.items():
            change = tensor - start[name]
            if attack == "sign flip":
                sent[name] = start[name] - STRENGTH[attack] * change
            else:
                noise = torch.from_numpy(random.standard_normal(tuple(change.shape), np.float32))
                sent[name] = tensor + STRENGTH[attack] * change.std() * noise
        reply.content["arrays"] = to_arrays(sent)
        return reply

    return answer


class flipped_labels:  # noqa: N801 - used as a function
    """While it lasts, what the trainer learns from says 9 - y for every digit y."""

    def __enter__(self) -> None:
        from client import seat

        self._train = train = seat.train

        def misled(model: Any, task: Any, examples: Any, *more: Any, **options: Any) -> Any:
            return train(model, task, Flipped(examples), *more, **options)

        seat.train = misled

    def __exit__(self, *_: object) -> None:
        from client import seat

        seat.train = self._train


@dataclass(frozen=True)
class Flipped:
    """Examples whose labels are 9 - y."""

    examples: Any

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        batch = self.examples.batch(indices)
        return batch | {"labels": 9 - batch["labels"]}


# What came of it


def table(results: dict[tuple[str, str], list[float]], rules: list[str]) -> str:
    lines = ["| rule | " + " | ".join(ATTACKS) + " |", "|---" * (len(ATTACKS) + 1) + "|"]
    for rule in rules:
        cells = (told(results[rule, attack]) for attack in ATTACKS)
        lines.append(f"| `{rule}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def told(values: list[float]) -> str:
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{spread}"


def lost(results: dict[tuple[str, str], list[float]], rule: str, attack: str) -> float:
    return fmean(results[rule, "none"]) - fmean(results[rule, attack])


def verdict(results: dict[tuple[str, str], list[float]], rules: list[str]) -> bool:
    """Say who holds, and whether it is as the documentation says; without FedAvg only the first."""
    hold = [
        rule
        for rule in rules
        if rule != "fedavg" and all(lost(results, rule, a) <= ALLOWED for a in ATTACKS)
    ]
    print(f"within {ALLOWED:g} points of their clean run under every attack: {', '.join(hold)}")
    if "fedavg" not in rules:
        return bool(hold)
    collapsed = all(lost(results, "fedavg", a) > COLLAPSE for a in ("sign flip", "noise"))
    print(f"fedavg collapses under sign flip and noise: {'yes' if collapsed else 'NO'}")
    return collapsed and bool(hold)


def draw(results: dict[tuple[str, str], list[float]], rules: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(ATTACKS)
    colours = ("#9aa5b1", "#d1495b", "#edae49", "#00798c")
    for index, (attack, colour) in enumerate(zip(ATTACKS, colours, strict=True)):
        heights = [fmean(results[rule, attack]) for rule in rules]
        spreads = [stdev(v) if len(v := results[rule, attack]) > 1 else 0.0 for rule in rules]
        places = [at + (index - (len(ATTACKS) - 1) / 2) * width for at in range(len(rules))]
        label = "no attack" if attack == "none" else attack
        axes.bar(places, heights, width, yerr=spreads, color=colour, label=label, capsize=2)
    names = [rule.replace("-", "-\n", 1).replace(MIXED, "\n+ mixing") for rule in rules]
    axes.set_xticks(range(len(rules)), names)
    axes.set_ylabel("test accuracy of the last round, %")
    axes.set_title("Three hostile clients of ten", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=4, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
