"""The wire that the test of a bad network stands on: late, lossy, and TCP gets through it."""

from __future__ import annotations

import subprocess
import sys

from network_namespaces import SERVER, hosts

_BYTES = 200_000
_ECHO = """
import socket, sys
with socket.create_server((sys.argv[1], 7)) as server:
    print("listens", flush=True)
    with server.accept()[0] as peer:
        while piece := peer.recv(65536):
            peer.sendall(piece)
"""
_ASK = """
import socket, sys, threading, time
sent = bytes(range(256)) * (int(sys.argv[2]) // 256)
with socket.create_connection((sys.argv[1], 7), 60) as peer:
    began = time.monotonic()
    peer.sendall(b"x")
    assert peer.recv(1) == b"x"
    print(time.monotonic() - began)
    threading.Thread(target=peer.sendall, args=(sent,)).start()
    got = b""
    while len(got) < len(sent):
        got += peer.recv(65536)
    assert got == sent
"""


def test_frames_come_late_and_tcp_makes_good_what_is_lost() -> None:
    with hosts(["one"]) as there:
        there.worsen("one", 40.0, 0.02)
        words = (*there.within(SERVER), sys.executable, "-c", _ECHO, there.address)
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as echo:
            assert echo.stdout is not None and echo.stdout.readline() == "listens\n"
            asked = subprocess.run(
                [*there.within("one"), sys.executable, "-c", _ASK, there.address, str(_BYTES)],
                capture_output=True,
                text=True,
                timeout=60,
            )
            echo.kill()
    assert asked.returncode == 0, asked.stderr
    assert float(asked.stdout) >= 0.08  # there and back
