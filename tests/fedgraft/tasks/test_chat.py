from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_llama, shared
from transformers import AutoTokenizer

from fedgraft.config import Config
from fedgraft.errors import DataError
from fedgraft.tasks.causal_lm import CausalLM
from fedgraft.tasks.chat import ChatWriter
from fedgraft.tasks.messages import read_messages
from fedgraft.tasks.packing import IGNORED
from fedgraft.tasks.sequences import Sequences

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}{% endif %} "
    "{% endfor %}"
)
LLAMA2 = (  # ends a turn without a mark of its own, and takes no add_generation_prompt
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
)
QWEN3 = (  # only the last turn thinks
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('a user begins') }}{% endif %}" + CHATML
)
LOST = "{% for m in messages %}{{ m.role }} {{ m.content | length }}{% endfor %}"

TALK = [("user", "how many ?"), ("assistant", "two"), ("user", "say hello"), ("assistant", "hello")]


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def responses(llama: Path, template: str | None, turns: list[tuple[str, str]]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = template
    written = ChatWriter("chat", tokenizer).write({"chat": json.dumps(messages(turns))})
    return [written.text[start:end] for start, end in written.responses]


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (CHATML, ["two<|im_end|>", "hello<|im_end|>"]),
        (MARKED, ["two</s>", "hello</s>"]),
        (LLAMA2, [" two </s>", " hello </s>"]),
        (QWEN3, ["two<|im_end|>", "<think>\n\n</think>\n\nhello<|im_end|>"]),
        (None, [" two</s>", " hello</s>"]),
    ],
    ids=["chatml", "marked", "llama2", "qwen3", "default"],
)
def test_every_turn_of_the_assistant_is_found(
    llama: Path, template: str | None, found: list[str]
) -> None:
    assert responses(llama, template, TALK) == found


def test_the_same_words_twice_are_told_apart(llama: Path) -> None:
    turns = [("user", "two"), ("assistant", "two"), ("user", "two"), ("assistant", "two")]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    for template in (CHATML, QWEN3, LLAMA2):
        tokenizer.chat_template = template
        written = ChatWriter("chat", tokenizer).write({"chat": json.dumps(messages(turns))})
        first, second = written.responses
        assert written.text[: first[0]].count("two") == 1
        assert written.text[: second[0]].count("two") == 3


def test_what_a_template_refuses_or_hides_is_named(llama: Path) -> None:
    with pytest.raises(DataError, match="chat template: a user begins"):
        responses(llama, STRICT, [("assistant", "hello")])
    with pytest.raises(DataError, match="does not show where message 2 stands"):
        responses(llama, LOST, TALK)


def test_the_default_template(llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    row = {"chat": json.dumps(messages([("system", "say hello"), *TALK]))}
    assert ChatWriter("chat", tokenizer).write(row).text == (
        "<s>System: say hello\nUser: how many ?\nAssistant: two</s>\n"
        "User: say hello\nAssistant: hello</s>\n"
    )
    assert ChatWriter("chat", None).write(row).text.startswith("System: say hello\nUser: how")


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ([], "has no messages"),
        (None, "has no messages"),
        ("hello", "holds text that is no list of messages"),
        ({"role": "user"}, "holds an object, where a list"),
        (["hello"], "a message 1 that is no object"),
        ([{"content": "a"}], "a message 1 without a role"),
        (messages([("user", "a"), ("robot", "b")]), "a message 2 of role 'robot'"),
        ([{"role": "assistant", "content": ["a"]}], "a message 1 whose content is no text"),
        (messages([("user", "a"), ("assistant", " ")]), "a message 2 of an assistant that says no"),
        ([{"role": "assistant", "content": None}], "a message 1 whose content is no text"),
        (messages([("user", "a")]), "no message of an assistant"),
    ],
)
def test_records_that_are_no_conversation(value: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_messages(value)


def test_sharegpt_and_json_text() -> None:
    record = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    wanted = messages([("user", "a"), ("assistant", "b")])
    assert read_messages(record) == read_messages(json.dumps(wanted)) == wanted


def make(base: Path, data: Path, **task: Any) -> CausalLM:
    return CausalLM(
        Config.from_dict(
            {
                "task": {"name": "causal-lm", "data": str(data), **task},
                "model": {"base": str(base)},
                "federation": {"clients": 2},
            }
        )
    )


def write(folder: Path, records: list[Any], kind: str) -> Path:
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(records), folder / "d.parquet")
        return folder / "d.parquet"
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder / "d.jsonl"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_loss_counts_what_the_assistant_says(llama: Path, tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, [{"messages": messages(TALK)}] * 20, kind)
    task = make(llama, path)
    examples = task.train()
    assert isinstance(examples, Sequences)
    ids, labels = examples.tokens[0], examples.labels[0]
    spelled = task._tokenizer.decode(ids)
    # the tiny tokenizer knows neither "User" nor "Assistant"
    assert spelled == "<s> [unk] : how many ? [unk] : two </s> [unk] : say hello [unk] : hello </s>"
    assert task._tokenizer.decode(ids[labels != IGNORED]) == "two </s> hello </s>"


