"""Hosts made of network namespaces: one for a server, others for clients, and links to be cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SERVER = "server"
_WIRE = Path(__file__).with_name("bad_wire.py")


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
    names: Sequence[str]
    wires: list[subprocess.Popen[str]] = field(default_factory=list)

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
        """Put a bad wire in the place of a host's link; skip where none can be made.

        Args:
            host: whose.
            milliseconds: by which every frame is late, either way.
            loss: the share of frames that is lost.
        """
        if not Path("/dev/net/tun").exists():
            pytest.skip("no wire can be made here: /dev/net/tun is missing")
        mine, server = self.prefix + host, self.prefix + SERVER
        index = self.names.index(host)
        _do(f"ip -n {mine} link del eth0")
        words = (sys.executable, _WIRE, mine, "eth0", server, f"to{index}", milliseconds, loss)
        wire = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, text=True)
        self.wires.append(wire)
        assert wire.stdout is not None
        said = wire.stdout.readline()
        if "not permitted" in said:
            pytest.skip(f"no wire can be made here: {said}")
        assert said == "made\n"
        _do(f"ip -n {server} link set to{index} master br0 up")
        _plug(mine, index)


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
            _plug(prefix + name, index)
        there = Hosts(prefix, address, names)
        try:
            yield there
        finally:
            for wire in there.wires:
                wire.kill()
                wire.communicate()
    finally:
        for name in made:
            _call("ip", "netns", "del", name)


def _plug(namespace: str, index: int) -> None:
    """Give a client's link its address."""
    _do(f"ip -n {namespace} addr add 10.77.0.{index + 10}/24 dev eth0")
    _do(f"ip -n {namespace} link set eth0 up")
