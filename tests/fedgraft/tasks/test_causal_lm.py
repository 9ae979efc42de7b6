from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import save_llama, shared
from torch import nn

from fedgraft.config import Config
from fedgraft.errors import ConfigError, DataError
from fedgraft.tasks.causal_lm import CausalLM
from fedgraft.tasks.encoding import Fit, kept_parts
from fedgraft.tasks.packing import IGNORED
from fedgraft.tasks.sequences import Sequences
from fedgraft.tasks.templates import Template, default_template

QA = "Question: {question}\nAnswer: {answer}"
BOS, EOS = 2, 3
EOS_260K = 2


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """Thirty questions with answers of one to three words."""
    rows = [
        {"question": "how many is one plus two ?", "answer": " ".join(["three"] * (1 + k % 3))}
        for k in range(30)
    ]
    return write(tmp_path / "sums.jsonl", rows)


def make(base: Path, data: Path, **groups: dict[str, Any]) -> CausalLM:
    tree: dict[str, Any] = {
        "task": {"name": "causal-lm", "data": str(data)} | groups.pop("task", {}),
        "model": {"base": str(base)},
        "federation": {"clients": 2} | groups.pop("federation", {}),
    }
    return CausalLM(Config.from_dict(tree | groups))


def sequences(task: CausalLM) -> Sequences:
    examples = task.train()
    assert isinstance(examples, Sequences)
    return examples


def words(task: CausalLM, ids: Any) -> str:
    return str(task._tokenizer.decode([int(token) for token in ids]))


def test_template_fills_and_finds_the_response() -> None:
    template = Template.parse("{{Q}} {question}\nA: {answer}.")
    assert template.fields == ("question", "answer")
    written = template.write({"question": "2 {x}?", "answer": "four"})
    ((start, end),) = written.responses
    assert written.text == "{Q} 2 {x}?\nA: four." and written.text[start:end] == "four"
    assert written.text[: written.opening] == "{Q} "


@pytest.mark.parametrize("source", ["plain", "{}", "{a", "{a!r}", "{a:>5}", "{} {b}"])
def test_templates_that_do_not_work(source: str) -> None:
    with pytest.raises(ConfigError, match=r"task\.template"):
        Template.parse(source)


@pytest.mark.parametrize(
    ("columns", "fields"),
    [
        ("text instruction input output", ("instruction", "input", "output")),
        ("instruction output", ("instruction", "output")),
        ("prompt completion text", ("prompt", "completion")),
        ("question answer", ("question", "answer")),
        ("id text", ("text",)),
    ],
)
def test_default_templates(columns: str, fields: tuple[str, ...]) -> None:
    assert default_template(columns.split(), "text").fields == fields


def test_no_default_template() -> None:
    with pytest.raises(DataError, match="no default template fits the columns a, b") as caught:
        default_template(["a", "b"], "text")
    assert "\n" not in caught.value.remedy


def test_the_response_is_exactly_what_counts(llama: Path, sums: Path) -> None:
    task = make(llama, sums)
    examples = sequences(task)
    answers = task.split("train").table["answer"]
    prompt = "Question : how many is one plus two ? Answer :"
    for ids, labels, answer in zip(examples.tokens, examples.labels, answers, strict=True):
        counted = labels != IGNORED
        assert words(task, ids[counted]) == f"{answer} </s>"
        assert words(task, ids[~counted]) == f"<s> {prompt}"
        assert ids[0] == BOS and list(ids).count(EOS) == 1
        assert np.array_equal(labels[counted], ids[counted])


def test_every_token_counts_with_loss_all(llama: Path, sums: Path) -> None:
    examples = sequences(make(llama, sums, train={"loss": "all"}))
    assert all(map(np.array_equal, examples.tokens, examples.labels))