def test_a_long_conversation_keeps_its_first_response(llama: Path, tmp_path: Path) -> None:
    turns = [("user", "bad " * 20 + "film"), *TALK[1:]]
    task = make(llama, write(tmp_path, [{"messages": messages(turns)}] * 20, "jsonl"))
    assert task.train() is not None and task.fits["train"].cut == 0
    short = make(llama, tmp_path / "d.jsonl", **{"max-length": 12})
    cut = short.train()
    assert isinstance(cut, Sequences)
    # <s> and User: open the template; 12 tokens end with the first response, its end included
    assert short._tokenizer.decode(cut.tokens[0]) == (
        "<s> [unk] : bad bad bad bad film [unk] : two </s>"
    )
    assert short.fits["train"].prompts_cut == short.fits["train"].responses_cut == 16


def test_broken_conversations_are_named_with_their_line(llama: Path, tmp_path: Path) -> None:
    records = [{"messages": messages(TALK)}, {"messages": messages(TALK[:1])}]
    with pytest.raises(DataError, match=r"d\.jsonl, line 2 has no message of an assistant"):
        make(llama, write(tmp_path, records, "jsonl")).train()


def test_a_row_the_template_refuses_is_named_with_its_line(llama: Path, tmp_path: Path) -> None:
    base = save_llama(tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = STRICT
    tokenizer.save_pretrained(base)
    (tmp_path / "d").mkdir()
    records = [{"messages": messages(TALK)}] * 9
    write(tmp_path / "d", [*records, {"messages": messages(TALK[1:])}], "jsonl")
    (tmp_path / "d" / "d.jsonl").rename(tmp_path / "d" / "train.jsonl")
    write(tmp_path / "d", records, "jsonl").rename(tmp_path / "d" / "test.jsonl")
    task = make(base, tmp_path / "d")
    assert len(task.test()) == 9
    with pytest.raises(DataError, match=r"train\.jsonl, line 10 cannot be written by the chat"):
        [task.split(name) for name in ("train", "validation")]


def test_stories260k_writes_conversations_by_the_default(tmp_path: Path) -> None:
    base = shared("models/stories260K")
    task = make(base, write(tmp_path, [{"messages": messages(TALK)}] * 20, "jsonl"))
    examples = task.train()
    assert isinstance(examples, Sequences)
    ids, labels = examples.tokens[0], examples.labels[0]
    assert ids[0] == 1 and list(ids).count(2) == 2
    assert task._tokenizer.decode(ids[labels != IGNORED]) == "two</s> hello</s>"


def test_a_template_that_prints_the_day_prints_the_same_every_day(llama: Path) -> None:
    dated = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}Today: {{ date_string }} " + CHATML
    )
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = dated
    written = ChatWriter("chat", tokenizer).write({"chat": json.dumps(messages(TALK))})
    assert written.text.startswith("Today: 26 Jul 2024 ")


def test_a_prompt_is_asked_as_a_user_would(llama: Path, tmp_path: Path) -> None:
    task = make(llama, write(tmp_path, [{"messages": messages(TALK)}] * 12, "jsonl"))
    question = task.asked("say bye")
    assert question.prompt == "say bye"
    tokenizer = AutoTokenizer.from_pretrained(llama)
    expected = "<s>User: say bye\nAssistant:"  # the default template, with its special token once
    assert question.tokens.tolist() == tokenizer(expected, add_special_tokens=False)["input_ids"]
