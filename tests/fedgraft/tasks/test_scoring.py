"""Accuracy and F1 over a whole split, and which metric is watched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedgraft.config import Config
from fedgraft.errors import ConfigError
from fedgraft.seeds import stream
from fedgraft.tasks.digits import Digits
from fedgraft.tasks.scoring import score_classes


class Guesses(nn.Module):
    """A classifier whose input is what it guesses."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, guess: torch.Tensor) -> Any:
        return SimpleNamespace(logits=nn.functional.one_hot(guess, self.classes).float())


def scored(guesses: list[int], labels: list[int], names: list[str], size: int) -> dict[str, float]:
    batches = (
        {
            "guess": torch.tensor(guesses[k : k + size]),
            "labels": torch.tensor(labels[k : k + size]),
        }
        for k in range(0, len(labels), size)
    )
    return score_classes(Guesses(len(names)), batches, names)


def test_f1_by_hand_whatever_the_batches() -> None:
    guesses, labels = [0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 2, 0]
    for size in (1, 2, 6):
        found = scored(guesses, labels, ["a", "b", "c", "d"], size)
        # a: 3 right of 4 guesses and 3 labels, 6/7; b: 1 of 2 and 2, 1/2; c: never guessed, 0; d
        # occurs nowhere and does not count
        assert found["accuracy"] == pytest.approx(4 / 6)
        assert found["macro_f1"] == pytest.approx((6 / 7 + 1 / 2 + 0) / 3)
        assert {n: v for n, v in found.items() if n.startswith("f1")} == pytest.approx(
            {"f1[a]": 6 / 7, "f1[b]": 1 / 2, "f1[c]": 0.0}
        )
        # one-hot scores: log(e + 3), less 1 where the guess is right
        assert found["loss"] == pytest.approx(np.log(np.e + 3) - 4 / 6, rel=1e-6)


def test_f1_agrees_with_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = stream(3, "f1")
    guesses, labels = random.integers(0, 7, (2, 200)).tolist()
    found = scored(guesses, labels, list("abcdefg"), 33)
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(labels, guesses, average="macro"))
    each = metrics.f1_score(labels, guesses, average=None)
    assert [found[f"f1[{name}]"] for name in "abcdefg"] == pytest.approx(each.tolist())


def test_of_many_classes_there_is_no_single_f1() -> None:
    names = [str(k) for k in range(21)]
    assert set(scored([1], [1], names, 1)) == {"accuracy", "macro_f1", "loss"}


def test_the_metric_that_is_watched_can_be_chosen(tiny: Config) -> None:
    own, f1, loss = (
        Digits(tiny.with_overrides({"evaluate.metric": name} if name else {}))
        for name in (None, "macro-f1", "loss")
    )
    assert (own.metric, own.direction) == ("accuracy", "max")
    assert (f1.metric, f1.direction) == ("macro_f1", "max")
    assert (loss.metric, loss.direction) == ("loss", "min")
    assert f1.better(0.6, 0.5) and loss.better(0.5, 0.6) and not loss.better(0.6, 0.5)
    assert (Digits.metric, Digits.direction) == ("accuracy", "max")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("speed", "Choose from accuracy, macro-f1, loss."),
        ("exact-match", "Set evaluate.answers to exact-match with it."),
    ],
)
def test_a_metric_that_is_not_measured_is_refused(tiny: Config, name: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=rf"evaluate\.metric is '{name}', .* digits") as caught:
        Digits(tiny.with_overrides({"evaluate.metric": name}))
    assert caught.value.remedy == remedy


@pytest.mark.parametrize("keys", [{"evaluate.answers": "rouge-l"}, {"evaluate.prompts": ["Hi"]}])
def test_a_classifier_writes_no_text(tiny: Config, keys: dict[str, Any]) -> None:
    task = Digits(tiny.with_overrides(keys))
    for ask in (task.writing, lambda: task.questions("test", None, 3)):
        with pytest.raises(ConfigError, match="task digits writes no text"):
            ask()
