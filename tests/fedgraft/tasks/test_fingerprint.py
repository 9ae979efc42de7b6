"""A ledger knows a client's rows again, however they are written out and cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_llama

from fedgraft.config import Config
from fedgraft.resident_model import load_task
from fedgraft.tasks.fingerprint import fingerprint, fingerprint_of_digests

ROWS = [
    {"question": f"{'what is it ' * (n % 4 + 1)}{n}", "answer": f"it is {n}"} for n in range(12)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("base"))


def known(base: Path, rows: list[dict[str, Any]], folder: Path, **settings: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = Config().with_overrides(
        {
            "task.name": "causal-lm",
            "task.data": str(folder / "rows.jsonl"),
            "model.base": str(base),
            "federation.clients": 1,
            "privacy.mode": "example",
            "privacy.noise-multiplier": 1.0,
        }
        | {key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()}
    )
    return load_task(config).fingerprint(0)


def test_rows_are_known_by_what_was_read_and_not_by_how_they_are_encoded(
    base: Path, tmp_path: Path
) -> None:
    first = known(base, ROWS, tmp_path / "a")
    assert known(base, ROWS, tmp_path / "a", task__max_length=12) == first
    assert known(base, ROWS, tmp_path / "b", task__template="{answer}", task__max_length=4) == first
    assert known(base, ROWS, tmp_path / "a", train__loss="all", privacy__mode="local") == first
    turned = [dict(reversed(row.items())) for row in ROWS]
    assert known(base, turned, tmp_path / "c") == first


def test_another_row_makes_other_data_and_the_unread_columns_count(
    base: Path, tmp_path: Path
) -> None:
    first = known(base, ROWS, tmp_path / "a")
    others = [
        [*ROWS, {"question": "one more", "answer": "yes"}],
        [{**row, "answer": row["answer"] + "!"} for row in ROWS],
        [{**row, "patient": n} for n, row in enumerate(ROWS)],
    ]
    found = {known(base, rows, tmp_path / str(n)) for n, rows in enumerate(others)}
    assert len(found) == 3 and first not in found


def test_a_task_that_read_no_file_goes_by_its_examples() -> None:
    config = Config().with_overrides({"federation.clients": 1, "federation.partition": "iid"})
    digits = load_task(config)
    assert digits.fingerprint(0) == fingerprint(digits.train(0))


def test_digests_count_once_in_any_order() -> None:
    assert fingerprint_of_digests(["b", "a", "a"]) == fingerprint_of_digests(["a", "b"])
    assert fingerprint_of_digests(["a"]) != fingerprint_of_digests(["a", "b"])
