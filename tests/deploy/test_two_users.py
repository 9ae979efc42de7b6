"""What the server sends runs as another Unix user than the trainer, and gets nothing by it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deploy.client_config import ClientConfig
from deploy.client_parts import as_user
from deploy.isolation import NODE_KEYS, check_starter, check_users, copy_keys, prepare
from deploy.reach import asked_as, changed_at
from fedgraft.errors import ConfigError
from fedgraft.flower import free_port

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
TRAINER, NODE = 54321, 54322
root = pytest.mark.skipif(os.geteuid() != 0, reason="two Unix users need root")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user may pass, unlike pytest's own, with a client of two users."""
    made = Path(tempfile.mkdtemp(prefix="fg-"))
    made.chmod(0o755)
    for name, text in {
        "policy.toml": 'tasks = ["causal-lm"]\nmetrics = []\n',
        "rows.jsonl": '{"text": "secret"}\n',
        "client.toml": (
            f'server = "127.0.0.1:{free_port()}"\nname = "north"\n'
            'policy = "policy.toml"\nstate = "state"\n'
            f"trainer-user = {TRAINER}\nnode-user = {NODE}\n"
            '[data]\npath = "rows.jsonl"\n[model]\ndevice = "cpu"\n'
        ),
    }.items():
        (made / name).write_text(text)
        (made / name).chmod(0o600)
        if os.geteuid() == 0:
            os.chown(made / name, TRAINER, TRAINER)
    yield made
    shutil.rmtree(made)


def readable(user: int, paths: list[Path]) -> list[Path]:
    return asked_as((user, user), lambda: [path for path in paths if os.access(path, os.R_OK)])


@pytest.fixture
def any_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/sh")  # which every user can run


@root
@pytest.mark.usefixtures("any_python")
def test_the_folders_are_each_for_who_may_use_them(folder: Path):
    config = ClientConfig.load(folder / "client.toml")
    prepare(config)
    (config.kept / "ledger.jsonl").write_text("{}")
    prepare(config)  # what is there already is given to the trainer, too
    mine = [config.kept, config.kept / "ledger.jsonl", config.policy, folder / "rows.jsonl"]
    assert readable(TRAINER, mine) == mine
    assert readable(NODE, [*mine, config.state, config.socket.parent]) == []
    assert readable(NODE, [config.node]) == [config.node]
    assert readable(TRAINER, [config.node]) == []
    assert (config.socket.parent.stat().st_mode & 0o777) == 0o710


@root
@pytest.mark.parametrize("name", ["policy.toml", "rows.jsonl"])
def test_what_the_supernode_could_read_is_named(name: str, folder: Path):
    (folder / name).chmod(0o644)
    with pytest.raises(ConfigError, match=f"node-user {NODE} can read .*{name}"):
        prepare(ClientConfig.load(folder / "client.toml"))


@root
@pytest.mark.usefixtures("any_python")
def test_what_the_supernode_could_change_is_named(folder: Path):
    config = ClientConfig.load(folder / "client.toml")
    prepare(config)
    policy = folder / "policy.toml"
    policy.chmod(0o602)
    for act in (lambda: prepare(config), lambda: check_users(config)):
        with pytest.raises(ConfigError, match=f"node-user {NODE} can change .*policy.toml") as told:
            act()
        assert f"chown {TRAINER} {policy}; chmod go-w {policy}" in told.value.remedy
    said = _as_user(NODE, [], lambda: prepare(config, "supernode"))
    assert said.startswith(f"node-user {NODE} can change {policy}")


