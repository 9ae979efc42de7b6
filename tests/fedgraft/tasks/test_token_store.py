from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import save_bert, save_llama

from fedgraft.config import Config
from fedgraft.tasks import encoding, token_store
from fedgraft.tasks.causal_lm import CausalLM
from fedgraft.tasks.sequences import FlatRows, Sequences
from fedgraft.tasks.text_classification import TextClassification
from fedgraft.tasks.token_store import Arrays, cache_folder, kept, key_of


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDGRAFT_TOKEN_CACHE", str(tmp_path / "cache" / "tokens"))
    monkeypatch.setattr(token_store, "SMALLEST", 10)
    return tmp_path / "cache" / "tokens"


class Built:
    """Counts how often it builds."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Arrays:
        self.times += 1
        return {"tokens": np.arange(1000, dtype=np.uint16), "empty": np.zeros(0, np.int64)}


def ask(build: Built, what: str = "a", size: int = 100) -> Arrays:
    return kept(size, lambda: [what], build)


def test_built_once_and_mapped(cache: Path) -> None:
    build = Built()
    first, second = ask(build), ask(build)
    assert build.times == 1
    assert isinstance(first["tokens"], np.memmap) and isinstance(second["tokens"], np.memmap)
    assert np.array_equal(second["tokens"], np.arange(1000)) and len(second["empty"]) == 0
    ask(build, "b")
    assert build.times == 2
    assert [entry.name for entry in sorted(cache.iterdir())] == sorted(map(key_of, ["a", "b"]))


def test_only_its_owner_may_read(cache: Path) -> None:
    ask(Built())
    assert cache.stat().st_mode & 0o777 == 0o700
    for path in cache.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600)


@pytest.mark.parametrize(
    "harm", ["cut", "flipped", "no contents", "empty contents", "broken contents", "missing"]
)
def test_a_broken_entry_is_built_anew(cache: Path, harm: str) -> None:
    build = Built()
    ask(build)
    entry = cache / key_of(["a"])
    tokens = entry / "tokens.npy"
    if harm == "cut":
        tokens.write_bytes(tokens.read_bytes()[:-7])
    elif harm == "flipped":
        tokens.write_bytes(tokens.read_bytes()[:-1] + b"\xff")
    elif harm == "missing":
        tokens.unlink()
    elif harm == "no contents":
        (entry / "contents.json").unlink()
    elif harm == "empty contents":
        (entry / "contents.json").write_text("{}")
    else:
        (entry / "contents.json").write_text("[")
    assert np.array_equal(ask(build)["tokens"], np.arange(1000)) and build.times == 2
    assert isinstance(ask(build)["tokens"], np.memmap) and build.times == 2


def test_small_data_and_a_switched_off_cache_leave_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Built()
    ask(build, size=9)
    monkeypatch.setenv("FEDGRAFT_TOKEN_CACHE", "off")
    ask(build)
    assert build.times == 2 and not cache.exists() and cache_folder() is None
    monkeypatch.delenv("FEDGRAFT_TOKEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/fedgraft/tokens")


def test_where_nothing_can_be_written_memory_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDGRAFT_TOKEN_CACHE", str(tmp_path / "file" / "tokens"))
    monkeypatch.setattr(token_store, "SMALLEST", 10)
    assert len(ask(Built())["tokens"]) == 1000
    assert "tokens are kept in memory" in caplog.text


def test_a_full_disk(full_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDGRAFT_TOKEN_CACHE", str(full_disk / "tokens"))
    monkeypatch.setattr(token_store, "SMALLEST", 10)
    big = {"tokens": np.zeros(1 << 21, np.uint16)}
    assert kept(100, lambda: ["a"], lambda: big)["tokens"] is big["tokens"]
    assert not list((full_disk / "tokens").glob("*"))


def test_what_nobody_opens_is_deleted(cache: Path) -> None:
    ask(Built(), "old")
    ask(Built(), "used")
    (cache / "somebody's").mkdir()
    long_ago = time.time() - 31 * 86400
    for entry in cache.iterdir():
        os.utime(entry, (long_ago, long_ago))
    ask(Built(), "used")
    ask(Built(), "new")
    names = {entry.name for entry in cache.iterdir()}
    assert names == {key_of(["used"]), key_of(["new"]), "somebody's"}


def test_flat_rows() -> None:
    rows = FlatRows.of([[1, 2, 3], [], [70000]], 1 << 17)
    assert [row.tolist() for row in rows] == [[1, 2, 3], [], [70000]] and len(rows) == 3
    assert rows.values.dtype == np.int32 and FlatRows.of([[1]], 512).values.dtype == np.uint16
    labels = FlatRows(np.array([1, 2, 3]), np.array([0, 3]), np.array([False, True, True]))
    assert labels[0].tolist() == [-100, 2, 3]
    with pytest.raises(IndexError):
        rows[3]


def test_a_task_tokenises_once_and_anew_for_other_settings(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_llama(tmp_path / "llama")
    rows = [{"question": f"how many {k}", "answer": "two three"} for k in range(30)]
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    calls = []
    encode = encoding.encode

    def counted(*arguments: Any, **options: Any) -> Arrays:
        calls.append(1)
        return encode(*arguments, **options)

    monkeypatch.setattr(encoding, "encode", counted)

    def train(**settings: Any) -> Sequences:
        tree = {"task.name": "causal-lm", "task.data": str(data), "model.base": str(base)}
        examples = CausalLM(Config.from_dict(tree | settings)).train()
        assert isinstance(examples, Sequences)
        return examples

    first, again = train(), train(**{"seed": 5})
    assert len(calls) == 1
    assert isinstance(again.tokens, FlatRows) and isinstance(again.tokens.values, np.memmap)
    assert first.batch(np.arange(4))["labels"].equal(again.batch(np.arange(4))["labels"])
    for settings in (
        {"task.max-length": 8},
        {"train.loss": "all"},
        {"task.template": "{question} {answer}"},
        {"task.samples": 20},
    ):
        train(**settings)
    assert len(calls) == 5
    data.write_text("\n".join(map(json.dumps, [*rows[1:], {"question": "a", "answer": "b"}])))
    train()
    assert len(calls) == 6


def test_texts_to_classify_are_kept_too(cache: Path, tmp_path: Path) -> None:
    base = save_bert(tmp_path / "bert")
    data = tmp_path / "d.csv"
    data.write_text("text,label\n" + "good film,1\nvery dull film,0\n" * 10)
    tree = {"task.name": "text-classification", "task.data": str(data), "model.base": str(base)}
    for first in ("train", "validation", "train"):
        task = TextClassification(Config.from_dict(tree))
        task.split(first)
        examples = task.train()
        assert isinstance(examples, Sequences) and isinstance(examples.tokens, FlatRows)
        assert isinstance(examples.tokens.values, np.memmap)
        assert sorted({len(row) for row in examples.tokens}) == [3, 4]
        batch = examples.batch(np.arange(len(examples)))
        assert batch["attention_mask"].sum(1).tolist() == [4 - n for n in batch["labels"].tolist()]
    assert len(list(cache.iterdir())) == 2  # a split each, whichever comes first


def test_a_folder_that_may_not_be_read_changes_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    build = Built()
    monkeypatch.setattr(Path, "is_dir", refuse)
    assert len(ask(build)["tokens"]) == 1000


def test_a_user_without_a_home_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FEDGRAFT_TOKEN_CACHE")
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert cache_folder() is None
