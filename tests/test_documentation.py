"""The documentation is held to the code: keys, defaults, links, and the README's commands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedgraft.config import Config, known_keys
from fedgraft.settings import flatten
from strategies.registry import rule_names

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
ROW = re.compile(r"^\| `(?P<key>[a-z.-]+)` \| (?P<default>[^|]*?) \|[^|]*\|$", re.MULTILINE)


def documented() -> dict[str, str]:
    text = (ROOT / "docs" / "configuration.md").read_text()
    return {match["key"]: match["default"].strip("` ") for match in ROW.finditer(text)}


def test_every_key_is_documented_and_every_documented_key_exists() -> None:
    keys = set(known_keys()) - {"compare"}
    assert keys - documented().keys() == set()
    assert {key for key in documented() if "." in key} - keys == set()


def test_documented_defaults_are_the_defaults() -> None:
    actual = flatten(Config().to_dict())
    for key, default in documented().items():
        if key not in known_keys():
            continue
        shown = actual.get(key)
        wanted = "-" if shown is None else str(shown).lower() if shown in (True, False) else shown
        assert default == str(wanted), key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_holds_a_runs_log(page: Path) -> None:
    assert not re.search(r"^\S.*seed \d+: (round|test) ", page.read_text(), re.MULTILINE)


def test_every_rule_has_a_place_in_the_strategies_page() -> None:
    text = (ROOT / "docs" / "strategies.md").read_text()
    for name in rule_names():
        assert f"| `{name}` |" in text


def readme_commands() -> list[str]:
    """The `fedgraft` commands of the README's shell blocks, continuation lines joined.

    Recipes on Hub models are run by tests/test_examples.py, on local models of the same kind.
    """
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line.split("#")[0].strip() for line in lines if line.startswith("fedgraft ")]
    recipes = [line for line in commands if " examples/" in line]
    for line in recipes:
        assert (ROOT / line.split()[2]).is_file()
    return [line for line in commands if line not in recipes]


@pytest.mark.slow
def test_readme_commands_work_as_printed(tmp_path: Path) -> None:
    """One after the other in an empty folder, as a reader would."""
    commands = readme_commands()
    assert len(commands) >= 4
    command = str(Path(sys.executable).with_name("fedgraft"))
    for line in commands:
        words = [command, *shlex.split(line)[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
