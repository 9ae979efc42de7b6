"""A submitted run: waiting, following, failing, stopping and starting again.

A thread plays the ServerApp on the real run directory; the SuperLink is a fake of a few lines.
"""

from __future__ import annotations

import json
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from deploy import submission
from deploy.runs_folder import RunsFolder
from deploy.server_config import ServerConfig
from deploy.submission import Submission, prepare
from fedgraft.config import Config
from fedgraft.errors import DIVERGED, ConfigError, RunError
from fedgraft.nodes import Node
from fedgraft.run_directory import RunDirectory
from fedgraft.runs import AwayError, FlowerRun
from server import session
from server.progress import FAILED, FINISHED, ROUND, START, ProgressWriter

Play = Callable[["ServerApp"], None]


@dataclass
class ServerApp:
    """What a ServerApp leaves in a run directory."""

    directory: RunDirectory
    stopped: threading.Event
    progress: ProgressWriter

    def round(self, number: int) -> None:
        self.directory.append_round({"round": number})
        self.progress.write(ROUND, round=number)

    def finish(self) -> None:
        self.progress.write(FINISHED, final=0.5)

    def fail(self, message: str, status: int = 1) -> None:
        self.progress.write(FAILED, message=message, remedy="Mend it.", status=status)


@dataclass
class FakeRuns:
    """A SuperLink that starts `plays`, one a run."""

    plays: list[Play]
    apps: list[dict[str, Any]] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)
    away: bool = False
    missed: threading.Event = field(default_factory=threading.Event)
    """Set when it was asked while it was away."""
    threads: list[threading.Thread] = field(default_factory=list)
    ended: dict[int, str] = field(default_factory=dict)
    events: dict[int, threading.Event] = field(default_factory=dict)

    def start(self, app: Path) -> int:
        tree = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
        self.apps.append(tree)
        run_id = len(self.apps)
        directory = RunDirectory.open(Path(tree["config"]["fedgraft.out"]))
        self.events[run_id] = threading.Event()
        ready = threading.Event()
        arguments = (directory, self.plays[run_id - 1], self.events[run_id], ready)
        self.threads.append(threading.Thread(target=self._work, args=arguments))
        self.threads[-1].start()
        ready.wait()
        return run_id

    def _work(
        self, directory: RunDirectory, play: Play, stopped: threading.Event, ready: threading.Event
    ) -> None:
        with directory.held():
            progress = ProgressWriter(directory.progress)
            ready.set()
            time.sleep(0.15)
            progress.write(START, round=0, rounds=3, metric="accuracy")
            play(ServerApp(directory, stopped, progress))
            progress.close()

    def get(self, run_id: int) -> FlowerRun:
        if self.away:
            self.missed.set()
            raise AwayError("no server answers")
        outcome = self.ended.get(run_id, "")
        return FlowerRun(run_id, "finished" if outcome else "running", outcome, "why", 0, 0)

    def stop(self, run_id: int) -> None:
        self.stopped.append(run_id)
        self.ended[run_id] = "stopped"
        self.events[run_id].set()

    def close(self) -> None:
        pass


