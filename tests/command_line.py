"""The command as a user calls it, small federations, and what runs leave behind."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fedgraft.cli import main

FEDGRAFT = str(Path(sys.executable).with_name("fedgraft"))
SMALL = {
    "federation.clients": 3,
    "federation.rounds": 6,
    "train.steps": 2,
    "train.batch-size": 8,
    "model.device": "cpu",
    "threads": 1,
}
"""A federation on the built-in digits, of a few seconds."""
TIMES = ("seconds", "wall_seconds", "train_seconds", "aggregate_seconds", "peak_memory_bytes")
"""All that two equal runs may differ in, by the names of summary.json and rounds.jsonl."""


def settings(**changes: Any) -> list[str]:
    """Return `--set` options: those of SMALL, and changes written with __ for . and _ for -."""
    keys = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return [word for k, v in {**SMALL, **keys}.items() for word in ("--set", f"{k}={v}")]


@dataclass(frozen=True)
class Done:
    """What a command left: its exit status and what it printed."""

    status: int
    out: str
    err: str


def call(*arguments: object) -> Done:
    """Call the command line in this process, where libraries and base are loaded already."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main([str(argument) for argument in arguments])
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return Done(ended.code, out.getvalue(), err.getvalue())
    raise AssertionError("main always exits")


def start(*arguments: object, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    """Start the installed command as a user does, in a process group of its own."""
    return subprocess.Popen(
        [FEDGRAFT, *map(str, arguments)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def run(*arguments: object, cwd: Path, **options: Any) -> Done:
    """Run the installed command as a user does."""
    with start(*arguments, cwd=cwd, **options) as process:
        out, err = process.communicate(timeout=300)
    return Done(process.returncode, out, err)


def without_times(value: Any) -> Any:
    """Drop what the clock and the memory measured, at any depth."""
    if isinstance(value, dict):
        return {key: without_times(v) for key, v in value.items() if key not in TIMES}
    if isinstance(value, list):
        return [without_times(item) for item in value]
    return value


def records(directory: Path) -> list[Any]:
    """Return rounds.jsonl without times."""
    lines = (directory / "rounds.jsonl").read_text().splitlines()
    return [without_times(json.loads(line)) for line in lines]


def outcome(directory: Path) -> dict[str, Any]:
    """Return all that a run is a function of its config in: bytes of files, records and summary."""
    files = [*sorted((directory / "adapter").iterdir()), *sorted(directory.glob("personal/*/*"))]
    found: dict[str, Any] = {str(f.relative_to(directory)): f.read_bytes() for f in files}
    found["rounds.jsonl"] = records(directory)
    found["summary.json"] = without_times(json.loads((directory / "summary.json").read_text()))
    for path in sorted((directory / "checkpoints").iterdir()):
        found[path.name] = checkpoint(path)
    return found


def checkpoint(path: Path) -> tuple[dict[str, bytes], Any]:
    """Return a checkpoint's tensors as bytes, and its notes without times."""
    with safe_open(path, framework="np") as file:
        tensors = {name: file.get_tensor(name).tobytes() for name in sorted(file.keys())}
        return tensors, without_times(json.loads(file.metadata()["fedgraft"]))


def events(directory: Path) -> list[dict[str, Any]]:
    """Return the whole lines of progress.jsonl."""
    path = directory / "progress.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
