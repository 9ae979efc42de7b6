"""A wire between two network namespaces that delays every frame and loses some.

The kernel's own netem is a module that many machines lack; this needs /dev/net/tun alone:

    python bad_wire.py CLIENT_NAMESPACE DEVICE SERVER_NAMESPACE DEVICE MILLISECONDS LOSS

It makes both devices, says so on a line, and carries frames until it is killed; the devices go with
it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import selectors
import struct
import sys
import time
from collections import deque
from contextlib import suppress

_TUNSETIFF, _TAP, _NO_INFO = 0x400454CA, 0x0002, 0x1000
_NEW_NETWORK = 0x40000000
_LARGEST_FRAME = 1 << 16


def tap(namespace: str, device: str) -> int:
    """Make a network device whose frames are read from, and written to, the returned file."""
    libc = ctypes.CDLL(None, use_errno=True)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if libc.setns(there, _NEW_NETWORK):
        raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    os.close(there)
    made = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(made, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _TAP | _NO_INFO))
    return made


def carry(ends: tuple[int, int], seconds: float, loss: float, chance: random.Random) -> None:
    """Carry frames both ways, each `seconds` late, and lose the share `loss` of them."""
    late: deque[tuple[float, int, bytes]] = deque()  # due, where to, frame; in order, as all wait
    selector = selectors.DefaultSelector()
    for one, other in (ends, ends[::-1]):
        selector.register(one, selectors.EVENT_READ, other)
    while True:
        wait = max(0.0, late[0][0] - time.monotonic()) if late else None
        for key, _ in selector.select(wait):
            frame = os.read(key.fd, _LARGEST_FRAME)
            if chance.random() >= loss:
                late.append((time.monotonic() + seconds, key.data, frame))
        while late and late[0][0] <= time.monotonic():
            _, to, frame = late.popleft()
            with suppress(OSError):  # the device is down, or full: lost
                os.write(to, frame)


def main() -> None:
    """Make the devices and carry frames between them."""
    client, device, server, port, milliseconds, loss = sys.argv[1:]
    try:
        ends = (tap(client, device), tap(server, port))
    except PermissionError as error:
        print(error.strerror)
        return
    print("made", flush=True)
    carry(ends, float(milliseconds) / 1000, float(loss), random.Random(0))


if __name__ == "__main__":
    main()
