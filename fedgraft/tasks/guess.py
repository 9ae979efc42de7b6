"""Which task data are for, told by their columns."""

from __future__ import annotations

from fedgraft.config import Config
from fedgraft.tasks import messages
from fedgraft.tasks.records import Report
from fedgraft.tasks.splits import load_rows
from fedgraft.tasks.templates import TEMPLATES, Template


def guess(config: Config, report: Report = lambda error: None) -> str:
    """Return text-classification for texts and labels, causal-lm for all else.

    Args:
        config: its `task` group.
        report: told of every broken row.

    Raises:
        DataError: the data hold no training rows.
    """
    headed = load_rows(config, report=report)["train"]
    names = set(headed.columns)
    known = any(set(Template.parse(source).fields) <= names for source in TEMPLATES)
    if config.task.template is not None or known or names & set(messages.COLUMNS):
        return "causal-lm"
    task = config.task
    if {task.text_field, task.label_field} <= names:
        return "text-classification"
    pair = headed.source.lower().endswith((".csv", ".tsv"))
    if pair and len(headed.columns) == 2 and task.text_field not in names:
        return "text-classification"  # text and label without a header
    return "causal-lm"
