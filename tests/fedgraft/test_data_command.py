from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Done, call
from tiny_models import save_bert, save_llama, shared


def findings(*arguments: object) -> dict[str, Any]:
    done = call("data", *arguments, "--json")
    found: dict[str, Any] = json.loads(done.out)
    assert done.status == (1 if found["problems"] else 0)
    return found


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


GOOD = [json.dumps({"question": f"how many {k}", "answer": "two"}) for k in range(20)]


def test_all_broken_lines_are_named(tmp_path: Path) -> None:
    bad = ['{"question": "a"', "[1]", '{"question": "a", "answer": " "}', '{"answer": "b"}']
    path = write(tmp_path / "d.jsonl", *GOOD[:4], *bad, *GOOD[4:])
    found = findings(path)
    places = [problem.split("d.jsonl, ")[1].split(" ")[1] for problem in found["problems"]]
    # what is no JSON is found first, what does not fit its column after that
    assert places == ["5", "6", "7", "8"]
    assert found["rows"] == {"train": 16, "validation": 2, "test": 2} and found["guessed"]
    done = call("data", path)
    assert done.status == 1 and "4 problems found." in done.out
    assert "line 7 has nothing in column 'answer'" in " ".join(done.out.split())


def test_lines_are_named_where_all_of_them_are_broken(tmp_path: Path) -> None:
    found = findings(write(tmp_path / "d.jsonl", "{broken", "{broken"))
    *lines, last = found["problems"]
    assert ["line 1" in lines[0], "line 2" in lines[1]] == [True, True] and len(lines) == 2
    assert "holds no rows" in last


def test_broken_csv_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(b"question,answer\na,b\nc\nd\xff,e\n" + b"f,g\n" * 9)
    problems = findings(path)["problems"]
    assert [problem.split("d.csv, ")[1] for problem in problems] == [
        "line 4 is not UTF-8 text",
        "line 3 has 1 column where 2 are wanted",
    ]


def test_examples_show_what_the_loss_counts(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "llama")
    path = write(tmp_path / "d.jsonl", *GOOD)
    plain = findings(path)
    assert plain["unit"] == "characters" and plain["template"].startswith("Question: {question}")
    assert plain["examples"][0][1] == ["two", True]
    found = findings(path, "--base", base, "--set", "task.max-length=8")
    assert found["unit"] == "tokens" and len(found["examples"]) == 3
    counted = ["".join(t for t, on in e if on).split() for e in found["examples"]]
    assert counted == [["two", "</s>"]] * 3
    # <s> Question : how many N Answer : two </s> are ten tokens
    assert found["lengths"]["train"] == {"min": 10, "median": 10, "mean": 10, "p95": 10, "max": 10}
    assert found["fits"]["train"]["prompts_cut"] == found["fits"]["train"]["cut"] == 16
    assert any("lost the beginning of their prompt" in note for note in found["notes"])
    done = call("data", path, "--base", base)
    assert done.status == 0 and "[[ two</s>]]" in done.out.replace("two </s>", "two</s>")
    assert "No problems." in done.out


def test_chats_with_and_without_a_base(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "two"}]
    record = json.dumps({"messages": turns})
    path = write(tmp_path / "d.jsonl", *[record] * 20, '{"messages": []}')
    for options in ([], ["--base", save_llama(tmp_path / "llama")]):
        found = findings(path, *options)
        assert found["problems"] == [f"{path}, line 21 has no messages in column 'messages'"]
        assert "User: ..." in found["template"]
        assert "two" in "".join(text for text, counted in found["examples"][0] if counted)


def test_who_would_hold_what(tmp_path: Path) -> None:
    rows = [json.dumps({"text": "good film", "label": k % 2}) for k in range(40)]
    path = write(tmp_path / "d.jsonl", *rows)
    config = write(
        tmp_path / "c.toml",
        "[federation]",
        "clients = 2",
        'partition = "natural"',
        'partition-column = "label"',
    )
    found = findings(path, "--config", config)
    assert found["task"] == "text-classification" and found["labels"] == {"0": 20, "1": 20}
    assert [set(client["holds"]) for client in found["clients"]] == [{"0"}, {"1"}]
    assert sum(client["rows"] for client in found["clients"]) == found["rows"]["train"] == 32
    many = findings(path, "--config", config, "--set", "federation.clients=3")
    assert many["problems"] == [
        "federation.clients is 3, but column 'label' has 2 different values"
    ]
    with_base = findings(path, "--base", save_bert(tmp_path / "bert"))
    assert with_base["unit"] == "tokens" and with_base["lengths"]["train"]["max"] == 3


def test_notes_of_repeated_rows(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "train.jsonl", *GOOD, GOOD[0])
    write(tmp_path / "d" / "test.jsonl", *GOOD[:3], '{"question": "new", "answer": "two"}')
    assert findings(tmp_path / "d")["notes"] == [
        "train: 1 rows stand there more than once",
        "test: 3 rows are among the training rows, too",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.jsonl"], "is no file or folder"),
        (["{good}", "--set", "task.nam=x"], "task.name"),
        (["{good}", "--set", "task.name=digits"], "looks at texts"),
        (["{good}", "--set", "task.name=nothing"], "nothing"),
        (["{good}", "--base", "/no/such/base"], "that folder is not there"),
        ([], "Missing argument"),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: list[str], message: str) -> None:
    good = write(tmp_path / "good.jsonl", *GOOD)
    done: Done = call("data", *(word.format(good=good) for word in arguments))
    assert done.status == 2 and message in done.err


def test_gsm8k_and_sst2() -> None:
    found = findings(shared("data/gsm8k"))
    assert found["task"] == "causal-lm" and found["given"] == ["train", "test"]
    assert found["rows"]["test"] == 1319 and not found["problems"]
    found = findings(shared("data/sst2"))
    assert found["task"] == "text-classification" and sum(found["labels"].values()) == 6920
