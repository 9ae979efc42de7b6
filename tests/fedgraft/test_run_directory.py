"""The run directory: created once, opened again, and its records kept whole."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from fedgraft.config import Config
from fedgraft.errors import ConfigError, RunError
from fedgraft.run_directory import RunDirectory, versions

CONFIG = Config().with_overrides({"seed": 3, "strategy.name": "lora-fair", "strategy.lambda": 0.5})


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", CONFIG, "lineage-1")


def test_a_run_is_created_and_opened(run: RunDirectory):
    opened = RunDirectory.open(run.path)
    assert opened.config() == CONFIG and opened.lineage() == "lineage-1"
    tree = tomllib.loads(run.config_file.read_text())
    assert tree["versions"] == versions() and tree["versions"]["torch"] != "unknown"
    assert opened.summary() is None and opened.rounds() == []
    # It may be given to `simulate` as a config as it stands.
    assert Config.load(run.config_file) == CONFIG


def test_a_run_is_created_in_an_empty_folder(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert RunDirectory.create(tmp_path / "empty", CONFIG, "x").config() == CONFIG


def test_a_directory_that_holds_a_run_is_not_written_over(run: RunDirectory):
    before = run.config_file.read_bytes()
    with pytest.raises(ConfigError, match="already holds a run") as caught:
        RunDirectory.create(run.path, Config(), "other")
    assert f"--resume {run.path}" in caught.value.remedy
    assert run.config_file.read_bytes() == before


def test_other_things_are_not_written_over(tmp_path: Path):
    (tmp_path / "comparison.toml").write_text("")
    with pytest.raises(ConfigError, match="already holds a comparison"):
        RunDirectory.check_free(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    file = tmp_path / "file"
    file.write_text("x")
    for path in (tmp_path / "other", file):
        with pytest.raises(ConfigError, match="exists and is not an empty folder"):
            RunDirectory.create(path, CONFIG, "x")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_what_is_no_run_is_not_opened(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"holds no run: it has no config\.toml"):
        RunDirectory.open(tmp_path)
    with pytest.raises(ConfigError, match="holds no run"):
        RunDirectory.open(tmp_path / "nowhere")


def test_a_config_that_somebody_wrote_is_not_a_run(tmp_path: Path):
    (tmp_path / "config.toml").write_text(CONFIG.to_toml())
    with pytest.raises(ConfigError, match=r"is a config, but not one of a run") as caught:
        RunDirectory.open(tmp_path).lineage()
    assert "fedgraft simulate" in caught.value.remedy
    (tmp_path / "config.toml").write_text("[federation\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        RunDirectory.open(tmp_path).config()
    (tmp_path / "config.toml").write_text("seed = -1\n[run]\nlineage = 'x'\n")
    with pytest.raises(ConfigError, match=f"seed in {tmp_path / 'config.toml'} is -1"):
        RunDirectory.open(tmp_path).config()


def test_rounds_are_appended_and_read_back(run: RunDirectory):
    records = [{"round": k, "loss": 0.1 * k, "note": "Grüße\n"} for k in range(3)]
    for record in records:
        run.append_round(record)
    assert run.rounds() == records
    assert len(run.rounds_file.read_text().splitlines()) == 3


def test_a_record_that_json_cannot_hold_is_refused_and_writes_nothing(run: RunDirectory):
    run.append_round({"round": 0})
    with pytest.raises(ValueError, match="JSON compliant"):
        run.append_round({"round": 1, "loss": float("inf")})
    assert run.rounds() == [{"round": 0}]


@pytest.mark.parametrize("cut", range(1, 29, 4))
def test_a_line_cut_by_a_crash_is_dropped_and_the_run_goes_on(run: RunDirectory, cut: int):
    run.append_round({"round": 0, "loss": 1.0})
    line = json.dumps({"round": 1, "note": "some"})
    run.rounds_file.write_text(run.rounds_file.read_text() + line[:cut])
    kept = [{"round": 0, "loss": 1.0}]
    assert run.rounds() == kept
    run.keep_rounds(last=0)
    run.append_round({"round": 1, "note": "again"})
    assert run.rounds() == [*kept, {"round": 1, "note": "again"}]


def test_a_damaged_line_in_the_middle_is_named(run: RunDirectory):
    run.rounds_file.write_text('{"round": 0}\n{"round":\n{"round": 2}\n')
    with pytest.raises(RunError, match=r"rounds\.jsonl, line 2, is damaged"):
        run.rounds()


def test_rounds_that_will_run_again_are_dropped(run: RunDirectory):
    for k in range(5):
        run.append_round({"round": k})
    run.keep_rounds(last=2)
    assert [record["round"] for record in run.rounds()] == [0, 1, 2]
    run.keep_rounds(last=-1)
    assert run.rounds() == [] and run.rounds_file.exists()


def test_the_summary_is_the_sign_that_a_run_has_finished(run: RunDirectory):
    run.write_summary({"final": 0.5, "rounds": 3})
    assert RunDirectory.open(run.path).summary() == {"final": 0.5, "rounds": 3}


def test_a_changed_config_keeps_the_lineage(run: RunDirectory):
    run.write_config(run.config().with_overrides({"federation.rounds": 60}), run.lineage())
    assert run.config().federation.rounds == 60 and run.lineage() == "lineage-1"


def test_a_run_says_how_it_goes_on(run: RunDirectory, tmp_path: Path):
    assert run.resume_command() == f"fedgraft simulate --resume {run.path}"
    deployed = RunDirectory.create(tmp_path / "a b", Config(), "x", deployed=True)
    deployed.write_config(Config(), "x")  # what is known stays known
    command = f"fedgraft submit --resume '{tmp_path / 'a b'}' --to server.toml --until-done"
    assert deployed.deployed and deployed.resume_command() == command
    assert deployed.config() == Config()


def test_what_clients_told_is_read_back(run: RunDirectory):
    assert run.clients() == {}
    run.write_clients({"a": {"epsilon": 1.5, "epsilon-left": None}})
    assert run.clients() == {"a": {"epsilon": 1.5, "epsilon-left": None}}


def test_a_full_disk(full_disk: Path):
    with pytest.raises(RunError, match="the disk is full"):
        RunDirectory.create(full_disk / "run", CONFIG, "x")
    (full_disk / "ballast").unlink()
    run = RunDirectory.create(full_disk / "other", CONFIG, "x")
    with pytest.raises(RunError, match=r"the disk is full: .*rounds\.jsonl"):
        run.append_round({"round": 0, "note": "x" * 2_000_000})
    assert run.config() == CONFIG


def test_a_comparison_is_not_taken_for_a_run(tmp_path: Path):
    (tmp_path / "comparison.toml").write_text("")
    with pytest.raises(ConfigError, match="holds a comparison, not a run") as caught:
        RunDirectory.open(tmp_path)
    assert f"fedgraft compare --resume {tmp_path};" in caught.value.remedy
    assert f"{tmp_path}/runs/*" in caught.value.remedy
