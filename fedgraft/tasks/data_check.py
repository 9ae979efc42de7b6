"""What `fedgraft data` finds out: rows, columns, broken lines, lengths, examples, who holds what.

Nothing stops at the first broken row: each is noted with its place, and the rest is looked at all
the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from fedgraft.config import Config
from fedgraft.errors import ConfigError, DataError
from fedgraft.registry import load_plugin
from fedgraft.tasks import partition
from fedgraft.tasks.causal_lm import CausalLM
from fedgraft.tasks.chat import ChatWriter
from fedgraft.tasks.encoding import Fit
from fedgraft.tasks.guess import guess
from fedgraft.tasks.records import SITE
from fedgraft.tasks.rows import RowsTask
from fedgraft.tasks.templates import Writer
from fedgraft.tasks.text_classification import TextClassification

if TYPE_CHECKING:
    import datasets

EXAMPLES = 3
KINDS: dict[str, type[CausalLM] | type[TextClassification]] = {
    "causal-lm": CausalLM,
    "text-classification": TextClassification,
}
Segment = tuple[str, bool]
"""A piece of an example, and whether the loss counts it."""


class _TextsAlone(TextClassification):
    """Texts and labels without a base, whose config the task asks for at once."""

    def __init__(self, config: Config) -> None:
        RowsTask.__init__(self, config)


@dataclass
class Findings:
    """All that a check found; `as_json` is what `--json` prints.

    Attributes:
        data: `task.data`.
        task: the task, set or guessed.
        guessed: whether it was guessed.
        columns: of the training rows.
        template: how rows are written, for causal-lm.
        unit: of `lengths`: "tokens", or "characters" without a base.
        rows: how many usable ones, by split, those cut from the training rows included.
        given: the splits that the data bring.
        lengths: minimum, median, mean, 95th percentile and maximum by split.
        fits: what is cut and left out at `task.max-length`, by split, where a base is given.
        labels: how many training rows of each, for text-classification.
        examples: the first training rows as they are trained on.
        clients: of each, what it holds and how many rows; only where a partition is asked for.
        problems: what is wrong, with its place.
        notes: what is no error and worth knowing.
    """

    data: str
    task: str = ""
    guessed: bool = False
    columns: list[str] = field(default_factory=list)
    template: str | None = None
    unit: str = "characters"
    rows: dict[str, int] = field(default_factory=dict)
    given: list[str] = field(default_factory=list)
    lengths: dict[str, dict[str, float]] = field(default_factory=dict)
    fits: dict[str, dict[str, int]] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    examples: list[list[Segment]] = field(default_factory=list)
    clients: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note_problem(self, error: DataError | ConfigError) -> None:
        """Take down one thing that is wrong."""
        if error.message not in self.problems:
            self.problems.append(error.message)


def check(config: Config, *, task_set: bool, clients: bool) -> Findings:
    """Look at everything that `task.data` holds.

    Args:
        config: `task.data` is set; with `model.base`, lengths are in tokens.
        task_set: whether `task.name` was chosen; guessed from the columns where not.
        clients: whether to say what each client holds.

    Raises:
        ConfigError: nothing is there, the task is none of texts, or settings exclude each other.
        ModelError: the base's tokenizer cannot be loaded.
    """
    findings = Findings(str(config.task.data), guessed=not task_set)
    broken: list[DataError] = []
    try:
        name = config.task.name if task_set else guess(config, broken.append)
    except DataError as error:
        for problem in (*broken, error):
            findings.note_problem(problem)
        return findings
    findings.task = name
    if name not in KINDS:
        load_plugin("fedgraft.tasks", name, key="task.name")
        raise ConfigError(
            f"fedgraft data looks at texts, and task.name is {name!r}",
            f"Set task.name to {' or '.join(KINDS)}.",
        )
    based = config.model.base is not None or name == "causal-lm"
    task = (KINDS[name] if based else _TextsAlone)(config.with_overrides({"task.name": name}))
    try:
        _look(task, findings, clients=clients)
    except DataError as error:
        findings.note_problem(error)
    return findings


def _look(task: CausalLM | TextClassification, findings: Findings, *, clients: bool) -> None:
    given = task.read(findings.note_problem)
    findings.given = list(given)
    findings.columns = [name for name in given["train"].column_names if not name.startswith("(")]
    if isinstance(task, TextClassification):
        counts = Counter(given["train"][task.config.task.label_field])
        findings.labels = dict(counts.most_common())
        if len(counts) == 1:
            findings.notes.append("all training rows have the same label")
    _compare_splits(given, findings)
    task.given = given  # what `tables` cuts, read once and without the broken rows
    if task.config.model.base is None:
        findings.rows = {split: len(table) for split, table in task.tables.items()}
        _write_out(task, findings)
    else:
        findings.unit = "tokens"
        _tokenise(task, findings)
    if clients:
        _deal(task, findings)


def _compare_splits(given: Mapping[str, datasets.Dataset], findings: Findings) -> None:
    """Note rows that stand twice in the data."""
    seen: set[tuple[str, ...]] = set()
    for split, table in given.items():
        columns = [name for name in table.column_names if not name.startswith("(")]
        columns = [name for name in columns if name != SITE]
        own = [tuple(map(str, row)) for row in zip(*(table[c] for c in columns), strict=True)]
        if repeated := len(own) - len(set(own)):
            findings.notes.append(f"{split}: {repeated} rows stand there more than once")
        if split != "train" and (shared := sum(row in seen for row in own)):
            findings.notes.append(f"{split}: {shared} rows are among the training rows, too")
        seen |= set(own) if split == "train" else set()


def _write_out(task: CausalLM | TextClassification, findings: Findings) -> None:
    """Measure characters, and show the first rows, without a tokenizer."""
    if isinstance(task, TextClassification):
        column = task.config.task.text_field
        for split, table in task.tables.items():
            findings.lengths[split] = _summary([len(text) for text in table[column]])
        findings.examples = [
            [(f"{row[column]}  ", False), (row[task.config.task.label_field], True)]
            for row in islice(task.tables["train"], EXAMPLES)
        ]
        return
    writer = task.plain_writer()
    findings.template = _template(writer)
    for split, table in task.tables.items():
        sizes = []
        for row in table:
            try:
                written = writer.write(row)
            except DataError as error:
                findings.note_problem(error)
                continue
            sizes.append(len(written.text))
            if split == "train" and len(findings.examples) < EXAMPLES:
                findings.examples.append(_segments(written.text, written.responses))
        findings.lengths[split] = _summary(sizes)


def _template(writer: Writer) -> str:
    if not isinstance(writer, ChatWriter):
        return writer.source
    if writer.own:
        return "chat, by the tokenizer's own template"
    why = "the tokenizer has no template" if writer.based else "a base may bring its own template"
    return f"chat, 'User: ...' and 'Assistant: ...' ({why})"


def _segments(text: str, responses: Sequence[tuple[int, int]]) -> list[Segment]:
    made: list[Segment] = []
    at = 0
    for start, end in responses:
        made += [(text[at:start], False), (text[start:end], True)]
        at = end
    return [segment for segment in [*made, (text[at:], False)] if segment[0]]


def _tokenise(task: CausalLM | TextClassification, findings: Findings) -> None:
    """Measure tokens, and show the first examples as they are trained on."""
    (tokenizer,) = task.preparation()
    if task.limit < (wanted := task.config.task.max_length):
        findings.notes.append(f"task.max-length is {wanted}, and the base takes {task.limit}")
    for split, table in task.tables.items():
        if isinstance(task, TextClassification):
            column, limit = task.config.task.text_field, task.limit
            whole = tokenizer(list(table[column]), verbose=False)["input_ids"]
            sizes = [len(ids) for ids in whole]
            findings.fits[split] = {"rows": len(table), "cut": sum(n > limit for n in sizes)}
            shown = [
                [(f"{tokenizer.decode(ids[:limit])}  ", False), (row[task.label_column], True)]
                for ids, row in zip(whole[:EXAMPLES], table, strict=False)
            ]
        else:
            arrays = task.tokens(table, findings.note_problem)
            fit = Fit.of(arrays)
            sizes = arrays["lengths"].tolist()
            findings.fits[split] = vars(fit) | {"examples": len(arrays["row"])}
            if told := fit.told(task.limit):
                findings.notes.append(f"{split}: {told}")
            examples = task.examples(arrays)
            shown = [
                _decoded(tokenizer, examples.tokens[k], examples.labels[k] >= 0)
                for k in range(min(EXAMPLES, len(examples)))
            ]
            findings.template = _template(task.writer)
        findings.lengths[split] = _summary(sizes)
        findings.rows[split] = len(table)
        if split == "train":
            findings.examples = shown


def _decoded(tokenizer: Any, ids: Any, counted: Any) -> list[Segment]:
    """Spell tokens, cut where the loss begins or ends to count; what is spelled adds up."""
    made: list[Segment] = []
    edges = [0, *(np.flatnonzero(np.diff(counted)) + 1).tolist(), len(ids)]
    before = ""
    for start, end in pairwise(edges):
        text = tokenizer.decode(ids[:end].tolist())
        made.append((text[len(before) :], bool(counted[start])))
        before = text
    return made


def _deal(task: RowsTask, findings: Findings) -> None:
    """Say what each client holds, by the table and not by the examples it may be split into."""
    table = task.tables["train"]
    try:
        dealt = partition.deal(
            table, task.config, label=task.label_column, domain=task.domain_column
        )
    except (DataError, ConfigError) as error:
        findings.note_problem(error)
        return
    column = task.dealt_by
    values = None if column is None else np.asarray(table[column][:])
    for client, rows in enumerate(dealt):
        held = Counter() if values is None else Counter(values[rows].tolist())
        findings.clients.append(
            {"client": client, "rows": len(rows), "holds": dict(held.most_common(5))}
        )


def _summary(sizes: Sequence[int]) -> dict[str, float]:
    if not sizes:
        return {}
    return {
        "min": min(sizes),
        "median": float(np.median(sizes)),
        "mean": round(float(np.mean(sizes)), 1),
        "p95": float(np.percentile(sizes, 95)),
        "max": max(sizes),
    }