@dataclass
class Scene:
    server: ServerConfig
    runs: FakeRuns
    online: list[set[str]]
    said: list[str] = field(default_factory=list)
    hear: Callable[[str], None] = lambda line: None
    """Called with each line that is said, so that a test goes on when it has been said."""

    def submission(self, out: Path | None, **keys: Any) -> Submission:
        settings = {"federation.min-clients": 2, "federation.deadline": 60} | keys
        directory = prepare(Config().with_overrides(settings), out)
        return self.submission_of(directory)

    def submission_of(self, directory: RunDirectory) -> Submission:
        return Submission(self.server, directory.config(), directory, self._say)

    def _say(self, line: str) -> None:
        self.said.append(line)
        self.hear(line)

    def superlink_returns(self, line: str) -> None:
        self.runs.away = False


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Scene]]:
    made: list[Scene] = []

    def scene(*plays: Play, online: tuple[set[str], ...] = ({"a", "b"},)) -> Scene:
        server = ServerConfig(keys=tmp_path / "KEYS", state=tmp_path / "state")
        found = Scene(server, FakeRuns(list(plays)), list(online))
        made.append(found)

        class Keys:
            def __init__(self, folder: Path) -> None: ...

            def invited(self) -> dict[str, None]:
                return dict.fromkeys(("a", "b", "c"))

        class Nodes:
            def all(self) -> list[Node]:
                there = found.online.pop(0) if len(found.online) > 1 else found.online[0]
                return [Node(k, name, b"", "online", 1.0) for k, name in enumerate(sorted(there))]

        @contextmanager
        def nodes_of(port: int, certificates: Path) -> Iterator[Nodes]:
            if found.runs.away:
                raise RunError("the SuperLink does not answer")
            yield Nodes()

        monkeypatch.setattr(submission, "Keys", Keys)
        monkeypatch.setattr(submission, "nodes_of", nodes_of)
        monkeypatch.setattr(submission, "Runs", lambda *arguments: found.runs)
        return found

    monkeypatch.setattr(submission, "_ASK_SECONDS", 0.02)
    monkeypatch.setattr(submission, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(submission, "_LONGEST_PAUSE", 0.01)
    yield scene
    for one in made:
        for event in one.runs.events.values():
            event.set()
        for thread in one.runs.threads:
            thread.join(10)
            assert not thread.is_alive()


def finishes(app: ServerApp) -> None:
    done = len(app.directory.rounds())
    for number in range(done, 4):
        app.round(number)
    app.finish()


def dies_after(rounds: int) -> Play:
    def play(app: ServerApp) -> None:
        for number in range(len(app.directory.rounds()), rounds + 1):
            app.round(number)

    return play


def test_the_bundle_names_the_relay_and_this_run(scene: Any, tmp_path: Path) -> None:
    here = scene(finishes)
    one = here.submission(tmp_path / "run")
    one.run()
    (app,) = here.runs.apps
    assert app["components"] == {
        "serverapp": "server.app:app",
        "clientapp": "client.relay:app",
    }
    assert app["config"].keys() == {"fedgraft.config", "fedgraft.out"}
    assert Config.from_run_config(app["config"]) == one.config
    assert RunsFolder(here.server).run_of(tmp_path / "run") == 1


def test_it_says_whom_it_waits_for_and_then_starts(scene: Any, tmp_path: Path) -> None:
    here = scene(finishes, online=(set(), {"b"}, {"b"}, {"b", "c"}))
    here.submission(tmp_path / "run").run()
    assert here.said == [
        "Waiting for 2 more of 2 clients; not there: a, b, c",
        "Waiting for 1 more of 2 clients; not there: a, c",
    ]


def test_it_does_not_wait_for_ever(scene: Any, tmp_path: Path) -> None:
    here = scene(online=({"a"},))
    with pytest.raises(RunError, match=r"not there: b, c, within 0\.3 s"):
        here.submission(tmp_path / "run", **{"federation.deadline": 0.3}).run()
    assert here.runs.apps == []


def test_a_server_that_is_not_there_is_given_a_moment(
    scene: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = scene(finishes)
    here.runs.away, here.hear = True, here.superlink_returns
    here.submission(tmp_path / "run").run()
    assert here.said == ["Waiting: the SuperLink does not answer"]
    monkeypatch.setattr(submission, "_SERVER_SECONDS", 0.1)
    here.runs.away, here.hear = True, lambda line: None
    with pytest.raises(RunError, match="does not answer"):
        here.submission(tmp_path / "other").run()


def test_more_clients_than_are_invited_are_not_waited_for(scene: Any, tmp_path: Path) -> None:
    here = scene()
    keys = {"federation.min-clients": 4, "federation.clients": 4}
    with pytest.raises(ConfigError, match="min-clients is 4, and 3 clients are invited: a, b, c"):
        here.submission(tmp_path / "run", **keys).run()


def test_what_the_server_app_says_is_raised(scene: Any, tmp_path: Path) -> None:
    here = scene(lambda app: app.fail("round 1: 0 usable updates"))
    with pytest.raises(RunError, match="0 usable updates") as caught:
        here.submission(tmp_path / "run").run()
    assert caught.value.remedy == "Mend it." and here.runs.stopped == [1]


def test_a_run_that_could_not_begin_leaves_its_name_free(scene: Any, tmp_path: Path) -> None:
    here = scene(lambda app: app.fail("no such base", status=2))
    with pytest.raises(ConfigError, match="no such base"):
        here.submission(tmp_path / "run").run(until_done=True)
    assert len(here.runs.apps) == 1
    RunDirectory.check_free(tmp_path / "run")


def test_a_refused_run_leaves_no_folder_behind(
    scene: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its own nor the one that runs without a name share, unless others are in it."""
    monkeypatch.chdir(tmp_path)
    keys = {"federation.min-clients": 4, "federation.clients": 4}
    for others in (False, True):
        if others:
            (tmp_path / "runs" / "mine").mkdir(parents=True)
        with pytest.raises(ConfigError, match="min-clients is 4"):
            scene().submission(None, **keys).run()
        left = ["mine"] if others else []
        assert [p.name for p in tmp_path.glob("runs/*")] == left
        assert (tmp_path / "runs").exists() == others


def test_a_run_goes_on_where_its_clients_are(tmp_path: Path) -> None:
    """A deployed run is not continued in a simulation, nor the other way."""
    deployed = prepare(Config(), tmp_path / "deployed")
    simulated = RunDirectory.create(tmp_path / "simulated", Config(), "x")
    assert session.resume(deployed.path, {}, deployed=True)[0] == Config()
    with pytest.raises(ConfigError, match="are machines of their own") as caught:
        session.resume(deployed.path, {})
    assert f"fedgraft submit --resume {deployed.path}" in caught.value.remedy
    with pytest.raises(ConfigError, match="are simulated") as caught:
        session.resume(simulated.path, {}, deployed=True)
    assert f"fedgraft simulate --resume {simulated.path}" in caught.value.remedy


def test_without_until_done_a_death_ends_it(scene: Any, tmp_path: Path) -> None:
    here = scene(dies_after(1))
    with pytest.raises(RunError, match="the ServerApp died"):
        here.submission(tmp_path / "run").run()
    assert here.runs.stopped == [1]


def test_until_done_goes_on_after_deaths_and_failures(scene: Any, tmp_path: Path) -> None:
    def too_few(app: ServerApp) -> None:
        app.fail("round 3: 1 usable updates")

    here = scene(dies_after(1), dies_after(2), too_few, finishes)
    one = here.submission(tmp_path / "run")
    one.run(until_done=True)
    assert [record["round"] for record in one.directory.rounds()] == [0, 1, 2, 3]
    assert here.said == [
        "the ServerApp died; trying again after round 1",
        "the ServerApp died; trying again after round 2",
        "round 3: 1 usable updates; trying again after round 2",
    ]
    assert here.runs.stopped == [1, 2, 3]


def test_until_done_does_not_repeat_a_divergence(scene: Any, tmp_path: Path) -> None:
    here = scene(lambda app: app.fail(f"client 0: {DIVERGED} in round 1"))
    with pytest.raises(RunError, match=DIVERGED):
        here.submission(tmp_path / "run").run(until_done=True)


def test_until_done_gives_up_where_no_round_is_done(
    scene: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "_ATTEMPTS", 3)
    here = scene(dies_after(1), *[lambda app: None] * 3)
    with pytest.raises(RunError, match="the ServerApp died"):
        here.submission(tmp_path / "run").run(until_done=True)
    assert len(here.runs.apps) == 4  # one with a round, and three without


def test_a_superlink_that_is_away_is_waited_for(scene: Any, tmp_path: Path) -> None:
    def loses_its_superlink(app: ServerApp) -> None:
        app.round(0)
        here.runs.away = True
        assert here.runs.missed.wait(10)

    here = scene(loses_its_superlink, finishes)
    here.hear = here.superlink_returns
    here.submission(tmp_path / "run").run(until_done=True)
    assert here.said[0].startswith("the ServerApp died (no server answers)")
    assert len(here.runs.apps) == 2


def test_ctrl_c_stops_the_run_and_waits_for_its_end(
    scene: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def works(app: ServerApp) -> None:
        app.round(0)
        assert app.stopped.wait(10)
        time.sleep(0.1)  # it takes a moment to notice

    here = scene(works)
    one = here.submission(tmp_path / "run")
    get = here.runs.get

    def pressed(run_id: int) -> FlowerRun:
        if one.directory.rounds() and not here.runs.stopped:
            monkeypatch.setattr(here.runs, "get", get)
            raise KeyboardInterrupt
        return get(run_id)

    monkeypatch.setattr(here.runs, "get", pressed)
    with pytest.raises(KeyboardInterrupt):
        one.run(until_done=True)
    assert here.runs.stopped == [1] and not one.directory.busy


def test_a_run_that_is_at_work_is_followed(scene: Any, tmp_path: Path) -> None:
    def slow(app: ServerApp) -> None:
        assert app.stopped.wait(10)
        finishes(app)

    here = scene(slow)
    one = here.submission(tmp_path / "run")
    first = threading.Thread(target=one.run)
    first.start()
    while not one.directory.busy or RunsFolder(here.server).run_of(one.directory.path) is None:
        time.sleep(0.01)
    here.hear = lambda line: here.runs.events[1].set()
    here.submission_of(one.directory).run()
    first.join(10)
    assert len(here.runs.apps) == 1 and here.said == ["The run is at work already; following it"]


def test_paths_are_made_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("{}\n")
    keys = {"task.name": "text-classification", "task.data": "data.jsonl", "model.base": "a/hub-id"}
    config = prepare(Config().with_overrides(keys), None).config()
    assert config.task.data == str(tmp_path / "data.jsonl") and config.model.base == "a/hub-id"
    assert (tmp_path / "runs" / "fedavg-seed0" / "config.toml").exists()


def test_notes_survive_damage_and_are_the_newest_first(tmp_path: Path) -> None:
    folder = RunsFolder(ServerConfig(keys=tmp_path, state=tmp_path))
    folder.note(5, tmp_path / "one")
    time.sleep(0.01)
    folder.note(3, tmp_path / "one")
    (tmp_path / "runs" / "9.json").write_text("{")
    assert [note.run_id for note in folder.all()] == [3, 5]
    assert folder.run_of(tmp_path / "one") == 3 and folder.run_of(tmp_path) is None
    assert json.loads((tmp_path / "runs" / "3.json").read_text())["directory"]
