"""Seconds a round of a deployed federation, beside Flower as shipped and NVFlare.

    python benchmarks/deployment.py --base FOLDER --data FOLDER     # FOLDERs of MiniLM and of SST-2
    python benchmarks/deployment.py --quick                         # the digits alone, few rounds

One piece of work for all: as many clients, as many rounds, and as many bytes each way, those of the
adapter of the model in question; everything on one machine, over loopback, with TLS.

(a) Flower as shipped: a SuperLink and SuperNodes with TLS and node authentication, its own FedAvg,
    default polling, and a ClientApp that sends back what it got with other values;
(b) FedGraft: `fedgraft server` with its gateway, and a `fedgraft client` with its resident trainer
    for each client; a step of real training, whose seconds are subtracted;
(c) the same with a ClientApp that loads libraries, base and data for every message, its training
    subtracted, too;
(d) NVFlare 2.9 as shipped, in an environment of its own (`--nvflare-python`, or made here):
    its proof-of-concept deployment of processes with TLS, ScatterAndGather, an idle trainer. Its
    clients stay in their processes from round to round, as it is shipped.

A round lasts from its first message to that of the next one. Medians are over all rounds but the
first and the last. Models: the MiniLM given, and a Llama of 100 million random parameters on NF4.

Exits with status 1 where a target is missed: (b) at most 0.65 x (a) and 1.3 x (d), and (c) at least
2 x (b) for the larger model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

from base_memory import save
from deployment_apps import PAYLOAD, STARTS
from deployment_fedgraft import RELOADING, Federation, federation
from deployment_flower import flower_rounds
from safetensors.torch import load_file, save_file

from fedgraft.config import Config
from fedgraft.logs import hushed

OF_FLOWER, OF_NVFLARE, RELOADED = 0.65, 1.3, 2.0
NVFLARE = "nvflare>=2.9,<2.10"
LETTERS = "abcd"
LLAMA = {
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
"""About 100 million parameters; widths are whole blocks of NF4."""


@dataclass(frozen=True)
class Model:
    """A base with data.

    Attributes:
        name: what the table calls it.
        settings: of the run's config.
        own: what client.toml says of data and model.
        larger: (c) / (b) is judged.
    """

    name: str
    settings: dict[str, Any]
    own: dict[str, Any] = field(default_factory=dict)
    larger: bool = False


@dataclass
class Found:
    """Seconds a round by rival, and what travelled.

    Attributes:
        seconds: of each round but the first and the last, training subtracted.
        payload: bytes of the adapter's arrays.
        training: median seconds of a client's training, of (b) and (c).
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    payload: int = 0
    training: dict[str, float] = field(default_factory=dict)

    def median(self, rival: str) -> float:
        return statistics.median(self.seconds[rival])

    def ratio(self, one: str, other: str) -> float | None:
        if one in self.seconds and other in self.seconds:
            return self.median(one) / self.median(other)
        return None


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    signal.signal(signal.SIGTERM, _stop)  # so that nothing is left running
    with tempfile.TemporaryDirectory(prefix="fg-") as folder:
        work = Path(folder)
        python = nvflare(args, work) if "d" in args.rivals else None
        print(conditions(args), flush=True)
        good, told = True, []
        for n, model in enumerate(models(args, work)):
            place = work / str(n)
            place.mkdir()
            found = measure(model, place, args, python)
            print("\n".join(rows(model.name, found)), flush=True)
            told.append((model, found))
        print()
        for model, found in told:
            good &= judge(model, found)
    return 0 if good or args.quick else 1


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", help="the folder of MiniLM; left out, it is not measured")
    parser.add_argument("--data", help="with --base: the folder of SST-2")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rivals", default=LETTERS, help="which of abcd; (b) always runs")
    parser.add_argument("--nvflare-python", help="an interpreter that has nvflare 2.9")
    parser.add_argument("--quick", action="store_true", help="digits, few rounds, judging nothing")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds = min(args.rounds, 6)
    return args


def models(args: argparse.Namespace, folder: Path) -> list[Model]:
    if args.quick:
        return [Model("digits", {})]
    found = []
    if args.base:
        base, data = str(Path(args.base).absolute()), str(Path(args.data).absolute())
        settings = {
            "task.name": "text-classification",
            "task.data": data,
            "task.max-length": 32,
            "task.samples": 400,
            "model.base": base,
        }
        own = {"data": {"path": data}, "model": {"base": base}}
        found.append(Model("MiniLM, 22M", settings, own))
    (folder / "base").mkdir()
    with hushed():
        base = str(save(LLAMA, folder / "base"))
    data = f"{base}/rows.jsonl"
    settings = {
        "task.name": "causal-lm",
        "task.data": data,
        "task.max-length": 32,
        "model.base": base,
        "model.quantization": "nf4",
        "train.loss": "all",
        "federation.partition": "iid",
    }
    own = {"data": {"path": data}, "model": {"base": base}}
    found.append(Model("Llama, 100M, NF4", settings, own, larger=True))
    return found


