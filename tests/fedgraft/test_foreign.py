"""Somebody's own server.py or client/ beside FedGraft: named when it hides ours, never run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedgraft.errors import FedGraftError
from fedgraft.foreign import import_ours

TRY = "from fedgraft.foreign import import_ours; print(import_ours({!r}).__name__)"


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a library user's script in a folder, which Python then looks in first."""
    script = folder / "mine.py"
    script.write_text(code)
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True)


def test_ours_are_imported():
    assert import_ours("strategies.rule").__name__ == "strategies.rule"


@pytest.mark.parametrize("name", ["server.py", "server/__init__.py"])
def test_what_hides_ours_is_named_and_not_run(name: str, tmp_path: Path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("raise SystemExit('a script was run')")
    done = run(TRY.format("server.units"), tmp_path)
    assert done.returncode == 1 and "a script was run" not in done.stderr
    assert f"FedGraft's package 'server' is hidden by {file}" in done.stderr
    assert "Rename that file" in done.stderr


def test_a_strangers_module_that_hides_nothing_does_no_harm(tmp_path: Path):
    (tmp_path / "server.py").write_text("raise SystemExit('a script was run')")
    done = run(TRY.format("strategies.rule"), tmp_path)
    assert done.stdout.strip() == "strategies.rule", done.stderr


def test_a_module_already_imported_from_elsewhere_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "deploy.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "deploy", sys)  # so that theirs is gone again afterwards
    monkeypatch.delitem(sys.modules, "deploy")
    import deploy  # noqa: F401  # theirs

    with pytest.raises(FedGraftError, match=r"'deploy' is hidden by .*deploy\.py"):
        import_ours("deploy.keys")
