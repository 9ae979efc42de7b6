"""The screen is ours: what libraries have to say goes to a file, and comes back afterwards."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedgraft.errors import RunError
from fedgraft.logs import hushed, quiet, quiet_environment


def chatter() -> None:
    logging.getLogger("flwr").info("flower talks")
    logging.getLogger("transformers.modeling_utils").warning("transformers talks")
    logging.getLogger("fedgraft.x").info("we talk")
    warnings.warn("a warning", UserWarning, stacklevel=1)


@pytest.fixture
def loud() -> Iterator[logging.Handler]:
    """Flower's logger as Flower leaves it: with a handler of its own, to the screen."""
    handler = logging.StreamHandler()
    logger = logging.getLogger("flwr")
    before = logger.handlers[:], logger.propagate, logger.level
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    yield handler
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


def test_everything_goes_to_the_file_and_nothing_to_the_screen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], loud: logging.Handler
):
    with quiet(tmp_path / "run.log"):
        chatter()
    assert capfd.readouterr() == ("", "")
    text = (tmp_path / "run.log").read_text()
    for said in ("flower talks", "transformers talks", "we talk", "a warning"):
        assert said in text
    assert "INFO flwr: flower talks" in text


def test_loggers_are_as_they_were_afterwards_also_after_an_error(
    tmp_path: Path, loud: logging.Handler
):
    root, flwr = logging.getLogger(), logging.getLogger("flwr")
    before = (root.handlers[:], root.level, flwr.handlers[:], flwr.propagate, warnings.showwarning)
    with pytest.raises(KeyError), quiet(tmp_path / "run.log"):
        assert loud not in flwr.handlers and root.handlers != before[0]
        raise KeyError
    after = (root.handlers[:], root.level, flwr.handlers[:], flwr.propagate, warnings.showwarning)
    assert after == before and loud in flwr.handlers


def test_a_second_session_adds_to_the_file(tmp_path: Path):
    for number in range(2):
        with quiet(tmp_path / "run.log"):
            logging.getLogger("x").info("session %d", number)
    text = (tmp_path / "run.log").read_text()
    assert "session 0" in text and "session 1" in text


def test_a_log_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path):
    with (
        pytest.raises(RunError, match=r"none/run\.log could not be written"),
        quiet(tmp_path / "none" / "run.log"),
    ):
        pytest.fail("the block must not run")


def test_a_full_disk_does_not_end_what_is_logged(
    full_disk: Path, capfd: pytest.CaptureFixture[str]
):
    with quiet(full_disk / "run.log"):
        logging.getLogger("x").info("y" * 100_000)
    # The run itself finds the disk full where it matters; here nothing is raised and the screen
    # stays ours.
    assert capfd.readouterr().err == ""


def test_hushed_libraries_say_nothing(capfd: pytest.CaptureFixture[str], loud: logging.Handler):
    with hushed():
        chatter()
    assert capfd.readouterr() == ("", "")
    logging.getLogger("flwr").info("flower talks again")
    assert "flower talks again" in capfd.readouterr().err


def test_the_environment_is_set_but_not_over_what_the_user_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in quiet_environment():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    with quiet(tmp_path / "run.log"):
        assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
        assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
