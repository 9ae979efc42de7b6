"""The supervisor on real processes: order, log, restarts, and that it leaves nothing behind."""

from __future__ import annotations

import json
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import alive, until

from deploy import supervisor as supervisor_module
from deploy.certificates import issue_server, make_authority
from deploy.leash import MARK, end, family
from deploy.merged_log import MergedLog
from deploy.supervisor import Part, Supervisor, greets, listens
from fedgraft.errors import RunError

WAIT = "import time; time.sleep(600)"
ROOT = Path(__file__).parents[2]


def part(folder: Path, name: str, code: str, **options: Any) -> Part:
    """A Python program that is ready once it has made the file NAME.ready (`ready()` in code)."""
    mark = folder / f"{name}.ready"
    options.setdefault("ready", mark.exists)
    options.setdefault("before", lambda: mark.unlink(missing_ok=True))
    given = f"from pathlib import Path\nready = Path({str(mark)!r}).touch\n"
    command = [sys.executable, "-u", "-S", "-c", given + code]
    return Part(name, command, environment=dict(os.environ), folder=folder, **options)


def log(folder: Path) -> str:
    return (folder / "log").read_text()


def running(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "parts.json").read_text())
    except FileNotFoundError:
        return {}


@contextmanager
def kept(folder: Path, *parts: Part) -> Iterator[Supervisor]:
    """A supervisor in a thread of this process, once all its parts are ready."""
    ready = threading.Event()
    one = Supervisor(parts, MergedLog(folder / "log"), folder / "parts.json")
    thread = threading.Thread(target=one.run, args=(ready.set,))
    thread.start()
    try:
        assert ready.wait(20)
        yield one
    finally:
        one.stop()
        thread.join(20)
        assert not thread.is_alive()


def test_parts_start_in_order_and_stop_in_reverse(tmp_path: Path):
    code = "print('\\x1b[92mhello\\x1b[0m'); print('[notice] x'); ready(); " + WAIT
    first = part(tmp_path, "first", code, hides=re.compile(r"\[notice\]"))
    with kept(tmp_path, first, part(tmp_path, "second", code)):
        state = running(tmp_path)
        assert [(s["starts"], s["ready"]) for s in state.values()] == [(1, True)] * 2
    lines = [line.split(maxsplit=2)[2] for line in log(tmp_path).splitlines()]
    steps = [line.split(" ", 1)[1].strip() for line in lines if line.startswith("fedgraft")]
    assert [" ".join(step.split()[:2]) for step in steps] == [
        "first started",
        "first is",
        "second started",
        "second is",
        "second stopped",
        "first stopped",
    ]
    assert "first      hello" in lines and "second     hello" in lines
    assert "first      [notice] x" not in lines and "second     [notice] x" in lines
    assert not (tmp_path / "parts.json").exists()
    assert not any(alive(one["pid"]) for one in state.values())


def test_a_part_that_dies_comes_back_and_what_it_started_is_gone(tmp_path: Path):
    child = (
        f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', {WAIT!r}],"
        "start_new_session=True); print('child', c.pid); ready(); "
    )
    with kept(tmp_path, part(tmp_path, "one", child + WAIT)):
        first = running(tmp_path)["one"]["pid"]
        orphan = int(log(tmp_path).split("child ")[1].split()[0])
        assert os.getsid(orphan) != os.getsid(first)
        os.kill(first, signal.SIGKILL)
        again = until(lambda: (now := running(tmp_path)["one"])["starts"] == 2 and now)
        until(lambda: running(tmp_path)["one"]["ready"])
        assert again["pid"] != first and not alive(orphan)
    assert "one was killed by signal 9; starting it again in 0.5 s" in log(tmp_path)
    assert not alive(int(log(tmp_path).split("child ")[2].split()[0]))


def test_a_part_that_hangs_is_started_again(tmp_path: Path):
    beat = tmp_path / "beat"
    code = f"import time; b = Path({str(beat)!r}); ready()\nwhile True: b.touch(); time.sleep(0.02)"

    def beats() -> bool:
        return beat.exists() and time.time() - beat.stat().st_mtime < 0.5

    with kept(tmp_path, part(tmp_path, "one", code, answers=beats, silent_seconds=1.5)):
        first = running(tmp_path)["one"]["pid"]
        until(beats)
        os.kill(first, signal.SIGSTOP)
        until(lambda: (now := running(tmp_path)["one"])["starts"] == 2 and now["ready"])
        assert not alive(first)
        until(beats)
    assert "one did not answer for 1.5 s; starting it again in 0.5 s" in log(tmp_path)


