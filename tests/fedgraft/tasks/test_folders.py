from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import save_bert, save_llama

from fedgraft.config import Config
from fedgraft.errors import ConfigError, DataError
from fedgraft.tasks.causal_lm import CausalLM
from fedgraft.tasks.records import SITE
from fedgraft.tasks.splits import load_rows
from fedgraft.tasks.text_classification import TextClassification


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def config(data: Path, base: Path | str = "unused", **tree: Any) -> Config:
    keys = {"task.name": "causal-lm", "task.data": str(data), "model.base": str(base)}
    return Config.from_dict(keys | tree)


def lines(rows: list[dict[str, Any]]) -> str:
    return "\n".join(map(json.dumps, rows))


def test_a_folder_of_texts(tmp_path: Path) -> None:
    folder = put(tmp_path / "d", {"b.txt": "two", "a.md": "\ufeffone", ".hidden.txt": "no"})
    (rows,) = load_rows(config(folder)).values()
    assert rows.rows == [{"text": "one"}, {"text": "two"}] and rows.places == ["a.md", "b.txt"]


def test_folders_named_as_splits_are_splits(tmp_path: Path) -> None:
    files = {"train/a.txt": "one", "train/b.txt": "two", "dev/c.txt": "three"}
    found = load_rows(config(put(tmp_path / "d", files)))
    assert {name: len(rows) for name, rows in found.items()} == {"train": 2, "validation": 1}
    assert found["train"].columns == ["text"]


