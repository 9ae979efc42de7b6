from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from fedgraft.config import Config
from fedgraft.errors import ConfigError, DataError
from fedgraft.tasks.hub import local_path
from fedgraft.tasks.splits import cut, load_rows


def config(data: Path | str) -> Config:
    return Config.from_dict({"task": {"name": "causal-lm", "data": str(data)}})


def test_cut_shares_every_row_out_once() -> None:
    parts = cut({"train": 100}, 0.1, None)
    assert [source for source, _ in parts.values()] == ["train"] * 3
    assert {name: len(rows) for name, (_, rows) in parts.items()} == {
        "train": 80,
        "validation": 10,
        "test": 10,
    }
    everything = np.concatenate([rows for _, rows in parts.values()])
    assert sorted(everything) == list(range(100))
    assert np.ptp(parts["test"][1]) > 20  # drawn from everywhere, not ten rows in a row


def test_given_splits_stay_whole() -> None:
    parts = cut({"train": 50, "test": 7}, 0.2, None)
    assert parts["test"][0] == "test" and list(parts["test"][1]) == list(range(7))
    assert parts["validation"][0] == "train" and len(parts["validation"][1]) == 10
    assert len(parts["train"][1]) == 40


def test_samples_keep_the_cut_and_are_nested() -> None:
    whole, few, fewer = (cut({"train": 100}, 0.1, samples) for samples in (None, 30, 10))
    assert np.array_equal(whole["test"][1], few["test"][1])
    assert len(few["train"][1]) == 30 and len(fewer["train"][1]) == 10
    assert set(fewer["train"][1]) < set(few["train"][1]) < set(whole["train"][1])


def test_too_few_rows_to_cut() -> None:
    with pytest.raises(DataError, match="the 2 training rows are too few"):
        cut({"train": 2}, 0.1, None)
    assert len(cut({"train": 3}, 0.1, None)["train"][1]) == 1


def test_folder_of_files(tmp_path: Path) -> None:
    for name in ("train.csv", "dev.csv", "notes.csv", "README.md"):
        (tmp_path / name).write_text(f"text\n{name}\n")
    rows = load_rows(config(tmp_path))
    assert {name: r.rows[0]["text"] for name, r in rows.items()} == {
        "train": "train.csv",
        "validation": "dev.csv",
    }


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["test.csv"], "holds no training file"),
        (["train.csv", "test.jsonl"], r"test\.jsonl is not a \.csv file"),
        (["train.csv", "dev.csv", "valid.csv"], "both hold the validation split"),
    ],
)
def test_folders_that_do_not_work(tmp_path: Path, names: list[str], complaint: str) -> None:
    for name in names:
        (tmp_path / name).write_text("text\na\n")
    with pytest.raises(DataError, match=complaint):
        load_rows(config(tmp_path))


@pytest.mark.parametrize("data", ["train.jsonl", "./folder", "/no/such", "a/b/c", "x.jsonl"])
def test_a_path_where_nothing_is(data: str) -> None:
    with pytest.raises(DataError, match="nothing is there"):
        load_rows(config(data))


def test_data_must_be_named() -> None:
    with pytest.raises(ConfigError, match=r"task\.data is not set"):
        load_rows(Config())


def test_local_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for name in ("models", "models/mine", "models/absent", "./x", "~/x", "/x", "a/b/c", "a\\b"):
        assert local_path(name) is not None, name
    for name in ("gpt2", "owner/name", "openai/gsm8k:main", "owner/name-1.5B"):
        assert local_path(name) is None, name


def test_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "chat": datasets.List(datasets.Value("string")),
        }
    )
    rows = {"text": ["a", "b"], "label": [1, 0], "chat": [["x"], []]}
    table = datasets.Dataset.from_dict(rows, features=features)

    def load(name: str, subset: str | None) -> datasets.DatasetDict:
        asked.append((name, subset))
        return datasets.DatasetDict({"train": table, "validation": table, "extra": table})

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = load_rows(config("owner/name:part"))
    assert asked == [("owner/name", "part")]
    assert sorted(found) == ["train", "validation"]
    assert found["train"].rows == [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    assert found["train"].source == "owner/name:part, split train"


def test_hub_dataset_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        load_rows(config("nobody/nothing-at-all"))
    assert caught.value.message.startswith("task.data 'nobody/nothing-at-all' is no local path")
    assert "\n" not in caught.value.message and caught.value.remedy


def test_cut_keeps_at_most_so_many_rows_to_look_at() -> None:
    whole = cut({"train": 100, "test": 50}, 0.1, None)
    few = cut({"train": 100, "test": 50}, 0.1, None, 5)
    assert np.array_equal(few["train"][1], whole["train"][1])
    for name in ("validation", "test"):
        assert len(few[name][1]) == 5
        assert set(few[name][1]) < set(whole[name][1])
    assert cut({"train": 100, "test": 50}, 0.1, None, 50)["test"][1].tolist() == list(range(50))
