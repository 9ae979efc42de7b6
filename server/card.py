"""The card of an adapter: the README.md of its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedgraft.config import Config
from fedgraft.resident_model import ResidentModel
from server.guarantee import in_words
from server.units import Unit
from strategies.registry import rule_class


def adapter_card(
    config: Config, model: ResidentModel, lineage: str, summary: Mapping[str, Any]
) -> str:
    """Return the adapter's README: what it is, where it comes from, what it reached.

    Args:
        config: the run's.
        model: the resident model, which knows the base that it was trained on.
        lineage: of the run.
        summary: what `summarise` returns.
    """
    base = config.model.base or f"built into the task {config.task.name}"
    metric = Unit(summary["metric"]).name
    given = f"the adapter in `{config.adapter.from_}`" if config.adapter.from_ else ""
    personal = rule_class(config.strategy.name).capabilities.personal
    tested = "clients' own adapters (mean)" if personal else "this adapter"
    before = f"at the start ({given})" if given else "untouched base"
    front = {"library_name": "peft", "base_model": base, "tags": ["lora", "federated-learning"]}
    header = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    return f"""---
{header}
---

# LoRA adapter from a FedGraft federation

| | |
|---|---|
| base | {base}{_revision(config, model)} |
| base hash | `{model.base_hash}` |
| trained on it in | {_precision(config)} |
| task | {summary["task"]} |
| strategy | {summary["strategy"]} |
| clients | {summary["clients"]} |
| training examples | {_training_examples(summary)} |
| validation and test examples | {_held_out(summary)} |
| rounds | {summary["rounds"]} |
| this adapter | round {summary["best_round"]}, {_which(personal)} |
| rank, alpha in training | {_shape(config)} |
| seed | {summary["seed"]} |
| test {metric}, {before} | {summary["initial"]:.4f} |
| test {metric}, {tested} | {summary["final"]:.4f} |
{_clients(summary)}| differential privacy | {in_words(summary["privacy"])} |
| lineage | `{lineage}`{f", started from {given}" if given else ""} |

```python
from peft import PeftModel
model = PeftModel.from_pretrained(base_model, "this folder")
```
"""


def _shape(config: Config) -> str:
    """Say what was trained; what joined the base makes the file's rank and alpha larger."""
    adapter = config.adapter
    return f"{adapter.rank}, {adapter.alpha:g} ({adapter.type})"


def _which(personal: bool) -> str:
    """Say which round's adapter it is, or which part of one."""
    if not personal:
        return "the best on validation"
    return "the part that clients share: what each keeps of its own is not in it"


def _revision(config: Config, model: ResidentModel) -> str:
    """Name the revision that was asked for, and the Hub's commit that it was."""
    asked, commit = config.model.revision, model.base_commit
    named = f", revision {asked}" if asked else ""
    return named if commit in (None, asked) else f"{named}, commit {commit}"


def _precision(config: Config) -> str:
    """Say what the frozen weights were held in."""
    if config.model.quantization == "none":
        return config.model.dtype
    return f"{config.model.quantization.upper()}, computing in {config.model.dtype}"


def _training_examples(summary: Mapping[str, Any]) -> str:
    """Say how many there are, and what clients hold of them."""
    counts = summary["client_examples"]
    if summary["privacy"] is not None:
        return "not told: privacy keeps the number with the clients"
    if not counts:
        return "none: no client has trained"
    total, least, most = sum(counts.values()), min(counts.values()), max(counts.values())
    each = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    some = "" if len(counts) == summary["clients"] else " that have trained"
    return f"{total:,} on {len(counts)} clients{some}, {each} each"


def _held_out(summary: Mapping[str, Any]) -> str:
    found = (summary["validation_examples"], summary["test"]["final"].get("examples"))
    return " and ".join("unknown" if count is None else f"{count:,.0f}" for count in found)


def _clients(summary: Mapping[str, Any]) -> str:
    """Return the row of the worst client, where clients have evaluated."""
    found = summary["client_metric"]
    if found is None:
        return ""
    return (
        f"| validation {Unit(summary['metric']).name} by client, this adapter | "
        f"worst {found['worst']:.4f}, best {found['best']:.4f}, mean {found['mean']:.4f}, "
        f"standard deviation {found['sd']:.4f} ({found['clients']} clients) |\n"
    )