def test_sub_folders_of_texts_are_sites(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "llama")
    files = {f"{site}/{k}.txt": "good film" for site in ("north", "south") for k in range(12)}
    folder = put(tmp_path / "d", files | {"north/deep/x.txt": "dull film"})
    for partition in (None, "domain", "natural"):
        tree: dict[str, Any] = {"federation.clients": 2}
        tree |= {} if partition is None else {"federation.partition": partition}
        task = CausalLM(config(folder, base, **tree))
        assert [task.describe(client) for client in range(2)] == ["north", "south"]
        assert sum(len(task.train(client)) for client in range(2)) == len(task.train())
    with pytest.raises(ConfigError, match=r"clients is 3, but column 'site.*has 2 different"):
        CausalLM(
            config(folder, base, **{"federation.clients": 3, "federation.partition": "natural"})
        ).train(0)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"a/x.txt": "one", "y.txt": "two"}, r"file y\.txt lies beside the sub-folders"),
        ({"x.txt": "one", "y.txt": " \n"}, r"file y\.txt has nothing in column 'text'"),
        ({"x.doc": "one"}, "holds no training file"),
        ({"a.jsonl": "{}"}, "holds no training file"),
    ],
)
def test_folders_that_do_not_work(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        CausalLM(config(put(tmp_path / "d", files))).read()


def test_a_text_that_is_no_utf8(tmp_path: Path) -> None:
    folder = put(tmp_path / "d", {"x.txt": "one"})
    (folder / "y.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"file y\.txt is not UTF-8"):
        load_rows(config(folder))


NATURAL = {"federation.partition": "natural", "federation.clients": 3}


def clinics(root: Path, **extra: str) -> Path:
    files = {}
    for k, name in enumerate(("a", "b", "c")):
        rows = [{"question": f"how {k} {n}", "answer": "two"} for n in range(10 + k)]
        files[f"{name}.jsonl"] = lines(rows)
    return put(root, files | extra)


def test_one_file_a_client(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "llama")
    held_out = lines([{"question": "how 9", "answer": "two"}] * 5)
    folder = clinics(tmp_path / "d", **{"test.jsonl": held_out})
    task = CausalLM(config(folder, base, **NATURAL))
    assert [task.describe(client) for client in range(3)] == ["a", "b", "c"]
    questions = np.asarray(task.split("train").table["question"][:])
    for client in range(3):
        held = questions[task._dealt[client]]
        assert set(Counter(q.split()[1] for q in held)) == {str(client)}
    assert len(task.test()) == 5 and len(task.test(0)) in (1, 2)  # of no site: an even share
    assert len(task.validation(0)) >= 1


def test_one_file_a_client_for_classification(tmp_path: Path) -> None:
    base = save_bert(tmp_path / "bert")
    text = "text,label\n" + "good film,1\nbad film,0\n" * 6
    folder = put(tmp_path / "d", {"x.csv": text, "y.csv": text})
    tree = NATURAL | {"task.name": "text-classification", "federation.clients": 2}
    task = TextClassification(config(folder, base, **tree))
    assert [task.describe(client) for client in range(2)] == ["x", "y"]


def test_broken_lines_and_mixed_files_of_clients(tmp_path: Path) -> None:
    folder = clinics(tmp_path / "d", **{"d.jsonl": '{"question": "a"}\n{"answer": "b"}\n'})
    with pytest.raises(DataError, match=r"line 1 of d\.jsonl has nothing in column 'answer'"):
        CausalLM(config(folder, **NATURAL)).read()
    put(folder, {"e.csv": "question,answer\na,b\n"})
    with pytest.raises(DataError, match=r"e\.csv is not a \.jsonl file"):
        load_rows(config(folder, **NATURAL))
    with pytest.raises(DataError, match="holds no training file") as caught:
        load_rows(config(folder))
    assert "federation.partition to natural" in caught.value.remedy


def test_a_column_named_keeps_files_from_being_clients(tmp_path: Path) -> None:
    folder = clinics(tmp_path / "d")
    with pytest.raises(DataError, match="holds no training file"):
        load_rows(config(folder, **NATURAL, **{"federation.partition-column": "question"}))


def test_dirichlet_and_iid_over_a_topic_column(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "llama")
    rows = [{"question": "how", "answer": "two", "topic": f"t{k % 3}"} for k in range(300)]
    path = tmp_path / "d.jsonl"
    path.write_text(lines(rows))
    column = {"federation.partition-column": "topic", "federation.clients": 4}
    shares: dict[str, list[float]] = {}
    for how in ("dirichlet", "iid"):
        tree = column | {"federation.partition": how, "federation.concentration": 0.1}
        task = CausalLM(config(path, base, **tree))
        topics = np.asarray(task.split("train").table["topic"][:])
        assert sum(len(task.train(client)) for client in range(4)) == 240
        counts = [Counter(topics[rows].tolist()) for rows in task._dealt]
        shares[how] = [max(c.values()) / sum(c.values()) for c in counts]
    # of three equal topics a random share holds about a third each, Dirichlet(0.1) mostly one
    assert max(shares["iid"]) < 0.6 and np.mean(shares["dirichlet"]) > 0.6


def test_a_client_with_one_example_and_one_with_none(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "llama")
    owners = ["many"] * 40 + ["one"]
    rows = [{"question": "how", "answer": "two", "owner": owner} for owner in owners]
    test = lines(rows[:3])
    folder = put(tmp_path / "d", {"train.jsonl": lines(rows), "test.jsonl": test})
    put(folder, {"validation.jsonl": test})
    tree = {"federation.partition": "natural", "federation.partition-column": "owner"}
    task = CausalLM(config(folder, base, **tree, **{"federation.clients": 2}))
    assert [len(task.train(client)) for client in range(2)] == [40, 1]
    batch = task.train(1).batch(np.array([0]))
    assert task.count(batch) > 0 and len(task.validation(1)) >= 1
    with pytest.raises(ConfigError, match="clients is 3, but column 'owner' has 2"):
        CausalLM(config(folder, base, **tree, **{"federation.clients": 3})).train(2)
    with pytest.raises(ConfigError, match="more than the 41 training examples"):
        CausalLM(config(folder, base, **{"federation.clients": 50})).train(0)


def test_a_tokenizer_without_a_padding_token(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "llama", pad=False)
    rows = [{"question": "how", "answer": "two " * (1 + k % 4)} for k in range(30)]
    (tmp_path / "d.jsonl").write_text(lines(rows))
    for packing in (False, True):
        task = CausalLM(config(tmp_path / "d.jsonl", base, **{"train.packing": packing}))
        batch = task.train().batch(np.arange(7))
        assert 0 < int(batch["attention_mask"].sum()) < batch["attention_mask"].numel()
        model = task.load_base()
        alone = [task.loss(model, task.train().batch(np.array([k]))).item() for k in range(7)]
        assert task.loss(model, batch).item() == pytest.approx(sum(alone), abs=1e-3)


def test_the_site_is_no_column_of_anybody(tmp_path: Path) -> None:
    """A row may have a column `site` of its own."""
    rows = [{"text": "good film", "site": "x"}] * 12
    folder = put(tmp_path / "d", {"a.jsonl": lines(rows), "b.jsonl": lines(rows)})
    tree = {"federation.partition": "natural", "federation.clients": 2}
    table = CausalLM(config(folder, **tree)).read()["train"]
    assert set(table[SITE]) == {"a", "b"}
