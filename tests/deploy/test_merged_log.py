"""The readable log stays readable, whatever its parts and strangers write."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.merged_log import MergedLog


def test_what_a_stranger_sent_cannot_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """nginx quotes a request that is none as it came, be it what clears a screen."""
    log = MergedLog(tmp_path / "log", screen=True)
    log.write("gateway", 'invalid method, request: "\x1b]0;title\x07\x00a\rb\x9b2J\tü\ufffd"')
    log.close()
    shown = r"\x1b]0;title\x07\x00a\x0db\x9b2J" + '\tü\ufffd"'
    for text in ((tmp_path / "log").read_text(), capsys.readouterr().err):
        assert text.endswith(f'invalid method, request: "{shown}\n')


def test_colours_and_lines_of_nothing_are_left_out(tmp_path: Path) -> None:
    log = MergedLog(tmp_path / "log")
    log.write("superlink", "\x1b[92mINFO\x1b[0m :  hello  ")
    log.write("superlink", "\x1b[0m ")
    log.close()
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.endswith("superlink  INFO :  hello")
