"""What the shipped Dockerfile, compose files and systemd units say, read as their programs do."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCKER, SYSTEMD = ROOT / "deploy" / "docker", ROOT / "deploy" / "systemd"
COMPOSE = sorted(DOCKER.glob("*.yaml"))
UNITS = sorted(SYSTEMD.glob("*.service"))


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in order, continuation lines joined, comments left out."""
    text = "\n".join(
        line
        for line in (DOCKER / "Dockerfile").read_text().splitlines()
        if not line.lstrip().startswith("#")
    )
    joined = re.sub(r"\\\n", " ", text)
    return [(a, b.strip()) for a, _, b in (x.partition(" ") for x in joined.splitlines() if x)]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, by the stage's name."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in instructions():
        if word == "FROM":
            name = rest.split(" AS ")[1]
            found[name] = []
        elif name:
            found[name].append((word, rest))
    return found


def last(stage: str, word: str) -> Any:
    """The argument of a stage's last instruction of a kind; a list where it is in exec form."""
    rest = [b for a, b in stages()[stage] if a == word][-1]
    return json.loads(rest) if rest.startswith("[") else rest


def image_users() -> dict[str, int]:
    """Users of the images, by the useradd lines."""
    lines = " ".join(b for x in stages().values() for a, b in x if a == "RUN")
    return {
        name: int(number)
        for number, name in re.findall(r"useradd --uid (\d+) [^&]*?([\w-]+)(?= &&|$| \s*&&)", lines)
    }


def compose(path: Path) -> dict[str, Any]:
    """A compose file, anchors and merges resolved."""
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def services() -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """Every service of every compose file."""
    for path in COMPOSE:
        for name, service in compose(path)["services"].items():
            yield path, name, service


class Unit:
    """A systemd unit's sections; no key of ours comes twice in one."""

    def __init__(self, path: Path) -> None:
        parser = configparser.RawConfigParser(strict=True)
        parser.optionxform = str  # type: ignore[assignment, method-assign]
        parser.read(path)
        self.sections = {name: dict(parser[name]) for name in parser.sections()}
        self.service = self.sections.get("Service", {})
        self.command = shlex.split(self.service.get("ExecStart", ""))


def unit_users() -> dict[str, int]:
    """Users of the units, by the sysusers files; numbers as a system might give them."""
    lines = [x.split() for f in sorted(SYSTEMD.glob("*.conf")) for x in f.read_text().splitlines()]
    return {x[1]: 20000 + k for k, x in enumerate(x for x in lines if x and x[0] == "u")}
