"""What the resident model writes, against a plain loop, and answers scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import save_llama, shared

from fedgraft.adapter import Adapter
from fedgraft.config import Config
from fedgraft.errors import ConfigError
from fedgraft.generation import evaluate, write
from fedgraft.resident_model import ResidentModel, longest_first
from fedgraft.seeds import stream
from fedgraft.tasks.causal_lm import CausalLM
from fedgraft.tasks.questions import Question, as_it_stands

EOS = 3
NUMBERS = ["one", "two", "three"]


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty questions of different lengths."""
    path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    rows = [
        {
            "question": f"how many is {' plus '.join(NUMBERS[: 1 + k % 3] * (1 + k % 2))} ?",
            "answer": f"{NUMBERS[k % 3]} two {NUMBERS[(k + 1) % 3]}",
        }
        for k in range(30)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module", params=[True, False], ids=["pad-token", "no-pad-token"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), pad=request.param)


def make(base: Path, data: Path, **keys: Any) -> tuple[CausalLM, ResidentModel, Adapter]:
    config = Config().with_overrides(
        {
            "task.name": "causal-lm",
            "task.data": str(data),
            "model.base": str(base),
            "model.device": "cpu",
            "federation.clients": 2,
            "evaluate.max-new-tokens": 12,
            "evaluate.batch-size": 4,
            "threads": 1,
        }
        | {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    )
    task = CausalLM(config)
    model = ResidentModel(task, config)
    start = model.initial_adapter(0)
    draws = {
        name: tensor + torch.from_numpy(stream(1, name).normal(0, 0.1, tensor.shape)).float()
        for name, tensor in start.tensors().items()
    }
    return task, model, start.with_tensors(draws)


def by_hand(model: ResidentModel, tokens: Any, length: int) -> list[int]:
    """Greedy decoding of one row: no batch, no padding, no cache."""
    ids = list(tokens)
    for _ in range(length):
        with torch.inference_mode():
            logits = model.model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return [token for token in ids[len(tokens) :] if token != EOS]


def test_batches_with_padding_and_cache_write_what_a_plain_loop_does(
    base: Path, sums: Path
) -> None:
    task, model, adapter = make(base, sums)
    tokenizer = task.writing().tokenizer
    questions = [
        *task.questions("validation", None, 99),
        as_it_stands("Question", tokenizer),
        as_it_stands("a bad film ?", tokenizer),
    ]
    assert len({len(q.tokens) for q in questions}) > 2
    texts = write(model, task, adapter, questions)
    model.model.train()
    assert write(model, task, adapter, questions) == texts
    assert not model.model.training
    expected = [by_hand(model, question.tokens, 12) for question in questions]
    assert texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert len(set(texts)) > 2
    # the untouched base writes something else
    assert write(model, task, model.initial_adapter(0), questions) != texts


def test_what_the_bases_own_settings_ask_for_is_left_out(base: Path, sums: Path) -> None:
    task, model, adapter = make(base, sums)
    questions = task.questions("test", None, 3)
    texts = write(model, task, adapter, questions)
    settings = model.model.get_base_model().generation_config
    settings.do_sample, settings.temperature, settings.repetition_penalty = True, 5.0, 3.0
    assert write(model, task, adapter, questions) == texts
    assert model.model.get_base_model().generation_config is settings


def test_any_of_the_bases_ends_ends_a_text(base: Path, sums: Path) -> None:
    task, model, adapter = make(base, sums)
    questions = task.questions("validation", None, 2)
    whole = by_hand(model_with(model, adapter), questions[0].tokens, 12)
    model.model.get_base_model().generation_config.eos_token_id = [EOS, whole[2]]
    first = write(model, task, adapter, questions)[0]
    end = whole.index(whole[2])
    assert first == task.writing().tokenizer.decode(whole[:end], skip_special_tokens=True)


def model_with(model: ResidentModel, adapter: Adapter) -> ResidentModel:
    model.take(adapter)
    return model


def test_questions_are_rows_up_to_their_response(base: Path, sums: Path) -> None:
    for loss in ("response", "all"):
        task, _, _ = make(base, sums, train__loss=loss)
        table = task.split("test").table
        questions = task.questions("test", None, 2)
        assert [q.reference for q in questions] == table["answer"][:2]
        assert [q.prompt for q in questions] == [
            f"Question: {question}\nAnswer: " for question in table["question"][:2]
        ]
        decode = task.writing().tokenizer.decode
        for question, text in zip(questions, table["question"][:2], strict=True):
            assert decode(question.tokens) == f"<s> Question : {text} Answer :"
        own = task.questions("validation", 1, 99)
        assert [q.reference for q in own] == task.table("validation", 1)["answer"][:]
        assert 0 < len(own) < len(task.validation())


def test_a_row_that_is_all_response_asks_nothing(base: Path, sums: Path) -> None:
    task, model, adapter = make(
        base, sums, task__template="{answer} {question}", evaluate__answers="rouge-l"
    )
    assert task.questions("test", None, 9)  # the response is the question, after the answer
    task, model, adapter = make(base, sums, task__template="{answer}", evaluate__answers="rouge-l")
    with pytest.raises(ConfigError, match="no validation row has a prompt"):
        evaluate(model, task, adapter, "validation")


def test_a_long_prompt_keeps_its_end(
    base: Path, sums: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task, model, adapter = make(base, sums)
    tokens = np.array([2, *range(4, 34)] * 3, dtype=np.int64)
    assert len(tokens) > 64 - 12  # the base takes 64
    [text] = write(model, task, adapter, [Question("long", tokens)])
    assert "1 of 1 prompts are longer than 52 tokens" in caplog.text
    [same] = write(model, task, adapter, [Question("end", tokens[-52:])])
    assert text == same
    task, model, adapter = make(base, sums, evaluate__max_new_tokens=64)
    with pytest.raises(ConfigError, match=r"max-new-tokens is 64, and the base takes 64"):
        write(model, task, adapter, [Question("any", tokens)])


def test_answers_are_scored_beside_the_loss(
    base: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, model, adapter = make(base, sums, evaluate__answers="exact-match")
    plain = model.evaluate(task, adapter, task.validation())
    references = [q.reference or "" for q in task.questions("validation", None, 99)]
    said = [references[0], *["wrong"] * (len(references) - 1)]
    monkeypatch.setattr("fedgraft.generation.write", lambda *_: said)
    found = evaluate(model, task, adapter, "validation")
    # the right one counts once for itself and for every answer that is the same
    assert found == plain | {"exact_match": 1 / 3, "answers": 3.0}
    assert "exact_match" not in evaluate(model, task, adapter, "validation", client=0)


def test_a_watched_score_is_measured_by_clients_too(base: Path, sums: Path) -> None:
    task, model, adapter = make(
        base,
        sums,
        evaluate__answers="rouge-l",
        evaluate__metric="rouge-l",
        evaluate__answer_samples=2,
    )
    assert (task.metric, task.direction) == ("rouge_l", "max")
    whole = evaluate(model, task, adapter, "test")
    own = evaluate(model, task, adapter, "validation", client=1)
    assert whole["answers"] == 2 and 0 <= whole["rouge_l"] <= 1
    assert own["examples"] == len(task.validation(1)) and "rouge_l" in own


def test_evaluation_does_not_depend_on_the_order_of_rows(base: Path, sums: Path) -> None:
    task, model, adapter = make(base, sums)
    examples = task.train()
    order = longest_first(examples)
    lengths = examples.lengths[order]  # type: ignore[attr-defined]
    assert sorted(order) == list(range(len(examples)))
    assert list(lengths) == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]
    model.take(adapter)
    with torch.inference_mode():
        plain = task.measure(model.model, model.batches(examples, 5))
    found = model.evaluate(task, adapter, examples)
    assert {n: found[n] for n in plain} == pytest.approx(plain, rel=1e-6)
    of_client = longest_first(task.train(0))
    assert sorted(of_client) == list(range(len(task.train(0))))


def test_a_real_model_goes_on_with_its_story(sums: Path) -> None:
    """As the model's own project prints it, at temperature 0."""
    task, model, _ = make(shared("models/stories260K"), sums, evaluate__max_new_tokens=24)
    prompt = as_it_stands("Once upon a time", task.writing().tokenizer)
    [text] = write(model, task, model.initial_adapter(0), [prompt])
    assert text.startswith(", there was a little girl named Lily. She loved to play outside in")
