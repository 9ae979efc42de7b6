"""Synthetic run and comparison directories in the documented formats, without any training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from fedgraft.seeds import stream
from server.statistics import build_comparison
from server.summary import client_metric

DOMAINS = (
    "rotated +45",
    "rotated -45",
    "mirrored, lower contrast",
    "blurred with noise",
    "low contrast",
    "shifted",
)
HARDNESS = (0.02, 0.0, -0.11, -0.05, 0.06, 0.03)
"""What a domain adds to the accuracy of the whole validation split."""
FINALS = {"fedavg": 0.758, "ffa-lora": 0.739, "lora-fair": 0.766}


def write_run(
    folder: Path,
    *,
    strategy: str = "fedavg",
    seed: int = 0,
    rounds: int = 40,
    clients: int = 6,
    every: int = 1,
    metric: str = "accuracy",
    final: float | None = None,
    slow: float = 1.0,
    descriptions: tuple[str, ...] = DOMAINS,
    prompts: tuple[str, ...] = (),
    **summary: Any,
) -> dict[str, Any]:
    """Write one finished run's directory and return its summary.

    Args:
        metric: "accuracy" (share, larger is better) or "perplexity" (smaller is better).
        slow: what all seconds are multiplied by.
        prompts: what samples are written after, in round 0 and in the last.
        summary: keys of summary.json that are set outright.
    """
    folder.mkdir(parents=True)
    random = stream(seed, f"synthetic-{strategy}")
    end = FINALS.get(strategy, 0.75) + 0.018 * math.sin(2.1 * seed) + 0.006 * random.normal()
    start = 0.405 + 0.03 * math.cos(seed)
    up = clients * (31_000 if strategy == "ffa-lora" else 55_000)
    records: list[dict[str, Any]] = []
    for r in range(rounds + 1):
        reached = start + (end - start) * (1 - math.exp(-r / 7)) / (1 - math.exp(-rounds / 7))
        reached += 0.006 * random.normal() if 0 < r < rounds else 0.0
        values = {
            str(k): reached + (HARDNESS[k % 6] + 0.01 * random.normal()) * min(1, r / 5 + 0.5)
            for k in range(clients)
        }
        measured = r % every == 0
        bias = (0.24 * math.exp(-r / 8) + 0.001) * math.exp(0.1 * random.normal())
        records.append(
            {
                "round": r,
                "lr": None if r == 0 else 0.004 * (1 + math.cos(math.pi * r / rounds)),
                "train_loss": None if r == 0 else 2.2 * math.exp(-r / 6) + 0.2,
                "validation": _metrics(metric, reached) if measured else None,
                "clients": {
                    client: {
                        "examples": 100 + 10 * int(client),
                        "train_loss": 0.8,
                        "seconds": 0.1 * slow,
                        "validation": _metrics(metric, value) if measured else None,
                    }
                    for client, value in values.items()
                },
                "sampled": [] if r == 0 else list(values),
                "failed": {"3": "no reply within 3600 s"}
                if strategy == "fedavg" and r in (4, 5)
                else {},
                "refused": {"4": "client 4: lora_B of encoder.0 holds NaN"}
                if strategy == "ffa-lora" and r == 9 and seed == 0
                else {},
                "bytes_up": 0 if r == 0 else up,
                "bytes_down": 0 if r == 0 else up,
                "seconds": {"train": 0.3 * slow, "aggregate": 0.01 * slow},
                "aggregation_bias": None
                if r == 0
                else {"before": 3e-8, "after": 3e-8, "repairable": 0.0}
                if strategy == "ffa-lora"
                else {
                    "before": bias,
                    "after": bias * (0.94 if strategy == "lora-fair" else 1.0),
                    "repairable": 0.06,
                },
                "epsilon": None,
                "privacy": None,
            }
        )
    best = rounds if rounds % every == 0 else rounds - rounds % every
    content: dict[str, Any] = {
        "strategy": strategy,
        "label": strategy,
        "task": "digits" if metric == "accuracy" else "causal-lm",
        "seed": seed,
        "rounds": rounds,
        "clients": clients,
        "metric": metric,
        "direction": "max" if metric == "accuracy" else "min",
        "initial": _metrics(metric, start)[metric],
        "final": _metrics(metric, end)[metric] if final is None else final,
        "best_round": best,
        "validation_best": records[best]["validation"][metric],
        "bytes_up": up * rounds,
        "bytes_down": up * rounds,
        "wall_seconds": 18.3 * slow,
        "train_seconds": 12.1 * slow,
        "aggregate_seconds": 0.4 * slow,
        "client_steps": 5 * rounds * clients,
        "epsilon": None,
        "privacy": None,
        "delta": None,
        "peak_memory_bytes": round(512e6 * slow),
        "refused_updates": sum(len(record["refused"]) for record in records),
        "failed_clients": sum(len(record["failed"]) for record in records),
        "client_descriptions": {
            str(k): descriptions[k % len(descriptions)] if descriptions else ""
            for k in range(clients)
        },
        "client_metric": client_metric(records, best, _Watched(metric)),
        "test": {
            "initial": _metrics(metric, start) | {"macro_f1": start - 0.1, "examples": 357.0},
            "final": _metrics(metric, end) | {"macro_f1": end - 0.1, "examples": 357.0},
        },
        "stopped_early": False,
        "notes": [],
    } | summary
    config = {
        "task": {"name": content["task"]},
        "federation": {"clients": clients, "rounds": rounds},
        "train": {"lr": 0.016 if strategy == "ffa-lora" else 0.008, "steps": 5},
        "strategy": {"name": strategy},
        "seed": seed,
        "run": {"lineage": f"{strategy}-{seed}-{slow}"},
        "versions": {"python": "3.11.7", "fedgraft": "0.1.0", "torch": "2.9.0"},
    }
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    (folder / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "summary.json").write_text(json.dumps(content, indent=2))
    samples = [
        {"round": r, "prompt": prompt, "reference": None, "text": f"{strategy}: {prompt}" * (r + 1)}
        for r in (0, rounds)
        for prompt in prompts
    ]
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    return content


def write_comparison(
    folder: Path,
    *,
    strategies: tuple[str, ...] = ("fedavg", "ffa-lora", "lora-fair"),
    seeds: tuple[int, ...] = (0, 1, 2),
    references: bool = True,
    **run: Any,
) -> dict[str, Any]:
    """Write a comparison's directory with its runs and return what comparison.json holds."""
    summaries = []
    for strategy in strategies:
        for seed in seeds:
            name = f"runs/{strategy}-{seed}"
            summary = write_run(folder / name, strategy=strategy, seed=seed, **run)
            summaries.append(summary | {"directory": name})
    metric = summaries[0]["metric"]
    rows = []
    for seed in seeds if references else ():
        base = next(s["initial"] for s in summaries if s["seed"] == seed)
        rows += [
            {"name": "base", "seed": seed, "metric": metric, "final": base},
            {"name": "alone", "seed": seed, "metric": metric}
            | {"final": _metrics(metric, 0.62 + 0.01 * seed)[metric]}
            | dict(
                zip(
                    ("low", "high"),
                    sorted(_metrics(metric, a)[metric] for a in (0.51, 0.68)),
                    strict=True,
                )
            ),
            {"name": "centralised", "seed": seed, "metric": metric}
            | {"final": _metrics(metric, 0.79 + 0.005 * seed)[metric]},
        ]
    comparison = build_comparison(summaries, rows)
    plan = {"strategies": list(strategies), "seeds": list(seeds), "grid": {}, "references": []}
    config = {"train": {"lr": 0.008}, "compare": {"ffa-lora": {"train": {"lr": 0.016}}}}
    (folder / "comparison.toml").write_text(tomli_w.dumps(plan | {"config": config}))
    (folder / "comparison.json").write_text(json.dumps(comparison, indent=2))
    return comparison


class _Watched:
    """What `client_metric` asks of a task."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.direction = "max" if metric == "accuracy" else "min"


def _metrics(metric: str, accuracy: float) -> dict[str, float]:
    loss = 6.0 * (1 - accuracy)
    if metric == "accuracy":
        return {"accuracy": float(np.clip(accuracy, 0, 1)), "loss": loss}
    return {"perplexity": math.exp(loss), "loss": loss}