@pytest.mark.parametrize(
    ("answers", "hangs"), [("...xxx", True), ("...X.xx.x.", False), ("X.", False), ("xX", False)]
)
def test_one_question_in_vain_is_no_hang_however_long_it_took(
    answers: str, hangs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A supervisor that was itself stopped for an hour ("X") finds parts that nobody asked."""
    given, now = iter(answers), [0.0]
    process: Any = object()

    def answer() -> bool:
        said = next(given, "")
        now[0] += {"X": 3600.0, "x": 4.0}.get(said, 0.0)
        if not said:
            seat.process = None  # it has ended meanwhile
        return said in (".", "")

    monkeypatch.setattr(supervisor_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(supervisor_module.time, "sleep", lambda seconds: None)
    one = part(tmp_path, "one", WAIT, answers=answer, silent_seconds=10.0)
    seat = supervisor_module._Seat(one, process)
    Supervisor([one], MergedLog(tmp_path / "log", screen=False), tmp_path / "parts")._watch(
        seat, process
    )
    assert (seat.process is process) == (seat.hangs is process) == hangs


def test_only_a_process_at_work_shakes_hands(tmp_path: Path):
    issue_server(make_authority("CA"), ["localhost"]).write(tmp_path / "crt", tmp_path / "key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "crt", tmp_path / "key")
    with socket.create_server(("127.0.0.1", 0)) as plain:
        port = plain.getsockname()[1]
        check = greets(port)
        thread = threading.Thread(
            target=lambda: context.wrap_socket(plain.accept()[0], server_side=True).close()
        )
        thread.start()
        assert check()
        thread.join(20)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(supervisor_module, "_GREETING_SECONDS", 0.2)
            assert listens(port)() and not check()  # it is accepted, and nobody is there
    assert not check()


def test_pauses_grow_and_begin_anew_after_a_steady_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(supervisor_module, "_FIRST_PAUSE", 0.02)
    monkeypatch.setattr(supervisor_module, "_LONGEST_PAUSE", 0.08)
    count = tmp_path / "count"
    # dies at once, except that it stays to be seen ready the first time, and steady the sixth
    code = (
        f"import time; c = Path({str(count)!r}); n = len(c.read_text()) if c.exists() else 0;"
        "c.write_text('x' * (n + 1)); ready(); time.sleep({0: 2.0, 5: 3.5}.get(n, 0.0))"
    )
    monkeypatch.setattr(supervisor_module, "_STEADY_SECONDS", 3.0)
    with kept(tmp_path, part(tmp_path, "one", code)):
        until(lambda: log(tmp_path).count("starting it again") == 7)
    pauses = [
        float(line.split(" again in ")[1].split()[0])
        for line in log(tmp_path).splitlines()
        if " again in " in line
    ]
    assert pauses[:7] == [0.02, 0.04, 0.08, 0.08, 0.08, 0.02, 0.04]


def test_a_part_that_never_gets_ready_is_an_error_with_its_last_words(tmp_path: Path):
    one = part(tmp_path, "one", "import sys; print('no key file'); sys.exit(3)")
    two = Supervisor(
        [part(tmp_path, "zero", "ready(); " + WAIT), one],
        MergedLog(tmp_path / "log"),
        tmp_path / "parts.json",
    )
    with pytest.raises(RunError, match="one did not start: no key file") as caught:
        two.run()
    assert str(tmp_path / "log") in caught.value.remedy
    assert "zero stopped" in log(tmp_path)
    slow = part(tmp_path, "slow", WAIT, ready_seconds=0.2)
    with pytest.raises(RunError, match="slow did not start"):
        Supervisor([slow], MergedLog(tmp_path / "log"), tmp_path / "parts.json").run()
    assert "slow did not answer in 0.2 s" in log(tmp_path)
    missing = Part("gone", ["/no/such/program"], lambda: True, {}, tmp_path)
    with pytest.raises(RunError, match="gone cannot be started: /no/such/program: No such file"):
        Supervisor([missing], MergedLog(tmp_path / "log"), tmp_path / "parts.json").run()


def test_one_that_ignores_the_request_is_killed(tmp_path: Path):
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); " + WAIT
    begin = time.monotonic()
    with kept(tmp_path, part(tmp_path, "deaf", code, stop_seconds=0.3)):
        first = running(tmp_path)["deaf"]["pid"]
    assert not alive(first)
    with kept(tmp_path, part(tmp_path, "deaf", code, stop_seconds=60)) as one:
        one.stop()
        one.stop()  # asked twice
    assert time.monotonic() - begin < 20


SCRIPT = f"""
import sys
from pathlib import Path
sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]!r}
from test_supervisor import WAIT, part
from deploy.merged_log import MergedLog
from deploy.supervisor import Supervisor
folder = Path(sys.argv[1])
child = (
    "import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', " + repr(WAIT) + "],"
    "start_new_session=True); (Path('.') / 'child').write_text(str(c.pid)); ready(); "
)
parts = [part(folder, "one", child + WAIT), part(folder, "two", "ready(); " + WAIT)]
Supervisor(parts, MergedLog(folder / "log", screen=True), folder / "parts.json").run()
"""


@contextmanager
def supervising(folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A supervisor as a process, and the ids of all that it runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)],
        cwd=ROOT,
        text=True,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        until(lambda: [s["ready"] for s in running(folder).values()] == [True, True], 60)
        parts = [one["pid"] for one in running(folder).values()]
        others = psutil.Process(process.pid).children(recursive=True)
        yield process, sorted({*parts, *(p.pid for p in others)})
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_the_supervisor_nothing_is_left(tmp_path: Path, number: signal.Signals):
    with supervising(tmp_path) as (process, ids):
        assert len(ids) == 4 and int((tmp_path / "child").read_text()) in ids
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
        assert process.returncode == (-9 if number == signal.SIGKILL else 0)
        until(lambda: not any(alive(pid) for pid in ids))
    assert "one        " not in err and "fedgraft   one started" in err
    assert ("one stopped" in err) == (number != signal.SIGKILL)


def test_the_leash_is_renewed(tmp_path: Path):
    with supervising(tmp_path) as (process, ids):
        leash = next(pid for pid in ids if "deploy.leash" in psutil.Process(pid).cmdline())
        os.kill(leash, signal.SIGKILL)
        mine = psutil.Process(process.pid)

        def another() -> bool:
            others = [c for c in mine.children() if alive(c.pid) and c.pid != leash]
            return any("deploy.leash" in c.cmdline() for c in others)

        until(another)
        process.kill()
        process.communicate(timeout=20)
        until(lambda: not any(alive(pid) for pid in ids))


def test_a_part_may_run_as_another_user(tmp_path: Path):
    if os.getuid() != 0:
        pytest.skip("only root may start a process as another user")
    command = ["/bin/sh", "-c", "echo who $(id -u) $(id -G); sleep 600"]
    one = Part("one", command, lambda: "who" in log(tmp_path), dict(os.environ), Path("/"))
    with kept(tmp_path, replace(one, user="nobody")):
        pass
    who = pwd.getpwnam("nobody")
    assert f"who {who.pw_uid} {who.pw_gid}\n" in log(tmp_path)


def test_a_family_is_found_by_its_mark_and_by_its_session(tmp_path: Path):
    marked = subprocess.Popen(
        [sys.executable, "-c", WAIT], env=os.environ | {MARK: "x.one"}, start_new_session=True
    )
    try:
        until(lambda: [p.pid for p in family(lambda s, m: m == "x.one")] == [marked.pid])
        assert [p.pid for p in family(lambda s, m: s == marked.pid)] == [marked.pid]
        assert family(lambda s, m: m == "x.two") == []
        assert end(lambda s, m: m == "x.one") == []
        assert marked.wait(10) == -9
    finally:
        marked.kill()


def test_a_full_disk_stops_no_line(full_disk: Path, capsys: pytest.CaptureFixture[str]):
    lines = MergedLog(full_disk / "log", screen=True)
    lines.write("one", "x" * 9000)
    assert "x" * 9000 in capsys.readouterr().err
    lines.close()
