from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import shared

from fedgraft.errors import DataError
from fedgraft.tasks.data_files import read_rows
from fedgraft.tasks.records import Columns

PAIR = ("text", "label")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_csv_quoting_and_line_numbers(tmp_path: Path) -> None:
    content = 'label,text\r\n1,"a, b"\r\n\r\n0,"two\r\nlines ""quoted"""\r\n1,c\r\n'
    rows = read_rows(write(tmp_path / "d.csv", content), PAIR)
    assert rows.columns == ["label", "text"]
    assert [row["text"] for row in rows.rows] == ["a, b", 'two\r\nlines "quoted"', "c"]
    assert rows.places == [2, 4, 6]  # where each record starts, the blank line counted


def test_a_cell_may_hold_a_long_document(tmp_path: Path) -> None:
    long = "word " * 40_000  # beyond the 131,072 characters that Python's csv takes by itself
    rows = read_rows(write(tmp_path / "d.csv", f"text,label\na,0\n{long},1\nb,0\n"), PAIR)
    assert [len(row["text"]) for row in rows.rows] == [1, 200_000, 1]


def test_tsv_takes_quotes_as_they_are(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "d.tsv", 'text\tlabel\n" open\t1\n'), PAIR)
    assert rows.rows == [{"text": '" open', "label": "1"}]


def test_headerless_pair(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "d.tsv", "good film\t1\nbad film\t0\n"), PAIR)
    assert rows.rows[0] == {"text": "good film", "label": "1"}
    assert rows.places == [1, 2]


def test_first_line_is_a_header_where_one_name_matches(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "d.tsv", "sentence\tlabel\ngood\t1\n"), PAIR)
    with pytest.raises(DataError, match=r"no column 'text'; it has sentence, label"):
        rows.table(Columns(text=("text",), label="label"))


def test_unknown_header_is_not_taken_for_a_row(tmp_path: Path) -> None:
    content = "review,score\n" + "good,1\nbad,0\n" * 2
    with pytest.raises(DataError, match="line 1 looks like a header") as caught:
        read_rows(write(tmp_path / "d.csv", content), PAIR)
    assert caught.value.remedy == "Set task.text-field to review and task.label-field to score."


def test_jsonl(tmp_path: Path) -> None:
    # U+2028 is a line separator to str.splitlines and plain text to JSON.
    content = '\ufeff{"text": "a\u2028b", "label": 3}\n\n{"text": 7, "label": "3", "more": []}\n'
    rows = read_rows(write(tmp_path / "d.jsonl", content))
    assert rows.columns == ["text", "label", "more"] and rows.places == [1, 3]
    table = rows.table(Columns(text=("text",), label="label"))
    assert table[:] == {"text": ["a\u2028b", "7"], "label": ["3", "3"]}


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "d.parquet")
    rows = read_rows(tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet, row 2 has nothing in column 'text'"):
        rows.table(Columns(text=("text",)))


BROKEN = [
    ("d.jsonl", '{"text": "a"}\n{"text": "b"\n', r"d\.jsonl, line 2 is not valid JSON"),
    ("d.jsonl", '{"text": "a"}\n["b"]\n', r"line 2 is not a JSON object"),
    ("d.jsonl", '{"text": "a"}\n\n{"txt": "b"}\n', r"line 3 has nothing in column 'text'"),
    ("d.jsonl", '{"text": "a"}\n{"text": "  "}\n', r"line 2 has nothing in column 'text'"),
    ("d.jsonl", '{"text": "a"}\n{"text": ["b"]}\n', r"line 2 holds a list in column 'text'"),
    ("d.jsonl", b'{"text": "a"}\n{"text": "b\xff"}\n', r"line 2 is not UTF-8"),
    ("d.csv", "text,n\na,1\n\nb\n", r"d\.csv, line 4 has 1 column where 2 are wanted"),
    ("d.csv", "text,n\na,1\nb,2,3\n", r"line 3 has 3 columns where 2 are wanted"),
    ("d.csv", 'text,n\na,1\n"b,2\nc,3\n', r"line 3 cannot be read: unexpected end of data"),
    ("d.csv", "text,n\na,1\n ,2\n", r"line 3 has nothing in column 'text'"),
    ("d.csv", "txt,n\na,1\n", r"d\.csv has no column 'text'; it has txt, n"),
    ("d.csv", "", r"d\.csv holds no rows"),
    ("d.csv", "text,n\n", r"d\.csv holds no rows"),
    ("d.parquet", "not one", r"d\.parquet is no Parquet file"),
    ("d.json", "[]", r"its suffix is '\.json'"),
]


@pytest.mark.parametrize(("name", "content", "complaint"), BROKEN)
def test_broken_rows_are_named(
    tmp_path: Path, name: str, content: str | bytes, complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        read_rows(write(tmp_path / name, content)).table(Columns(text=("text",)))
    assert caught.value.remedy


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_rows(tmp_path / "d.csv")


def test_blank_and_other_columns(tmp_path: Path) -> None:
    lines = [{"q": "", "a": 1, "who": "x"}, {"q": None, "a": 2, "who": ""}, {"a": 3, "who": 4}]
    path = write(tmp_path / "d.jsonl", "\n".join(map(json.dumps, lines)))
    rows = read_rows(path)
    with pytest.raises(DataError, match="line 3 has no column 'q'"):
        rows.table(Columns(text=("a",), blank=("q",)))
    table = rows.table(Columns(text=("a",), other=("who", "a")))
    assert table[:] == {"a": ["1", "2", "3"], "who": ["x", None, "4"]}


def test_sst2() -> None:
    folder = shared("data/sst2")
    sizes = {name: len(read_rows(folder / name, PAIR)) for name in ("train.tsv", "dev.tsv")}
    # Stanford's own sizes. The last line ends without a newline, so `wc -l` says one less.
    assert sizes == {"train.tsv": 6920, "dev.tsv": 872}


def test_half_a_character_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "half \\ud800"}\n')
    with pytest.raises(DataError, match=r"line 2 holds half a character in column 'text'"):
        read_rows(path).table(Columns(text=("text",)))


def test_what_is_nested_too_deeply_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(DataError, match=r"line 2 is nested too deeply"):
        read_rows(path)
