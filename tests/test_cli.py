"""The front door: quick, with examples that are right, results for machines, and exit statuses."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import shlex
import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import click
import pytest
from command_line import FEDGRAFT, call, settings

from fedgraft import cli
from fedgraft.cli import GROUP

COMMANDS = sorted(entry.name for entry in entry_points(group=GROUP))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "run"
    small = settings(federation__rounds=1, federation__clients=2)
    assert call("simulate", *small, "--out", path).status == 0
    return path


# Help


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_comes_at_once_and_without_torch() -> None:
    """Of all commands together within 2 s of processor time: the clock counts what else goes on."""
    asked = [["--help"], *([name, "--help"] for name in COMMANDS)]
    code = (
        "import sys\nfrom fedgraft.cli import main\n"
        f"for arguments in {asked!r}:\n"
        "    try:\n        main(arguments)\n    except SystemExit as end:\n"
        "        slow = {'torch', 'flwr', 'transformers', 'peft', 'scipy'} & sys.modules.keys()\n"
        "        print('END', arguments, end.code, *sorted(slow))"
    )
    before = cpu_seconds()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert cpu_seconds() - before < 2.0
    ends = [line for line in done.stdout.splitlines() if line.startswith("END")]
    assert ends == [f"END {arguments} 0" for arguments in asked]
    assert done.stdout.count("Usage: fedgraft") == len(asked)


def test_help_lists_every_command_with_a_sentence() -> None:
    done = call("--help")
    assert (done.status, done.err) == (0, "")
    for name in COMMANDS:
        assert re.search(rf"^  {name}  +[A-Z]\w+ ", done.out, re.M), name
    assert call("-h").out == done.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_its_options_allow(name: str) -> None:
    done = call(name, "--help")
    assert done.status == 0
    (example,) = re.findall(r"^  Example: (fedgraft .*)$", done.out, re.M)
    _, command, *arguments = shlex.split(example)
    assert command == name
    loaded = cli.fedgraft.get_command(click.Context(cli.fedgraft), name)
    assert loaded is not None
    loaded.make_context(name, arguments)  # parses, and does not run


def test_the_version_is_the_packages() -> None:
    from importlib.metadata import version

    assert call("--version").out.split()[-1] == version("fedgraft")


# Results for machines


@pytest.mark.parametrize("command", ["strategies", "simulate", "report", "export"])
def test_json_is_all_there_is_on_standard_output(
    command: str, finished: Path, tmp_path: Path
) -> None:
    arguments: dict[str, list[Any]] = {
        "strategies": [],
        "simulate": ["--resume", finished],
        "report": [finished, "--out", tmp_path / "report.html"],
        "export": [finished, "--to", tmp_path / "adapter"],
    }
    done = call(command, *arguments[command], "--json")
    assert done.status == 0, done.err
    printed = json.loads(done.out)
    if command == "strategies":
        assert {row["name"] for row in printed} >= {"fedavg", "ffa-lora", "lora-fair"}
    elif command == "simulate":
        assert printed == json.loads((finished / "summary.json").read_text())
    else:
        (path,) = printed.values()
        assert Path(path).exists()


def test_the_table_of_strategies_fits_a_narrow_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    narrow = call("strategies").out
    assert "…" not in narrow and "a  sum only:" in narrow
    assert narrow.splitlines()[0].split() == ["strategy.name", *"abcdefghijk"]
    monkeypatch.setenv("COLUMNS", "114")
    wide = call("strategies").out
    assert "…" not in wide and "a  sum only" not in wide


def test_strategies_are_shown_as_a_table_too() -> None:
    done = call("strategies")
    assert done.status == 0 and "arXiv:2403.12313" in done.out and "ffa-lora" in done.out


# Exit statuses


@pytest.mark.parametrize(
    ("arguments", "complaint", "remedy"),
    [
        (["simulat"], "There is no command 'simulat'. Did you mean simulate?", "fedgraft --help"),
        (["x"], "There is no command 'x'.", "fedgraft --help"),
        (["simulate", "--foo"], "No such option '--foo'.", "fedgraft simulate --help"),
        (["simulate", "a", "b"], "Got unexpected extra argument (b)", "fedgraft simulate --help"),
        (["export"], "Missing argument 'DIR'.", "fedgraft export --help"),
        (["--foo"], "No such option '--foo'.", "fedgraft --help"),
    ],
)
def test_wrong_usage_is_said_in_two_lines(
    arguments: list[str], complaint: str, remedy: str
) -> None:
    done = call(*arguments)
    assert (done.status, done.out) == (2, "")
    first, second = done.err.splitlines()
    assert first.startswith(f"Error: {complaint}") and second.strip() == f"See {remedy}."


def test_no_command_at_all_is_answered_with_help() -> None:
    done = call()
    assert done.status == 2 and "Usage: fedgraft" in done.err and "Commands:" in done.err


def test_a_traceback_is_shown_on_request_only() -> None:
    for arguments in (["simulate", "none.toml"], ["simulate", "none.toml", "--debug"]):
        done = call(*arguments)
        assert done.status == 2 and "Error: there is no config file none.toml" in done.err
        assert ("Traceback" in done.err) == ("--debug" in arguments)


class Plugin(EntryPoint):
    """An installed command that holds a bug."""

    def load(self) -> click.Command:
        @click.command()
        def broken() -> None:
            raise ZeroDivisionError("first line\nsecond line")

        return broken


def test_a_bug_is_called_one_and_ends_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = Plugin("broken", "nowhere:broken", GROUP)
    monkeypatch.setattr(cli, "_commands", lambda: {"broken": plugin})
    done = call("broken")
    assert (done.status, done.out) == (1, "")
    assert done.err.splitlines() == [
        "Error: ZeroDivisionError: first line",
        "       This is a bug; --debug shows where.",
    ]
    with pytest.raises(ZeroDivisionError):
        call("broken", "--debug")


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    """`fedgraft strategies --json | head -1`, as far as we can see: the pipe's other end closes."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [FEDGRAFT, "strategies", "--json"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


