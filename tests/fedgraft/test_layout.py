"""What is shipped: every module in the wheel, every dependency in the constraints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("fedgraft", "strategies", "client", "server", "simulations", "deploy")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy of the tree and without the network."""
    source = tmp_path_factory.mktemp("source")
    skip = shutil.ignore_patterns("__pycache__")
    for floor in FLOORS:
        shutil.copytree(ROOT / floor, source / floor, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "tests").mkdir()
    (source / "tests" / "test_x.py").write_text("")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "out"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (source / "out").glob("fedgraft-*.whl")
    return file


@pytest.fixture(scope="module")
def wheel(built: Path) -> set[str]:
    """The names of the files in the wheel."""
    return set(zipfile.ZipFile(built).namelist())


def test_every_module_of_the_six_folders_is_in_the_wheel(wheel: set[str]):
    ours = {str(p.relative_to(ROOT)) for floor in FLOORS for p in (ROOT / floor).rglob("*.py")}
    assert len(ours) > 60
    assert ours <= wheel


def test_every_data_file_is_in_the_wheel(wheel: set[str]):
    data = {
        str(path.relative_to(ROOT))
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert {"fedgraft/py.typed", "fedgraft/tasks/digits_base/model.safetensors"} <= data
    assert any(name.startswith("server/templates/") for name in data)
    assert data <= wheel


def test_commands_run_from_the_wheel_and_not_from_a_checkout(built: Path, tmp_path: Path):
    """As images have it: the wheel's files before anything else, and its entry points."""
    zipfile.ZipFile(built).extractall(tmp_path / "site")
    script = (
        "from fedgraft.cli import main; import sys, deploy.server_command as found;"
        "print(found.__file__); main(sys.argv[1:])"
    )
    for words in (["server", "--help"], ["client", "--help"], ["status", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        first, rest = done.stdout.split("\n", 1)
        assert first == str(tmp_path / "site" / "deploy" / "server_command.py")
        assert f"Usage: fedgraft {words[0]}" in rest


def test_nothing_else_is_in_the_wheel(wheel: set[str]):
    tops = {name.split("/")[0] for name in wheel}
    assert tops == {*FLOORS, f"fedgraft-{PROJECT['version']}.dist-info"}


def test_constraints_name_a_fitting_version_of_every_dependency():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(pinned) == len(pins), "a package is named twice"
    extras = PROJECT["optional-dependencies"].values()
    wanted = [*PROJECT["dependencies"], *(name for extra in extras for name in extra)]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if name == "fedgraft":
            continue
        assert name in pinned, f"constraints.txt does not name {name}"
        assert requirement.specifier.contains(pinned[name]), (name, pinned[name])


def test_every_entry_point_leads_somewhere():
    groups = PROJECT["entry-points"]
    assert set(groups) == {"fedgraft.commands", "fedgraft.rules", "fedgraft.tasks"}
    for group, entries in groups.items():
        installed = {entry.name: entry for entry in entry_points(group=group)}
        assert set(entries) <= set(installed)
        for name, target in entries.items():
            assert installed[name].value == target
            assert installed[name].load() is not None


def test_versions_agree():
    import fedgraft

    assert fedgraft.__version__ == PROJECT["version"]