@root
@pytest.mark.usefixtures("any_python")
@pytest.mark.parametrize("package", ["deploy", "client", "fedgraft", "strategies"])
def test_code_that_the_supernode_could_change_is_named(
    package: str, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    (folder / package).mkdir(0o755)
    module = folder / package / "module.py"
    module.touch()
    monkeypatch.setattr(sys.modules[package], "__path__", [str(folder / package)])
    config = ClientConfig.load(folder / "client.toml")
    prepare(config)
    module.chmod(0o646)
    with pytest.raises(ConfigError, match=f"node-user {NODE} can change {module}"):
        prepare(config)


@root
@pytest.mark.parametrize("which", ["client.toml", "base", "rows.jsonl"])
def test_what_decides_about_the_training_is_not_the_supernodes(which: str, folder: Path):
    (folder / "base").mkdir()
    text = (folder / "client.toml").read_text().replace("[model]\n", '[model]\nbase = "base"\n')
    (folder / "client.toml").write_text(text)
    os.chown(folder / which, NODE, NODE)  # who owns it may let itself write, whatever its mode
    with pytest.raises(ConfigError, match=f"node-user {NODE} can (change|read) {folder / which}"):
        prepare(ClientConfig.load(folder / "client.toml"))


@root
@pytest.mark.parametrize("mode", [0o755, 0o1777])
def test_a_state_folder_of_the_supernodes_user_is_not_taken_over(mode: int, folder: Path):
    """It could have put anything into it, and moved the ledger away."""
    (folder / "state").mkdir()
    (folder / "state").chmod(mode)
    os.chown(folder / "state", NODE, NODE)
    config = ClientConfig.load(folder / "client.toml")
    with pytest.raises(ConfigError, match=f"node-user {NODE} can change {config.state},"):
        check_starter(config)
    os.chown(folder / "state", 0, 0)
    (folder / "state").chmod(0o755)
    check_starter(config)
    (folder / "state" / "trainer").symlink_to("/etc")
    with pytest.raises(ConfigError, match="state/trainer is a link"):
        check_starter(config)


@root
@pytest.mark.usefixtures("any_python")
def test_a_state_folder_becomes_roots(folder: Path):
    (folder / "state").mkdir()
    os.chown(folder / "state", 4321, 4321)  # it was a client of one user
    config = ClientConfig.load(folder / "client.toml")
    check_starter(config)
    prepare(config)
    assert config.state.stat().st_uid == 0


@root
def test_where_a_path_could_be_changed(folder: Path):
    """By its file, a folder above it, or the folder of a link that leads to it."""

    def at(path: Path) -> list[Path]:
        return asked_as((NODE, NODE), lambda: [found for found in [changed_at(path)] if found])

    file = folder / "a" / "b" / "file"
    file.parent.mkdir(parents=True)
    file.touch()
    assert at(file) == []
    (folder / "a").chmod(0o777)
    assert at(file) == at(folder / "a" / "b" / "missing") == [folder / "a"]
    (folder / "a").chmod(0o1777)  # as /tmp is
    assert at(file) == [] and at(folder / "a" / "missing") == [folder / "a" / "missing"]
    os.chown(file.parent, NODE, NODE)
    assert at(file) == [file.parent]
    (folder / "link").symlink_to(file)
    assert at(folder / "link") == [file.parent]
    (folder / "again").symlink_to("link")
    assert at(folder / "again") == [file.parent]
    (folder / "loop").symlink_to("loop")
    assert at(folder / "loop") == []
    os.chown(file.parent, 0, 0)
    (folder / "a").chmod(0o700)
    file.chmod(0o666)
    assert at(file) == []  # nobody comes near


@root
def test_what_the_trainer_cannot_read_is_named(folder: Path):
    os.chown(folder / "rows.jsonl", 0, 0)
    with pytest.raises(ConfigError, match=f"trainer-user {TRAINER} cannot read .*rows.jsonl"):
        prepare(ClientConfig.load(folder / "client.toml"))


@root
def test_the_supernode_reads_its_keys_and_cannot_change_them(folder: Path):
    (folder / "keys").mkdir(0o700)
    for name in NODE_KEYS:
        (folder / "keys" / name).write_text(name)
        (folder / "keys" / name).chmod(0o600)
    for _ in range(2):  # at every start
        copy_keys(folder / "keys", folder / "copies", NODE)
    copies = [folder / "copies" / name for name in NODE_KEYS]
    assert readable(NODE, copies) == copies and readable(TRAINER, copies) == []
    assert copies[0].read_text() == NODE_KEYS[0]
    for path in (folder / "copies", *copies):
        assert path.stat().st_uid == 0 and path.stat().st_mode & 0o022 == 0


@root
def test_nothing_that_the_supernode_left_in_its_folder_runs_as_root(folder: Path):
    (folder / "ctypes.py").write_text("raise SystemExit(3)\n")
    (folder / "deploy").mkdir()
    (folder / "deploy" / "as_user.py").write_text("raise SystemExit(4)\n")
    site = sysconfig.get_path("purelib", "posix_user", {"userbase": f"{folder}/.local"})
    Path(site).mkdir(parents=True)
    (Path(site) / "evil.pth").write_text("import sys; sys.exit(5)\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(folder)}
    system = getattr(sys, "_base_executable", sys.executable)  # which looks into a user's site
    for python in (sys.executable, system):
        done = subprocess.run(
            [python, *as_user(NODE)[1:], "id", "-u"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (0, f"{NODE}\n"), done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may start two users' processes")
def test_two_users_need_root(folder: Path):
    with pytest.raises(ConfigError, match="only root can start two users' processes"):
        check_starter(ClientConfig.load(folder / "client.toml"))


@root
def test_a_part_alone_is_started_by_its_own_user(folder: Path):
    config = ClientConfig.load(folder / "client.toml")
    for only, user in (("trainer", TRAINER), ("supernode", NODE)):
        with pytest.raises(ConfigError, match=f"started by user 0, and the config names {user}"):
            check_starter(config, only)


@root
@pytest.mark.parametrize(
    ("only", "uid", "groups", "said"),
    [
        ("trainer", TRAINER, [NODE], ""),
        ("trainer", TRAINER, [], f"trainer-user {TRAINER} is not in the group of node-user {NODE}"),
        ("supernode", NODE, [], ""),
    ],
)
def test_each_part_alone_makes_its_own_folders(
    only: str, uid: int, groups: list[int], said: str, folder: Path
):
    state = folder / "state"
    for name, owner in (("", 0), ("trainer", TRAINER), ("socket", TRAINER), ("node", NODE)):
        (state / name).mkdir(mode=0o711 if not name else 0o700)
        os.chown(state / name, owner, owner)
    config = ClientConfig.load(folder / "client.toml")
    assert _as_user(uid, groups, lambda: prepare(config, only)) == said
    if only == "trainer" and not said:
        found = config.socket.parent.stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (TRAINER, NODE, 0o710)
        assert readable(NODE, [config.kept, config.socket.parent]) == []
    assert config.house(only).log.parent.is_dir()


@root
def test_the_supernode_alone_refuses_to_start_where_it_can_read_the_data(folder: Path):
    (folder / "state").mkdir()
    (folder / "state" / "node").mkdir()
    os.chown(folder / "state" / "node", NODE, NODE)
    (folder / "rows.jsonl").chmod(0o644)
    config = ClientConfig.load(folder / "client.toml")
    said = _as_user(NODE, [], lambda: prepare(config, "supernode"))
    assert said.startswith(f"node-user {NODE} can read {folder / 'rows.jsonl'}")


def _as_user(uid: int, groups: list[int], act: Callable[[], None]) -> str:
    """Do something as a user; return the beginning of what it says of an error."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        said = ""
        try:
            os.setgroups(groups)
            os.setgid(uid)
            os.setuid(uid)
            act()
        except ConfigError as error:
            said = error.message.split(", and so")[0]
        except BaseException as error:
            said = repr(error)
        finally:
            os.write(into, said.encode())
            os._exit(0)
    os.close(into)
    with os.fdopen(out) as file:
        text = file.read()
    os.waitpid(child, 0)
    return text


def command() -> list[str]:
    """Return what makes this Python reachable for every user, or skip the test."""
    python = Path(sys.executable).resolve()
    if not python.is_relative_to("/root"):
        return []
    below = Path("/root") / python.relative_to("/root").parts[0]
    made = ["unshare", "--mount", "sh", str(HERE / "two_users.sh"), str(below)]
    if not shutil.which("unshare") or subprocess.run([*made, "true"]).returncode:
        pytest.skip("no other user can reach this Python, and nothing can be mounted here")
    return made


@root
@pytest.mark.slow
def test_a_hostile_clientapp_gets_neither_data_nor_more_than_the_policy_grants(folder: Path):
    reach = command()
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    script = (
        "import sys; from deploy.client_command import client;"
        "client(['--config', sys.argv[1]], standalone_mode=False)"
    )
    log = folder / "state" / "log" / "client.log"
    running = subprocess.Popen(
        [*reach, sys.executable, "-c", script, str(folder / "client.toml")],
        env=environment,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=(folder / "err").open("w"),
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 240
        while not log.exists() or "client north is ready" not in log.read_text():
            assert running.poll() is None and time.monotonic() < end, (folder / "err").read_text()
            time.sleep(0.05)
        parts = json.loads((folder / "state" / "parts.json").read_text())
        trainer, node = (psutil.Process(parts[name]["pid"]) for name in ("trainer", "supernode"))
        assert (trainer.uids().real, node.uids().real) == (TRAINER, NODE)
        private = [folder / n for n in ("policy.toml", "rows.jsonl", "client.toml")]
        private += [folder / "state" / n for n in ("trainer", "log", "trainer/ledger.jsonl")]
        hostile = [
            *(*reach, sys.executable, "-m", "deploy.as_user", str(NODE), str(NODE)),
            *(sys.executable, str(HERE / "hostile.py")),
            *(str(folder / "state" / "socket" / "trainer.sock"), str(trainer.pid)),
            *map(str, private),
        ]
        done = subprocess.run(
            hostile, env=environment, cwd=folder, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        got = json.loads(done.stdout)
        assert got["uid"] == NODE
        assert set(got["reads"].values()) == {"PermissionError"}, got["reads"]
        assert got["memory"] == got["environment"] == got["kill"] == "PermissionError"
        assert got["hello"] == {"name": "north", "description": "", "memory": 0}
        assert got["train"]["refusal"].startswith("policy of client north, tasks: the run's task")
        assert got["code"]["refusal"].startswith("this client answers no message of type")
        assert trainer.is_running()
    finally:
        running.send_signal(signal.SIGTERM)
        assert running.wait(90) == 0
    assert not trainer.is_running() and not node.is_running()
