"""Faults of a federation on real processes: when they strike, whom, and how they end."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from soak_federation import Federation, until

from deploy.keys import Keys

CUT_SECONDS = 120.0
STOPPED_SECONDS = (3.0, 8.0)
MOMENT_SECONDS = 6.0
"""A fault strikes up to so long after a round's clients were asked."""
FAULTS = {
    "SuperLink": 2,
    "ServerApp": 2,
    "gateway": 4,
    "SuperNode": 6,
    "trainer": 6,
    "ClientApp": 6,
    "stopped": 6,
    "garbage": 6,
    "cut off": 1,
}
"""How often each strikes in 20 rounds; in fewer as often in proportion, but once at least."""


@dataclass(frozen=True)
class Fault:
    """One fault of the plan.

    Attributes:
        round: it strikes while this round is at work.
        delay: seconds after the round's clients were asked.
        kind: one of `FAULTS`.
    """

    round: int
    delay: float
    kind: str


def plan(rounds: int, seed: int) -> list[Fault]:
    """Deal all faults evenly to the rounds, in an order that the seed decides.

    The cut falls into the first half, so that the client's return falls into the run.
    """
    chosen = random.Random(seed)
    kinds = [
        kind
        for kind, often in FAULTS.items()
        for _ in range(max(1, round(often * rounds / 20)))
        if kind != "cut off"
    ]
    chosen.shuffle(kinds)
    made = [
        Fault(1 + place * rounds // len(kinds), chosen.uniform(0.0, MOMENT_SECONDS), kind)
        for place, kind in enumerate(kinds)
    ]
    made.append(Fault(max(1, rounds // 3), 0.0, "cut off"))
    return sorted(made, key=lambda fault: (fault.round, fault.delay))


class Injector:
    """Strikes with the faults of a plan, each once, while a run is at work.

    One whose moment has not come when a run is over strikes in the next one.

    Args:
        made: whom.
        progress: the run's file of events.
        seed: decides who is hit.
        say: shows a line.
    """

    def __init__(
        self, made: Federation, progress: Path, seed: int, say: Callable[[str], None]
    ) -> None:
        self._made, self._progress, self._say = made, progress, say
        self._chosen = random.Random(seed + 1)
        self.struck = Counter[str]()
        self._waiting: list[Fault] = []
        self._over = threading.Event()
        self._mending: list[threading.Timer] = []

    @contextmanager
    def striking(self, faults: Sequence[Fault]) -> Iterator[None]:
        """Strike for as long as the block lasts; at its end all that was stopped goes on."""
        self._over.clear()
        self._waiting += faults
        thread = threading.Thread(target=self._strike_all)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
            for timer in self._mending:
                timer.join()
            self._mending.clear()

    def _strike_all(self) -> None:
        while self._waiting:
            fault = self._waiting[0]
            while not sampled(self._progress, fault.round):
                if self._over.wait(0.1):
                    return
            if self._over.wait(fault.delay):
                return
            self._waiting.pop(0)
            hit = self._strike(fault.kind)
            if hit:
                self.struck[fault.kind] += 1
            self._say(f"round {fault.round}: {fault.kind}: {hit or 'nobody was there'}")

    def _strike(self, kind: str) -> str:
        """Let one fault happen; return whom it hit, "" where nobody was there."""
        if kind == "cut off":
            self._made.link.cut()
            self._later(CUT_SECONDS, self._made.link.mend)
            return f"the last client, for {CUT_SECONDS:g} s"
        if kind == "garbage":
            return garbage(self._made, self._chosen)
        target = self._target(kind)
        if target is None:
            return ""
        pid, who = target
        with suppress(ProcessLookupError):
            if kind != "stopped":
                os.kill(pid, signal.SIGKILL)
                return who
            os.kill(pid, signal.SIGSTOP)
            seconds = self._chosen.uniform(*STOPPED_SECONDS)
            self._later(seconds, lambda: _go_on(pid))
            return f"{who} for {seconds:.1f} s"
        return ""

    def _later(self, seconds: float, do: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, do)
        timer.start()
        self._mending.append(timer)

    def _target(self, kind: str) -> tuple[int, str] | None:
        """Return a process of a kind, and what it is called."""
        client = self._chosen.choice(sorted(self._made.clients))
        if kind == "stopped":
            kind = self._chosen.choice(["SuperLink", "gateway", "SuperNode", "trainer"])
        if kind in ("ServerApp", "ClientApp"):
            with suppress(TimeoutError):
                found = until(lambda: self._made.apps(kind), MOMENT_SECONDS, kind)
                return self._chosen.choice(sorted(found)), kind
            return None
        owner = client if kind in ("SuperNode", "trainer") else ""
        pid = self._made.part(owner, kind.lower())
        return None if pid is None else (pid, f"{kind} {owner}".strip())


def garbage(made: Federation, chosen: random.Random) -> str:
    """Send the gateway what no client would; return how it was answered.

    Bytes that are no TLS, plain HTTP, a stranger's handshake, and from a client's own certificate
    requests that are none.
    """
    answers = []
    plain = chosen.choice([b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", chosen.randbytes(4096)])
    folder = Keys(made.config.keys).client_folder(chosen.choice(sorted(made.clients)))
    stranger = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    client = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    client.load_cert_chain(folder / "client.crt", folder / "client.key")
    request = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 512\r\n"
    for context, sent in (
        (None, plain),
        (stranger, request + b"\r\n" + chosen.randbytes(512)),
        (client, request + b"\r\n" + chosen.randbytes(512)),
        (client, chosen.randbytes(512) + b"\r\n\r\n"),
        (client, b"GET /v1/control/list-runs HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    ):
        try:
            with socket.create_connection(("127.0.0.1", made.config.port), timeout=10.0) as raw:
                link = (
                    raw
                    if context is None
                    else context.wrap_socket(raw, server_hostname="localhost")
                )
                link.sendall(sent)
                first = link.recv(64).split(b" ")
                answers.append(first[1].decode() if len(first) > 1 else "closed")
        except OSError:  # the gateway may have been killed just now
            answers.append("closed")
    return " ".join(answers)


def sampled(progress: Path, round: int) -> bool:
    """Whether a round's clients have been asked."""
    mark = json.dumps({"event": "sampled", "round": round})[:-1]
    return progress.exists() and mark in progress.read_text()


def _go_on(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
