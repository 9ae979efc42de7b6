from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import save_bert, save_llama, shared
from torch import nn

from fedgraft.config import Config
from fedgraft.errors import ConfigError, DataError
from fedgraft.resident_model import ResidentModel
from fedgraft.tasks.rows import Subset
from fedgraft.tasks.sequences import Sequences
from fedgraft.tasks.text_classification import TextClassification


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


def make(base: Path, data: Path, **groups: dict[str, Any]) -> TextClassification:
    tree: dict[str, Any] = {
        "task": {"name": "text-classification", "data": str(data)} | groups.pop("task", {}),
        "model": {"base": str(base)},
        "federation": {"clients": 2} | groups.pop("federation", {}),
    }
    return TextClassification(Config.from_dict(tree | groups))


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Twenty rows for each of three labels, of one to five words."""
    lines = ["text,label"]
    for row in range(60):
        label = ("good", "bad", "fine")[row % 3]
        lines.append(f"{' '.join([label] * (1 + row % 5))},{label}")
    path = tmp_path / "reviews.csv"
    path.write_text("\n".join(lines))
    return path


def test_splits_classes_and_labels(bert: Path, reviews: Path) -> None:
    task = make(bert, reviews)
    assert task.classes == ("bad", "fine", "good")
    assert [len(split) for split in (task.train(), task.validation(), task.test())] == [48, 6, 6]
    batch = task.train().batch(np.arange(48))
    words = [task._tokenizer.decode(row).split()[1] for row in batch["input_ids"]]
    assert [task.classes[number] for number in batch["labels"]] == words


def test_numeric_labels_are_sorted_as_numbers(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "d.tsv"
    path.write_text("\n".join(f"film\t{label}" for label in ["10", "9", "-1"] * 10))
    assert make(bert, path).classes == ("-1", "9", "10")


def test_padding_and_truncation(bert: Path, reviews: Path) -> None:
    task = make(bert, reviews, task={"max-length": 4})
    examples = task.train()
    assert isinstance(examples, Sequences)
    lengths = [len(row) for row in examples.tokens]
    assert max(lengths) == 4 and min(lengths) == 2
    picked = np.array([lengths.index(2), lengths.index(3)])
    batch = examples.batch(picked)
    assert batch["input_ids"].shape == (2, 3)  # the longest of the batch, not of the split
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["input_ids"][0, 2] == task._tokenizer.pad_token_id


def test_the_base_bounds_the_length(
    bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "d.tsv"
    path.write_text("\n".join(f"{'film ' * 200}\t{label}" for label in [0, 1] * 5))
    examples = make(bert, path).train()
    assert isinstance(examples, Sequences) and len(examples.tokens[0]) == 64
    assert "task.max-length is 256, and the base takes 64 tokens" in caplog.text


def test_loss_is_cross_entropy_summed(bert: Path, reviews: Path) -> None:
    task = make(bert, reviews)
    model = task.load_base()
    examples = task.train()
    batch = examples.batch(np.arange(10))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = 0.0
    for scores, label in zip(logits.double().tolist(), batch["labels"].tolist(), strict=True):
        expected += math.log(sum(math.exp(score) for score in scores)) - scores[label]
    # float32 against float64: the sum of ten terms of size 1 is good to 1e-5
    assert task.loss(model, batch).item() == pytest.approx(expected, abs=1e-5)
    assert task.count(batch) == 10

    shuffled = examples.batch(np.arange(10)[::-1])
    one_by_one = sum(task.loss(model, examples.batch(np.array([k]))).item() for k in range(10))
    assert task.loss(model, shuffled).item() == pytest.approx(expected, abs=1e-5)
    # alone a row has no padding
    assert one_by_one == pytest.approx(expected, abs=1e-5)


def test_measure_by_hand(bert: Path, reviews: Path) -> None:
    class Scores(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return SimpleNamespace(logits=input_ids.float())

    task = make(bert, reviews)
    first = {"input_ids": torch.tensor([[2, 0, 0], [0, 2, 0]]), "labels": torch.tensor([0, 2])}
    second = {"input_ids": torch.tensor([[0, 0, 0]]), "labels": torch.tensor([0])}
    # -log softmax: of the 2 against two zeros, of a 0 against a 2 and a 0, of one among three
    rest = math.log(math.e**2 + 2)
    expected = ((rest - 2) + rest + math.log(3)) / 3
    measured = task.measure(Scores(), iter([first, second]))
    # bad is guessed twice, both right: F1 1; fine is guessed once, wrongly, and good never: 0
    f1 = {"macro_f1": 1 / 3, "f1[bad]": 1.0, "f1[fine]": 0.0, "f1[good]": 0.0}
    assert measured == pytest.approx({"accuracy": 2 / 3, "loss": expected} | f1, rel=1e-6)


def test_clients_share_the_rows_out(bert: Path, reviews: Path) -> None:
    task = make(bert, reviews, federation={"clients": 3, "partition": "dirichlet"})
    clients = [task.train(k) for k in range(3)]
    dealt = [row for client in clients for row in client.rows]
    assert sorted(dealt) == list(range(48))
    for client in clients:
        assert isinstance(client, Subset)
        alone = client.batch(np.array([0]))
        pooled = task.train().batch(client.rows[[0]])
        assert all(torch.equal(alone[name], pooled[name]) for name in alone)
    assert all(len(task.validation(k)) > 0 for k in range(3))
    again = make(bert, reviews, federation={"clients": 3, "partition": "dirichlet"})
    assert [len(again.train(k)) for k in range(3)] == [len(client) for client in clients]
    with pytest.raises(ConfigError, match="there is no client 3"):
        task.train(3)


def test_dealing_by_a_column(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    rows = [f"film,{row % 2},{'ann' if row % 3 else 'bob'}" for row in range(60)]
    path.write_text("\n".join(["text,label,who", *rows]))
    natural = {"clients": 2, "partition": "natural", "partition-column": "who"}
    task = make(bert, path, federation=natural)
    whole = Counter(task.split("train").table["who"])
    assert {len(task.train(k)) for k in range(2)} == set(whole.values())
    assert {task.describe(k) for k in range(2)} == set(whole)
    validation = task.split("validation").table
    for k in range(2):
        alike = validation.select(task.validation(k).rows)["who"]
        assert task.describe(k) == alike[0] and len(set(alike)) == 1
    with pytest.raises(DataError, match=r"no column 'whom'; it has text, label, who"):
        make(bert, path, federation=natural | {"partition-column": "whom"}).train(0)


def test_dirichlet_goes_by_the_column_that_is_named(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    rows = [f"film,{row % 2},topic {row // 2 % 3}" for row in range(300)]
    path.write_text("\n".join(["text,label,topic", *rows]))
    skewed = {"clients": 3, "partition": "dirichlet", "concentration": 0.05}
    task = make(bert, path, federation=skewed | {"partition-column": "topic"})
    table = task.split("train").table
    most = Counter[str]()
    for client in range(3):
        dealt = table.select(task.train(client).rows)
        for column in ("label", "topic"):
            most[column] += max(Counter(dealt[column]).values())
        assert "topic" in task.describe(client)
    # topics (a third each) lean to one client, and labels stay as even as they were
    assert most["topic"] > 0.6 * len(table) > most["label"]


def test_describe_by_label(bert: Path, reviews: Path) -> None:
    task = make(bert, reviews, federation={"partition": "shards"})
    rows = task.train(0).rows
    label, most = Counter(task.split("train").table.select(rows)["label"]).most_common(1)[0]
    assert task.describe(0).startswith(f"{most / len(rows):.0%} {label}")


def test_labels_that_do_not_work(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("film\t1\n" * 20)
    with pytest.raises(DataError, match="has the label '1'"):
        make(bert, tmp_path).load_base()
    (tmp_path / "train.tsv").write_text("film\t1\nfilm\t0\n" * 20)
    (tmp_path / "test.tsv").write_text("film\t1\nfilm\t2\n")
    with pytest.raises(DataError, match=r"test split .* has the label '2'.*they have 0, 1"):
        make(bert, tmp_path).test()


def test_a_test_split_without_labels_is_cut_instead(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("film\t1\nfilm\t0\n" * 20)
    (tmp_path / "test.tsv").write_text("film\t-1\n" * 7)
    assert len(make(bert, tmp_path).test()) == 4


def test_a_decoder_without_a_padding_token(tmp_path: Path, reviews: Path) -> None:
    task = make(save_llama(tmp_path / "llama", pad=False), reviews)
    assert task.extras == ("score",)
    model = task.load_base()
    examples = task.train()
    together = task.loss(model, examples.batch(np.arange(8)))
    alone = sum(task.loss(model, examples.batch(np.array([k]))).item() for k in range(8))
    # Llama classifies by the last token that is no padding: finding another one would show
    assert together.item() == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("save", [save_bert, save_llama])
def test_an_adapter_that_changes_nothing(tmp_path: Path, reviews: Path, save: Any) -> None:
    task = make(save(tmp_path / "base"), reviews)
    resident = ResidentModel(task, task.config)
    adapter = resident.initial_adapter(0)
    assert {name.split(".")[-2] for name in adapter.extras} == set(task.extras)
    measured = resident.evaluate(task, adapter, task.train())
    with torch.no_grad():
        expected = task.measure(task.load_base(), resident.batches(task.train(), 16))
    assert {name: measured[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_sst2(bert: Path) -> None:
    task = make(bert, shared("data/sst2"), task={"samples": 100})
    assert task.classes == ("0", "1")
    # 6,920 and 872 rows: a tenth of the training file becomes the test split
    assert [len(split) for split in (task.train(), task.validation(), task.test())] == [
        100,
        872,
        692,
    ]
