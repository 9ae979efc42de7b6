"""Runs that write: samples round by round, killed and resumed, and answers among the metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import Killed, go, new, timeless
from tiny_models import save_llama

from fedgraft.config import Config
from fedgraft.errors import ConfigError
from fedgraft.run_directory import RunDirectory
from server.checkpoint import Checkpoints
from server.report import write_report
from server.report_samples import LONGEST, MOST_PROMPTS, samples_shown
from server.results import read_results


@pytest.fixture(scope="module")
def writing(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A federation on a tiny language model that scores answers."""
    folder = tmp_path_factory.mktemp("writing")
    rows = [
        {"question": "how many is one plus two ?", "answer": " ".join(["three"] * (1 + k % 3))}
        for k in range(40)
    ]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tiny.with_overrides(
        {
            "task.name": "causal-lm",
            "task.data": str(folder / "sums.jsonl"),
            "model.base": str(save_llama(folder / "llama")),
            "train.lr": 0.05,
            "evaluate.every": 2,
            "evaluate.answers": "rouge-l",
            "evaluate.max-new-tokens": 4,
        }
    )


@pytest.fixture(scope="module")
def straight(writing: Config, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    directory = new(tmp_path_factory.mktemp("straight") / "run", writing, evaluate__clients=True)
    go(directory)
    return directory


def test_samples_are_kept_of_every_evaluated_round(straight: RunDirectory) -> None:
    samples = straight.samples()
    assert [s["round"] for s in samples] == [0] * 3 + [2] * 3 + [3] * 3  # the last one counts, too
    assert {s["prompt"] for s in samples} == {"Question: how many is one plus two ?\nAnswer: "}
    assert {s["reference"] for s in samples} <= {"three", "three three", "three three three"}
    assert len({s["text"] for s in samples}) > 1  # training changes what is written


def test_scores_of_answers_are_recorded(straight: RunDirectory) -> None:
    validations = [record["validation"] for record in straight.rounds()]
    assert [v is not None for v in validations] == [True, False, True, True]
    assert all(0 <= v["rouge_l"] <= 1 and v["answers"] == 4 for v in validations if v)
    summary = straight.summary()
    assert summary is not None
    assert summary["metric"] == "loss"
    for when in ("initial", "final"):
        assert summary["test"][when]["loss"] == summary[when]
        assert 0 <= summary["test"][when]["rouge_l"] <= 1
    # clients report the loss, which is watched; answers would cost them much
    clients = straight.rounds()[-1]["clients"].values()
    assert all("rouge_l" not in client["validation"] for client in clients)


def test_a_run_may_be_watched_by_its_answers(writing: Config, tmp_path: Path) -> None:
    settings = {"evaluate__metric": "rouge-l", "evaluate__clients": True, "evaluate__every": 1}
    directory = new(tmp_path / "run", writing, **settings)
    summary = go(directory)
    by_round = [record["validation"]["rouge_l"] for record in directory.rounds()]
    assert (summary["metric"], summary["direction"]) == ("rouge_l", "max")
    assert summary["best_round"] == by_round.index(max(by_round))
    clients = directory.rounds()[summary["best_round"]]["clients"].values()
    worst = min(client["validation"]["rouge_l"] for client in clients)
    assert summary["client_metric"]["worst"] == worst


@pytest.mark.parametrize("save", [1, 3, 4])
def test_a_killed_run_writes_the_same_samples(
    writing: Config,
    straight: RunDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save: int,
) -> None:
    directory = new(tmp_path / "run", writing, evaluate__clients=True)
    original, count = Checkpoints.save, 0

    def fatal(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == save:
            raise Killed
        original(*args)

    monkeypatch.setattr(Checkpoints, "save", fatal)
    with pytest.raises(Killed):
        go(directory)
    monkeypatch.setattr(Checkpoints, "save", original)
    # what a crash cut in the middle is dropped with the round
    with directory.samples_file.open("a") as file:
        file.write('{"round": 9, "prom')
    go(directory)
    assert directory.samples() == straight.samples()
    assert timeless(directory) == timeless(straight)


def test_own_prompts_as_they_stand(writing: Config, tmp_path: Path) -> None:
    prompts = ["a bad film", "do say"]
    directory = new(tmp_path / "run", writing, evaluate__prompts=prompts, evaluate__answers=None)
    summary = go(directory, federation__rounds=1)
    samples = directory.samples()
    assert [(s["round"], s["prompt"]) for s in samples] == [(r, p) for r in (0, 1) for p in prompts]
    assert all(s["reference"] is None for s in samples)
    assert "rouge_l" not in summary["test"]["final"]


def test_nothing_is_written_unless_it_is_asked_for(tiny: Config, tmp_path: Path) -> None:
    directory = new(tmp_path / "run", tiny)
    go(directory, federation__rounds=1)
    assert not directory.samples_file.exists()


def test_a_task_without_text_refuses_before_it_trains(tiny: Config, tmp_path: Path) -> None:
    directory = new(tmp_path / "run", tiny, evaluate__prompts=["Hello"])
    with pytest.raises(ConfigError, match="task digits writes no text"):
        go(directory)
    assert directory.rounds() == []


def test_a_prompt_without_a_token_is_refused(tiny: Config, writing: Config, tmp_path: Path) -> None:
    """A tokenizer that begins its texts with a token can begin with nothing else."""
    settings: dict[str, Any] = {"evaluate__answers": None, "evaluate__prompts": ["a film", ""]}
    go(new(tmp_path / "begins", writing, **settings), federation__rounds=1)
    bare = save_llama(tmp_path / "llama", begin=False)
    directory = new(tmp_path / "bare", writing, model__base=str(bare), **settings)
    with pytest.raises(ConfigError, match=r"evaluate\.prompts holds '', which has no token"):
        go(directory)
    go(new(tmp_path / "none", tiny, evaluate__prompts=[]), federation__rounds=1)


def test_the_servers_part_of_a_personal_adapter_writes_nothing(
    writing: Config, tmp_path: Path
) -> None:
    directory = new(
        tmp_path / "run", writing, strategy__name="fedsa-lora", evaluate__prompts=["a film"]
    )
    go(directory, federation__rounds=1)
    assert directory.samples() == []


# The report


def test_the_report_shows_them_side_by_side(straight: RunDirectory, tmp_path: Path) -> None:
    shown = samples_shown(read_results([straight.path]))
    assert shown is not None and (shown.prompts, len(shown.rows), shown.seed) == (1, 1, 0)
    row, summary = shown.rows[0], straight.summary()
    assert summary is not None
    best = summary["best_round"]
    assert best in (2, 3)
    whens = [written.when for written in row.written]
    last = [] if best == 3 else ["round 3, the last"]
    assert whens == ["before training", f"round {best}, the chosen one", *last]
    text = write_report([straight.path], tmp_path / "report.html").read_text()
    assert "What it writes" in text and "Other metrics" in text
    assert "ROUGE-L" in text and "worst client" in text


def test_hostile_texts_are_escaped_cut_and_made_printable(
    straight: RunDirectory, tmp_path: Path
) -> None:
    evil = "</p><script>alert(1)</script>\n\x00\x1b[31m\u202e" + "long " * LONGEST
    copy = tmp_path / "run"
    copy.mkdir()
    for path in (straight.config_file, straight.rounds_file, straight.summary_file):
        (copy / path.name).write_bytes(path.read_bytes())
    records = [
        {"round": r, "prompt": f"{k} {evil}", "reference": evil if k % 2 else None, "text": evil}
        for r in (0, 2, 3)
        for k in range(MOST_PROMPTS + 3)
    ]
    RunDirectory(copy).append_samples(records)
    text = write_report([copy], tmp_path / "report.html").read_text()
    assert "<script" not in text and "\x00" not in text and "\x1b" not in text
    assert text.count("&lt;script&gt;alert(1)") >= 2 * MOST_PROMPTS
    assert "long " * (LONGEST // 5) not in text
    assert f"{MOST_PROMPTS} of\n{MOST_PROMPTS + 3} prompts" in text