# The screen


def test_a_pipe_gets_plain_lines(tmp_path: Path) -> None:
    small = settings(federation__rounds=2, federation__clients=2)
    done = call("simulate", *small, "--out", tmp_path / "run")
    assert "\x1b" not in done.out + done.err and "\r" not in done.out + done.err
    assert re.fullmatch(
        r"fedavg, seed 0: round 0/2, validation accuracy [\d.]+%\n"
        r"fedavg, seed 0: round 1/2, validation accuracy [\d.]+%, training loss [\d.]+\n"
        r"fedavg, seed 0: round 2/2, validation accuracy [\d.]+%, training loss [\d.]+\n"
        r"done fedavg, seed 0: test accuracy [\d.]+%, the adapter of round \d of 2\n",
        done.err,
    )
    assert f"Report: {tmp_path / 'run' / 'report.html'}" in done.out


@pytest.mark.slow
def test_a_terminal_gets_bars_that_are_gone_at_the_end(tmp_path: Path) -> None:
    """80 columns, the narrowest that people use: nothing is wider, and nothing is cut off."""
    small = settings(federation__rounds=4, federation__clients=3, strategy__name="lora-fair")
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [FEDGRAFT, "simulate", *small, "--out", "run"],
        cwd=tmp_path,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
    )
    os.close(terminal)
    shown = read_all(main)
    assert process.wait(60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert "Loading the model and the data" in text and "Drawing plots" in text
    bars = [line for line in lines if re.match(r"lora-fair, seed 0 [━╸╺ ]+", line)]
    assert any(re.search(r"\d/4  validation [\d.]+%  clients \d/3", line) for line in bars)
    assert any(re.search(r"\d:\d\d left", line) for line in bars)
    assert re.search(r"done lora-fair, seed 0: test accuracy [\d.]+%", text)
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")  # the cursor is back


def read_all(descriptor: int) -> str:
    """Read a terminal until its other end closes, which Linux reports as an error."""
    parts = []
    while True:
        try:
            part = os.read(descriptor, 1 << 16)
        except OSError:
            break
        if not part:
            break
        parts.append(part)
    os.close(descriptor)
    return b"".join(parts).decode()