def test_text_after_the_response_does_not_count(llama: Path, sums: Path) -> None:
    task = make(llama, sums, task={"template": "{answer} plus {answer} good film"})
    examples = sequences(task)
    answer = task.split("train").table["answer"][0]
    ids, labels = examples.tokens[0], examples.labels[0]
    assert words(task, ids) == f"<s> {answer} plus {answer} good film </s>"
    start = 1 + len(answer.split()) + 1
    stop = start + len(answer.split())
    assert np.flatnonzero(labels != IGNORED).tolist() == [*range(start, stop), len(ids) - 1]


def test_tokens_that_touch_the_response_do_not_count(llama: Path, sums: Path) -> None:
    task = make(llama, sums, task={"template": "Answer:{answer}:"})
    examples = sequences(task)
    for ids, labels, row in zip(
        examples.tokens, examples.labels, task.split("train").table, strict=True
    ):
        assert words(task, ids) == f"<s> Answer : {row['answer']} : </s>"
        assert words(task, ids[labels != IGNORED]) == f"{row['answer']} </s>"


def test_a_blank_input_has_no_heading(llama: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "say", "input": "hello" * (k % 2), "output": "bye"} for k in range(20)]
    task = make(llama, write(tmp_path / "d.jsonl", rows))
    task.train()
    texts = {task.writer.write(row).text for row in task.split("train").table}
    assert texts == {
        "### Instruction:\nsay\n\n### Response:\nbye",
        "### Instruction:\nsay\n\n### Input:\nhello\n\n### Response:\nbye",
    }


def manual_loss(model: nn.Module, rows: list[Any], labels: list[Any]) -> tuple[float, int]:
    """Cross-entropy token by token, one row at a time, in float64."""
    total, count = 0.0, 0
    for ids, row_labels in zip(rows, labels, strict=True):
        scores = model(input_ids=torch.tensor(ids)[None]).logits[0].double()
        for position in range(1, len(ids)):
            if row_labels[position] != IGNORED:
                before = scores[position - 1]
                target = before[int(row_labels[position])]
                total += float((before.logsumexp(0) - target).detach())
                count += 1
    return total, count


@pytest.mark.parametrize("loss", ["response", "all"])
def test_loss_by_hand(llama: Path, sums: Path, loss: str) -> None:
    task = make(llama, sums, train={"loss": loss})
    model, examples = task.load_base(), sequences(task)
    picked = np.arange(6)
    batch = examples.batch(picked)
    lengths = [len(examples.tokens[k]) for k in picked]
    assert min(lengths) < max(lengths) == batch["input_ids"].shape[1]  # so there is padding
    expected, count = manual_loss(
        model, [examples.tokens[k] for k in picked], [examples.labels[k] for k in picked]
    )
    assert task.count(batch) == count
    # some 100 terms of size 5 in float32: 500 * 1e-6 is the rounding to expect
    assert task.loss(model, batch).item() == pytest.approx(expected, abs=1e-3)
    assert task.loss(model, examples.batch(picked[::-1])).item() == pytest.approx(
        expected, abs=1e-3
    )
    halves = (examples.batch(half) for half in (picked[:2], picked[2:]))
    with torch.no_grad():
        measured = task.measure(model, halves)
    assert measured["loss"] == pytest.approx(expected / count, abs=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(expected / count), rel=1e-4)


