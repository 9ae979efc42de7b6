"""What the models wrote after fixed prompts, before training and after, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from unicodedata import category

from server.results import Results, Run

LONGEST = 2000
"""Characters of a text that are shown; samples.jsonl has the rest."""
MOST_PROMPTS = 12


@dataclass(frozen=True)
class Written:
    """One continuation; its label is the strategy's, "" for what all of them started from."""

    label: str
    when: str
    text: str


@dataclass(frozen=True)
class PromptRow:
    """A prompt, the data's own response ("" where there is none), and what was written after it."""

    prompt: str
    reference: str
    written: tuple[Written, ...]


@dataclass(frozen=True)
class SamplesShown:
    """The prompts shown, of how many, and the seed whose runs wrote."""

    rows: tuple[PromptRow, ...]
    prompts: int
    seed: int


def samples_shown(results: Results) -> SamplesShown | None:
    """Return what each strategy's first run wrote; None where no run wrote samples.

    Shown are round 0, the chosen round and, where it is another one, the last.
    """
    runs = [run for label in results.labels if (run := results.of(label)[0]).samples]
    if not runs:
        return None
    prompts = list(dict.fromkeys(str(s["prompt"]) for run in runs for s in run.samples))
    rows = tuple(_row(prompt, runs) for prompt in prompts[:MOST_PROMPTS])
    return SamplesShown(rows, len(prompts), runs[0].seed)


def _row(prompt: str, runs: list[Run]) -> PromptRow:
    reference = ""
    before: list[Written] = []
    after: list[Written] = []
    for run in runs:
        found = {int(s["round"]): s for s in run.samples if s["prompt"] == prompt}
        if not found:
            continue
        reference = reference or str(found[min(found)]["reference"] or "")
        if 0 in found and not before:
            before.append(Written("", "before training", _shown(found[0]["text"])))
        chosen = int(run.summary["best_round"])
        for r in dict.fromkeys((chosen, max(found))):
            if r in found and r > 0:
                when = f"round {r}, the chosen one" if r == chosen else f"round {r}, the last"
                after.append(Written(run.label, when, _shown(found[r]["text"])))
    return PromptRow(_shown(prompt), _shown(reference), (*before, *after))


def _shown(text: object) -> str:
    """Return text without control characters, cut to a length; lines stay."""
    clean = "".join(
        "\N{REPLACEMENT CHARACTER}" if category(c) == "Cc" and c not in "\n\t" else c
        for c in str(text)
    )
    return clean if len(clean) <= LONGEST else f"{clean[: LONGEST - 1].rstrip()}…"