def measure(model: Model, folder: Path, args: argparse.Namespace, python: str | None) -> Found:
    found = Found()
    config = Config().with_overrides(
        {
            "federation.clients": args.clients,
            "federation.min-clients": args.clients,
            "federation.rounds": args.rounds,
            "train.steps": 1,
            "train.batch-size": 2,
            "evaluate.clients": False,
            "evaluate.every": args.rounds,
            "evaluate.samples": 8,
            "model.device": "cpu",
            "threads": 1,
        }
        | model.settings
    )
    with federation(folder / "f", args.clients, model.own) as running:
        for rival, app in (("b", None), ("c", RELOADING)):
            if rival == "b" or rival in args.rivals:
                timed(found, rival, running, config, app)
    arrays = load_file(folder / "f" / "b" / "adapter" / "adapter_model.safetensors")
    save_file(arrays, folder / PAYLOAD)
    found.payload = sum(t.numel() * t.element_size() for t in arrays.values())
    if "a" in args.rivals:
        found.seconds["a"] = inner(flower_rounds(folder, args.clients, args.rounds))
    if python is not None:
        shapes = {name: list(tensor.shape) for name, tensor in arrays.items()}
        found.seconds["d"] = inner(nvflare_rounds(python, folder / "nvflare", shapes, args))
    return found


def timed(found: Found, rival: str, running: Federation, config: Config, app: str | None) -> None:
    rounds = running.rounds(config, rival) if app is None else running.rounds(config, rival, app)
    found.seconds[rival] = inner([one.rest for one in rounds])
    found.training[rival] = statistics.median(one.training for one in rounds)


def inner(seconds: list[float]) -> list[float]:
    """Leave out the first round, in which everything is loaded."""
    return seconds[1:]


def nvflare(args: argparse.Namespace, folder: Path) -> str | None:
    """Return an interpreter with NVFlare; None where it does not install."""
    if args.nvflare_python:
        return str(args.nvflare_python)
    place = folder / "environment"
    python = str(place / "bin" / "python")
    try:
        venv.create(place, with_pip=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", NVFLARE], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"(d) is left out: {NVFLARE} does not install ({error})", file=sys.stderr)
        return None
    return python


def nvflare_rounds(
    python: str, folder: Path, shapes: dict[str, list[int]], args: argparse.Namespace
) -> list[float]:
    folder.mkdir()
    (folder / "shapes.json").write_text(json.dumps(shapes))
    script = Path(__file__).with_name("deployment_nvflare.py")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [python, str(script), str(folder), str(args.clients), str(args.rounds)]
    with (folder / "out.log").open("w") as out:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=out, stderr=out)
    if done.returncode:
        raise SystemExit(f"NVFlare failed:\n{(folder / 'out.log').read_text()[-3000:]}")
    starts = json.loads((folder / STARTS).read_text())
    return [after - before for before, after in pairwise(starts)]


def conditions(args: argparse.Namespace) -> str:
    lines = [
        f"{date.today()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the "
        f"start, Python {platform.python_version()}; {args.clients} clients, {args.rounds} rounds",
        "",
        "| model | adapter, bytes | rival | s a round | range | training, s | ratio to (b) |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines)


TITLES = {
    "a": "(a) Flower as shipped, idle",
    "b": "(b) FedGraft",
    "c": "(c) all loaded per message",
    "d": "(d) NVFlare as shipped, idle",
}


def rows(name: str, found: Found) -> list[str]:
    lines = []
    for rival in sorted(found.seconds):
        seconds = found.seconds[rival]
        training = f"{found.training[rival]:.2f}" if rival in found.training else ""
        lines.append(
            f"| {name} | {found.payload:,} | {TITLES[rival]} | {found.median(rival):.2f} | "
            f"{min(seconds):.2f} to {max(seconds):.2f} | {training} | "
            f"{found.ratio(rival, 'b'):.2f} |"
        )
    return lines


def judge(model: Model, found: Found) -> bool:
    """Print each target and whether it is met."""
    good = True
    for one, other, most in (("b", "a", OF_FLOWER), ("b", "d", OF_NVFLARE)):
        ratio = found.ratio(one, other)
        if ratio is not None:
            met = ratio <= most
            good &= met
            told = "met" if met else "MISSED"
            print(f"{model.name}: ({one}) / ({other}) = {ratio:.2f}, at most {most}: {told}")
    ratio = found.ratio("c", "b")
    if ratio is not None:
        met = not model.larger or ratio >= RELOADED
        good &= met
        target = f", at least {RELOADED}: {'met' if met else 'MISSED'}" if model.larger else ""
        print(f"{model.name}: (c) / (b) = {ratio:.2f}{target}")
    return good


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