def test_the_loss_has_the_gradient_of_the_adapter(llama: Path, sums: Path) -> None:
    task = make(llama, sums)
    model = task.load_base()
    task.loss(model, task.train().batch(np.arange(2))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_measure_by_hand(llama: Path, sums: Path) -> None:
    class Favourite(nn.Module):
        """Scores log 2 for token 1 and 0 for the three others, everywhere."""

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            scores = torch.tensor([0.0, math.log(2), 0.0, 0.0])
            return SimpleNamespace(logits=scores.expand(*input_ids.shape, 4))

    labels = torch.tensor([[1, 1, 0, IGNORED], [IGNORED, IGNORED, 3, 1]])
    ids = labels.clamp(min=0)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    measured = make(llama, sums).measure(Favourite(), iter([batch]))
    # predicted are 1, 0 and 3, 1: two of probability 2/5, two of 1/5
    loss = -(2 * math.log(2 / 5) + 2 * math.log(1 / 5)) / 4
    assert measured == pytest.approx(
        {"loss": loss, "perplexity": math.exp(loss), "accuracy": 0.5}, rel=1e-6
    )


def test_a_long_row_loses_its_prompt_and_keeps_its_response(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"prompt": "bad " * (20 if k % 4 == 0 else 2) + "film ", "completion": "good"}
        for k in range(40)
    ]
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "train.jsonl", rows)
    write(tmp_path / "d" / "test.jsonl", rows)
    task = make(llama, tmp_path / "d", task={"max-length": 8})
    examples = task.test()
    assert isinstance(examples, Sequences) and len(examples) == 40
    assert (
        "test: 10 of 40 rows are longer than 8 tokens and were cut: 10 lost the beginning of their "
        "prompt, 0 the end of their response" in caplog.text
    )
    assert task.fits["test"] == Fit(rows=40, longest=24, cut=10, prompts_cut=10)
    # the first of every four has 24 tokens; <s> stays, and the prompt's last words
    assert words(task, examples.tokens[0]) == "<s> bad bad bad bad film good </s>"
    assert words(task, examples.tokens[1]) == "<s> bad bad film good </s>"
    for ids, labels in zip(examples.tokens, examples.labels, strict=True):
        assert words(task, ids[labels != IGNORED]) == "good </s>"

    every = make(llama, tmp_path / "d", task={"max-length": 8}, train={"loss": "all"})
    whole = every.test()
    assert isinstance(whole, Sequences)
    assert words(every, whole.tokens[0]) == "<s> bad bad bad bad bad bad bad"
    assert every.fits["test"] == Fit(rows=40, longest=24, cut=10, responses_cut=10)

    with pytest.raises(DataError, match="none of the 40 test rows has a token for the loss"):
        make(llama, tmp_path / "d", task={"max-length": 1}).test()


def test_a_response_that_cannot_fit_loses_its_end(llama: Path, tmp_path: Path) -> None:
    rows = [{"question": "how many", "answer": "three " * 20}] * 30
    task = make(llama, write(tmp_path / "d.jsonl", rows), task={"max-length": 8})
    examples = sequences(task)
    # <s> Question : how many Answer : are seven tokens, the answer and its end 21; half of the
    # limit stays with the prompt: a quarter of it, <s> Question, opens the template
    assert words(task, examples.tokens[0]) == "<s> Question Answer : three three three three"
    assert task.fits["train"] == Fit(rows=24, longest=28, cut=24, prompts_cut=24, responses_cut=24)


@pytest.mark.parametrize(
    ("row", "limit", "kept"),
    [
        ((10, 6, 10, 2), 10, (0, 0, 10)),  # length, first, end of the response, opening
        ((10, 6, 10, 2), 8, (2, 4, 10)),
        ((10, 6, 10, 5), 8, (2, 4, 10)),  # an opening of a quarter of the limit
        ((10, 6, 10, 2), 4, (0, 6, 10)),
        ((10, 6, 10, 2), 2, (0, 5, 7)),  # half and half
        ((10, 1, 10, 1), 6, (1, 1, 6)),
        ((10, 2, 5, 1), 6, (1, 1, 6)),  # later turns lose their end
        ((10, 5, 8, 1), 6, (1, 3, 8)),
    ],
)
def test_what_stays_of_a_row(
    row: tuple[int, int, int, int], limit: int, kept: tuple[int, int, int]
) -> None:
    opening, begin, end = kept_parts(*row, limit)
    assert (opening, begin, end) == kept
    assert opening + end - begin == min(limit, row[0])


