"""Start, watch, restart and stop the processes that a server or a client is made of.

Each part runs in a session of its own, so that Ctrl-C reaches the supervisor alone, which stops
all in order. A part that dies is cleaned up with all that it started and comes back after a pause
that grows. Nothing is left behind, not even where the supervisor is killed (`deploy.leash`).
"""

from __future__ import annotations

import os
import pwd
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from deploy.leash import MARK, end
from deploy.merged_log import MergedLog
from fedgraft.errors import RunError
from fedgraft.files import disk_errors, write_json

OWN = "fedgraft"
"""The name under which the supervisor itself writes into the log."""
_TICK, _MEANWHILE_SECONDS = 0.05, 0.2
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_GREETING_SECONDS = 10.0
_WATCHES = 10
"""How often a part is asked within the time that it may be silent."""
_IN_VAIN = 3
"""So many questions in vain it takes at least, however long they took: this process may itself have
been stopped over one of them."""
_STEADY_SECONDS = 60.0
"""A part that ran this long has recovered: its next pause is the first one again."""


@dataclass(frozen=True)
class Part:
    """One process to keep running.

    Args:
        name: the prefix of its lines in the log.
        command: program and arguments.
        ready: whether it answers; asked every 50 ms from its start until it first says yes.
        environment: all of its environment.
        folder: where it runs.
        stop_signal: what asks it to end.
        stop_seconds: how long it may take to end; then it is killed.
        ready_seconds: how long it may take to answer; then it is killed and started again.
        user: the Unix user that it runs as, with that user's main group only; None: our own.
        before: called before every start, to remove a stale socket, say.
        hides: lines in which this is found are left out of the log.
        answers: whether it still does, asked on a thread of its own once it is ready, so it may
            take some seconds; None: a part that hangs is left alone.
        silent_seconds: after so long without an answer it is killed and started again.
    """

    name: str
    command: Sequence[str]
    ready: Callable[[], bool]
    environment: Mapping[str, str]
    folder: Path
    stop_signal: signal.Signals = signal.SIGTERM
    stop_seconds: float = 10.0
    ready_seconds: float = 60.0
    user: str | None = None
    before: Callable[[], None] = lambda: None
    hides: re.Pattern[str] | None = None
    answers: Callable[[], bool] | None = None
    silent_seconds: float = 120.0


def listens(port: int, host: str = "127.0.0.1") -> Callable[[], bool]:
    """Return a readiness check: whether something accepts connections on a port."""

    def check() -> bool:
        with suppress(OSError), socket.create_connection((host, port), timeout=1.0):
            return True
        return False

    return check


