"""Hosts made of network namespaces: one for a server, others for clients, and links to be cut."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

SERVER = "server"


def _call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True)


def _do(line: str) -> None:
    done = _call(*line.split())
    assert done.returncode == 0, f"{line}: {done.stderr}"


@dataclass(frozen=True)
class Hosts:
    """Namespaces that reach each other through a bridge in the server's."""

    prefix: str
    address: str  # of the server

    def within(self, host: str) -> list[str]:
        """Return what starts a command on a host."""
        return ["ip", "netns", "exec", self.prefix + host]

    def cut(self, host: str) -> None:
        """Take a host's link down."""
        _do(f"ip -n {self.prefix}{host} link set eth0 down")

    def mend(self, host: str) -> None:
        """Take a host's link up again."""
        _do(f"ip -n {self.prefix}{host} link set eth0 up")

    def worsen(self, host: str, milliseconds: float, loss: float) -> None:
        """Delay what a host sends and lose a share of it; skip where the kernel cannot."""
        settings = f"netem delay {milliseconds}ms loss {loss:.1%}"
        line = f"ip netns exec {self.prefix}{host} tc qdisc replace dev eth0 root {settings}"
        done = _call(*line.split())
        if done.returncode:
            pytest.skip(f"no latency and loss can be set here: {done.stderr.strip()}")


@contextmanager
def hosts(names: Sequence[str]) -> Iterator[Hosts]:
    """Make a server's host and one for each name; skip where namespaces are not allowed."""
    prefix, address = f"fg{os.getpid()}-", "10.77.0.1"
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")
    done = _call("ip", "netns", "add", prefix + SERVER)
    if done.returncode:
        pytest.skip(f"network namespaces are not allowed here: {done.stderr.strip()}")
    made = [prefix + SERVER]
    try:
        _do(f"ip -n {prefix}{SERVER} link set lo up")
        _do(f"ip -n {prefix}{SERVER} link add br0 type bridge")
        _do(f"ip -n {prefix}{SERVER} addr add {address}/24 dev br0")
        _do(f"ip -n {prefix}{SERVER} link set br0 up")
        for index, name in enumerate(names):
            _do(f"ip netns add {prefix}{name}")
            made.append(prefix + name)
            pair = f"type veth peer name eth0 netns {prefix}{name}"
            _do(f"ip -n {prefix}{SERVER} link add to{index} {pair}")
            _do(f"ip -n {prefix}{SERVER} link set to{index} master br0 up")
            _do(f"ip -n {prefix}{name} link set lo up")
            _do(f"ip -n {prefix}{name} addr add 10.77.0.{index + 10}/24 dev eth0")
            _do(f"ip -n {prefix}{name} link set eth0 up")
        yield Hosts(prefix, address)
    finally:
        for name in made:
            _call("ip", "netns", "del", name)