def test_a_long_text_is_split_and_every_token_predicted_once(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "Question Answer a bad good film very dull fine the was it how many is two three"
    rows = [{"text": text if k % 2 else "good film"} for k in range(20)]
    (tmp_path / "d").mkdir()
    for split in ("train", "test"):
        write(tmp_path / "d" / f"{split}.jsonl", rows)
    task = make(llama, tmp_path / "d", task={"max-length": 8})
    examples = task.test()
    assert isinstance(examples, Sequences)
    # <s>, 17 words and </s> are 19 tokens: 8, 7 more and the last 4, so 8 + 8 + 5 with overlaps
    assert [len(row) for row in examples.tokens][:5] == [4, 8, 8, 5, 4]
    pieces = [words(task, row) for row in list(examples.tokens)[1:4]]
    assert pieces[0].endswith(" very") and pieces[1].startswith("very dull")
    everything = [int(token) for row in list(examples.tokens)[1:4] for token in row[1:]]
    assert words(task, everything) == f"{text} </s>"
    assert task.count(examples.batch(np.arange(1, 4))) == 18
    assert len(task.split("test").table) == len(examples) == 40
    assert "test: 10 of 20 texts are longer than 8 tokens and were split into 30" in caplog.text


def test_a_text_without_a_prompt(tmp_path: Path) -> None:
    rows = [{"text": "good film"}] * 20 + [{"text": "good"}] * 20
    base = save_llama(tmp_path / "llama", begin=False)
    task = make(base, write(tmp_path / "d.jsonl", rows))
    batch = sequences(task).batch(np.arange(len(sequences(task))))
    # without <s> the first word is given, not predicted: one or two predictions a row
    lengths = batch["attention_mask"].sum(1)
    assert task.count(batch) == int((lengths - 1).sum())
    with pytest.raises(DataError, match="has a token for the loss within 1 tokens"):
        make(base, tmp_path / "d.jsonl", task={"max-length": 1}).train()


def test_clients_and_dealing_by_topic(llama: Path, tmp_path: Path) -> None:
    rows = [
        {"question": "how ?", "answer": "fine", "topic": ["film", "sums"][k % 2]} for k in range(60)
    ]
    path = write(tmp_path / "d.jsonl", rows)
    by_topic = {"partition": "natural", "partition-column": "topic", "clients": 2}
    task = make(llama, path, federation=by_topic)
    assert sorted(task.describe(k) for k in range(2)) == ["film", "sums"]
    skewed = make(llama, path, federation=by_topic | {"partition": "shards"})
    assert sum(len(skewed.train(k)) for k in range(2)) == len(skewed.train()) == 48
    with pytest.raises(ConfigError, match="needs labels"):
        make(llama, path, federation={"partition": "dirichlet"}).train(0)
    assert task.train(0) is not task.train() and task.train() is task.train()


def test_a_column_missing_from_a_row(llama: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"question": "a", "answer": "b"}, {"answer": "b"}])
    with pytest.raises(DataError, match=r"d\.jsonl, line 2 has no column 'question'"):
        make(llama, path).train()
    with pytest.raises(DataError, match=r"no column 'topic'; it has question, answer"):
        make(llama, path, task={"template": "{topic} {answer}"}).train()


def test_stories260k_on_gsm8k() -> None:
    base, data = shared("models/stories260K"), shared("data/gsm8k")
    settings: dict[str, Any] = {"template": QA, "max-length": 256, "samples": 8}
    task = make(base, data, task=settings, train={"loss": "all"})
    model, examples = task.load_base(), task.test()
    assert len(examples) == 1319
    batches = (examples.batch(np.arange(start, start + 25)) for start in range(0, 200, 25))
    with torch.no_grad():
        measured = task.measure(model, batches)
    # A plain loop over these 200 rows gives 4.674 without the end-of-text token, 4.691 with it.
    assert measured["loss"] == pytest.approx(4.691, abs=2e-3)

    # Byte-pair pieces: the counted tokens spell the answer and nothing else, to its end unless cut.
    answering = make(base, data, task=settings | {"max-length": 512})
    rows = answering.split("train").table
    kept = sequences(answering)
    for ids, labels, row in zip(kept.tokens, kept.labels, rows, strict=True):
        spelled = answering._tokenizer.decode(ids[labels != IGNORED], skip_special_tokens=True)
        whole = len(row["answer"]) if ids[-1] == EOS_260K else len(spelled)
        assert spelled == row["answer"][:whole]