def greets(port: int, host: str = "127.0.0.1") -> Callable[[], bool]:
    """Return a check whether somebody at work stands behind a TLS port.

    The system accepts connections for a process that hangs, and only that process can shake hands.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is said there

    def check() -> bool:
        with (
            suppress(OSError),
            socket.create_connection((host, port), timeout=_GREETING_SECONDS) as plain,
            context.wrap_socket(plain),
        ):
            return True
        return False

    return check


@dataclass
class _Seat:
    """A part with the process that now runs it, if any."""

    part: Part
    process: subprocess.Popen[bytes] | None = None
    reader: threading.Thread | None = None
    answered: bool = False
    started: float = 0.0  # monotonic seconds
    hangs: subprocess.Popen[bytes] | None = None  # the process that answers no more, if any
    due: float = 0.0  # when it is started next, while it has no process
    pause: float = field(default_factory=lambda: _FIRST_PAUSE)
    starts: int = 0
    last: deque[str] = field(default_factory=lambda: deque(maxlen=3))


class Supervisor:
    """Keeps parts running until it is told to stop.

    Args:
        parts: started in this order, each when the one before it is ready; stopped in reverse.
        log: where their lines go.
        state: file that says what runs, for other processes to read: {part: {"pid", "starts",
            "ready"}}; it is removed when all has stopped.
    """

    def __init__(self, parts: Sequence[Part], log: MergedLog, state: Path) -> None:
        self._seats = [_Seat(part) for part in parts]
        self._log = log
        self._state = state
        self._asked = 0  # how often somebody asked to stop
        self._id = uuid.uuid4().hex
        self._leash: subprocess.Popen[str] | None = None

    def stop(self) -> None:
        """Ask `run` to stop everything and return; asked twice, it kills instead of waiting."""
        self._asked += 1

    def run(
        self,
        when_ready: Callable[[], None] = lambda: None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Start all parts and keep them running until SIGTERM, Ctrl-C or `stop`.

        Args:
            when_ready: called once, when all are ready.
            meanwhile: called five times a second after that; it must not take long.

        Raises:
            RunError: a part ended, or did not answer in time, before it was ready for the first
                time. A later death is mended instead.
        """
        with self._signals():
            try:
                self._tie()
                for seat in self._seats:
                    self._bring_up(seat)
                if not self._asked:
                    when_ready()
                due = 0.0
                while not self._asked:
                    self._tick()
                    if time.monotonic() >= due:
                        meanwhile()
                        due = time.monotonic() + _MEANWHILE_SECONDS
                    time.sleep(_TICK)
            finally:
                self._stop_all()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals come to the main thread only
            return

        def ask(number: int, frame: FrameType | None) -> None:
            self.stop()

        before = {n: signal.signal(n, ask) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _tie(self) -> None:
        """Start the leash, or start it anew where it was killed."""
        self._leash = subprocess.Popen(
            [sys.executable, "-P", "-m", "deploy.leash", self._id],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            start_new_session=True,
            text=True,
        )
        for seat in self._seats:
            if seat.process is not None:
                self._tell("+", seat.process.pid)

    def _tell(self, sign: str, session: int) -> None:
        assert self._leash is not None and self._leash.stdin is not None
        with suppress(BrokenPipeError):  # it was killed; the next tick starts another
            self._leash.stdin.write(f"{sign} {session}\n")
            self._leash.stdin.flush()

    def _bring_up(self, seat: _Seat) -> None:
        self._start(seat)
        while not self._asked and not seat.answered:
            self._tick()
            if seat.process is None:
                said = " | ".join(seat.last)
                raise RunError(
                    f"{seat.part.name} did not start{': ' if said else ''}{said}",
                    f"See {self._log.path}.",
                )
            time.sleep(_TICK)

    def _tick(self) -> None:
        now = time.monotonic()
        if self._leash is not None and self._leash.poll() is not None:
            self._tie()
        for seat in self._seats:
            if seat.process is None:
                if seat.starts and now >= seat.due:
                    self._start_again(seat)
            elif seat.process.poll() is not None:
                self._bury(seat, _how(seat.process.returncode))
            elif not seat.answered:
                self._await(seat, now)
            elif seat.hangs is seat.process:
                self._bury(seat, f"did not answer for {seat.part.silent_seconds:g} s")

    def _await(self, seat: _Seat, now: float) -> None:
        if seat.part.ready():
            seat.answered = True
            if seat.part.answers is not None:
                threading.Thread(target=self._watch, args=(seat, seat.process), daemon=True).start()
            self._log.write(OWN, f"{seat.part.name} is ready after {now - seat.started:.1f} s")
            self._record()
        elif now - seat.started > seat.part.ready_seconds:
            self._bury(seat, f"did not answer in {seat.part.ready_seconds:g} s")

    def _watch(self, seat: _Seat, process: subprocess.Popen[bytes]) -> None:
        """Ask a process again and again whether it answers, as long as it is the part's."""
        assert seat.part.answers is not None
        pause = seat.part.silent_seconds / _WATCHES
        missed, since = 0, 0.0
        while seat.process is process:
            began = time.monotonic()
            if seat.part.answers():
                missed = 0
            else:
                missed, since = missed + 1, since if missed else began
                if missed >= _IN_VAIN and time.monotonic() - since >= seat.part.silent_seconds:
                    seat.hangs = process
                    return
            time.sleep(max(0.0, began + pause - time.monotonic()))

    def _start_again(self, seat: _Seat) -> None:
        """Start a part that ran before; where that fails (an upgrade, say) try later."""
        try:
            self._start(seat)
        except (OSError, RunError) as error:
            self._postpone(seat, f"could not be started: {str(error).splitlines()[0]}")

    def _start(self, seat: _Seat) -> None:
        part = seat.part
        part.before()
        try:
            process = subprocess.Popen(
                list(part.command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=part.folder,
                env={**part.environment, MARK: f"{self._id}.{part.name}"},
                start_new_session=True,
                user=part.user,
                group=None if part.user is None else pwd.getpwnam(part.user).pw_gid,
                extra_groups=None if part.user is None else [],
            )
        except OSError as error:
            raise RunError(
                f"{part.name} cannot be started: {part.command[0]}: {error.strerror}",
                "Check that the program is installed and may be run.",
            ) from error
        self._tell("+", process.pid)
        seat.process, seat.answered, seat.started = process, False, time.monotonic()
        seat.starts += 1
        seat.last.clear()
        seat.reader = threading.Thread(target=self._read, args=(seat, process), daemon=True)
        seat.reader.start()
        self._log.write(OWN, f"{part.name} started (process {process.pid})")
        self._record()

    def _read(self, seat: _Seat, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                text = line.decode(errors="replace").rstrip()
                if seat.part.hides is not None and seat.part.hides.search(text):
                    continue
                if text:
                    seat.last.append(text)
                self._log.write(seat.part.name, text)

    def _bury(self, seat: _Seat, reason: str) -> None:
        """Clear away a part that died, with what it started, and say when it comes back."""
        self._end(seat)
        if time.monotonic() - seat.started >= _STEADY_SECONDS:
            seat.pause = _FIRST_PAUSE
        self._postpone(seat, reason)

    def _postpone(self, seat: _Seat, reason: str) -> None:
        seat.due = time.monotonic() + seat.pause
        self._log.write(OWN, f"{seat.part.name} {reason}; starting it again in {seat.pause:g} s")
        seat.pause = min(2 * seat.pause, _LONGEST_PAUSE)
        self._record()

    def _end(self, seat: _Seat) -> None:
        """Kill whatever is left of a part."""
        assert seat.process is not None and seat.reader is not None
        session, mark = seat.process.pid, f"{self._id}.{seat.part.name}"
        left = end(lambda s, m: s == session or m == mark)
        if left:
            self._log.write(OWN, f"{seat.part.name}: processes {left} cannot be ended")
        seat.process.wait()
        seat.reader.join(1.0)
        self._tell("-", session)
        seat.process = None

    def _stop_all(self) -> None:
        for seat in reversed(self._seats):
            if (process := seat.process) is None:
                continue
            process.send_signal(seat.part.stop_signal)
            limit = time.monotonic() + seat.part.stop_seconds
            while process.poll() is None and time.monotonic() < limit and self._asked < 2:
                time.sleep(_TICK / 5)
            self._end(seat)
            self._log.write(OWN, f"{seat.part.name} stopped")
        if self._leash is not None:
            assert self._leash.stdin is not None
            with suppress(BrokenPipeError):
                self._leash.stdin.close()
            self._leash.wait()
        with disk_errors(self._state):
            self._state.unlink(missing_ok=True)

    def _record(self) -> None:
        running = {
            seat.part.name: {
                "pid": seat.process.pid if seat.process is not None else None,
                "starts": seat.starts,
                "ready": seat.answered and seat.process is not None,
            }
            for seat in self._seats
        }
        try:
            write_json(self._state, running)
        except RunError as error:  # a full disk must not end a server
            self._log.write(OWN, error.message)


def _how(code: int) -> str:
    """Say how a process ended."""
    return f"ended with exit status {code}" if code >= 0 else f"was killed by signal {-code}"
