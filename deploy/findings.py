"""What a check of `fedgraft doctor` finds, and the checks that server and client share.

Each check is a function that returns findings; what a check cannot do on this machine is a finding,
too. Nothing is changed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from client.policy import Policy
from fedgraft.config import Config
from fedgraft.devices import pick_device
from fedgraft.errors import FedGraftError
from fedgraft.logs import hushed
from fedgraft.memory_estimate import advice, estimate
from fedgraft.resident_model import resident_model, resident_task

Verdict = Literal["good", "warning", "wrong"]
LEAST_DISK = 2 << 30
"""Bytes: checkpoints, personal state and logs of a run with a 100 MB adapter fit twice."""
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        subject: what was looked at.
        verdict: good, a warning (it works, and may not for long or not safely), or wrong.
        text: what was found.
        remedy: what to do; "" where nothing needs to be done.
    """

    subject: str
    verdict: Verdict
    text: str
    remedy: str = ""


def tried(subject: str, look: Callable[[], str], remedy: str = "") -> Iterable[Finding]:
    """Look, and take an error for what is wrong; `remedy` serves one that brings none."""
    try:
        with hushed():
            text = look()
    except FedGraftError as error:
        yield Finding(subject, "wrong", error.message, error.remedy or remedy)
    else:
        yield Finding(subject, "good", text)


def without_config() -> Finding:
    """Return that base and memory were not looked at, and data not looked into."""
    return Finding(
        "base and memory",
        "warning",
        "not looked at, nor what is in the data: no run's config was named",
        "Name one: --against CONFIG.toml",
    )


def disk(state: Path) -> Finding:
    """Look at the room where a state folder lies."""
    there = state
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK):
        return Finding("disk", "wrong", f"{there} may not be written to", f"Let it: {allow(there)}")
    free = shutil.disk_usage(there).free
    text = f"{_size(free)} free where {state} lies"
    if free < LEAST_DISK:
        return Finding("disk", "wrong", text, f"Make room: {_size(LEAST_DISK)} at least.")
    return Finding("disk", "good", text)


def device(name: str) -> Finding:
    """Look at what a model would run on; `name` is `model.device`."""
    try:
        found = pick_device(name)
    except FedGraftError as error:
        return Finding("GPU", "wrong", error.message, error.remedy)
    if found.type == "cuda":
        free, total = torch.cuda.mem_get_info(found)
        text = f"{torch.cuda.get_device_name(found)}, {_size(free)} of {_size(total)} free"
        return Finding("GPU", "good", text)
    return Finding("GPU", "good", f"none is used: the model runs on {found}")


def work(config: Config, data: Callable[[], str], policy: Path | None) -> Iterable[Finding]:
    """Look at data, memory and base, the quick ones first; the base is loaded."""
    yield from tried("data", data)
    memory = list(_memory(config))
    yield from memory
    if any(finding.verdict == "wrong" for finding in memory):
        return  # and is not loaded
    listed = "Let model.base name a base of the policy's list, or add this hash to it."
    yield from tried("base", lambda: _base(config, policy), listed)


def _memory(config: Config) -> Iterable[Finding]:
    try:
        with hushed():
            found = estimate(resident_task(config), config)
    except FedGraftError as error:
        yield Finding("memory", "wrong", error.message, error.remedy)
        return
    if found is None:
        yield Finding("memory", "good", "not estimated: the task brings a small base of its own")
    elif found.fits:
        yield Finding("memory", "good", str(found))
    else:
        yield Finding("memory", "wrong", str(found), advice(found, config))


def _base(config: Config, policy: Path | None) -> str:
    found = resident_model(resident_task(config), config).base_hash
    if policy is not None:
        Policy.load(policy).check_base("here", found)
    return f"its hash is {found}"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def allow(path: Path) -> str:
    """Return what gives a path to this user."""
    return f"chown {os.getuid()} {path}"
