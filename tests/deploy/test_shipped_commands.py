"""The commands of compose files and units, run as they stand in surroundings like the real ones.

Users, mounts, read-only roots and the lack of a network are a container's or a service's own
(`box.py`); only ports and the server's name differ. One server and one client serve each kind.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from box import Box, Mount, need_boxes
from real_server import need_nginx
from shipped import DOCKER, SYSTEMD, Unit, compose, image_users, last, unit_users

from deploy.keys import Keys
from fedgraft.flower import free_port

LIBRARY = Path("/var/lib")


@dataclass
class Shipped:
    """One command with its surroundings."""

    box: Box
    words: Sequence[str]
    health: Sequence[str]


@dataclass
class Host:
    """What the machine has beside the images: folders, configs, keys."""

    folder: Path
    users: Mapping[str, int]

    def place(self, name: str, owner: str, group: str = "", mode: int = 0o700) -> Path:
        """Make a folder or give a file to whom it belongs."""
        path = self.folder / name
        if not path.exists():
            path.mkdir(parents=True)
        os.chown(path, self.users[owner], self.users[group or owner])
        path.chmod(mode)
        return path


def write(host: Host, source: Path, name: str, ports: tuple[int, int]) -> Path:
    """Copy a shipped config, its ports replaced by free ones and the server by this machine."""
    text = source.read_text().replace("9443", str(ports[0])).replace("8000", str(ports[1]))
    path = host.folder / name
    path.write_text(text.replace("fl.example.org", "localhost"))
    return path


def from_compose(host: Host, file: str, name: str, volumes: Mapping[str, Path]) -> Shipped:
    """Read one service: entry point and command, user, mounts, network."""
    service = compose(DOCKER / file)["services"][name]
    stage = "server" if "server" in service["image"] else "client"
    mounts = []
    for volume in service["volumes"]:
        source, target, *options = volume.split(":")
        mounts.append(Mount(volumes[source], target, "ro" in options))
    mounts += [
        Mount(volumes[config["source"]], config["target"], True)
        for config in service.get("configs", [])
    ]
    box = Box(
        host.users,
        service["user"],
        service.get("group_add", []),
        service.get("network_mode") != "none",
        mounts,
    )
    words = [*service.get("entrypoint", last(stage, "ENTRYPOINT")), *service["command"]]
    test = service.get("healthcheck", {"test": ["CMD"]})["test"]
    return Shipped(box, words, test[1:])


def compose_kind(host: Host, ports: tuple[int, int]) -> list[Shipped]:
    """server.yaml and client.yaml; named volumes belong to whom the Dockerfile says."""
    folder = host.folder
    Keys.create(folder / "KEYS", ["localhost"]).invite("north")
    for path in [folder / "KEYS", *(folder / "KEYS").rglob("*")]:
        os.chown(path, host.users["fedgraft"], host.users["fedgraft"])
    handed = folder / "handed"
    subprocess.run(["cp", "-r", folder / "KEYS" / "clients" / "north", handed], check=True)
    for path in [handed, *handed.iterdir()]:
        os.chown(path, host.users["fedgraft-node"], host.users["fedgraft-node"])
    volumes = {
        "keys": folder / "KEYS",
        "state": host.place("state", "fedgraft"),
        "trainer": host.place("trainer", "fedgraft-trainer"),
        "socket": host.place("socket", "fedgraft-trainer", "fedgraft-node", 0o710),
        "node": host.place("node", "fedgraft-node"),
        "./server.toml": write(host, DOCKER / "server.toml", "server.toml", ports),
        "./client.toml": write(host, DOCKER / "client.toml", "client.toml", ports),
        "./policy.toml": write(host, DOCKER / "policy.toml", "policy.toml", ports),
        "./keys": handed,
        "./keys/client.crt": handed / "client.crt",
        "./data": host.place("data", "fedgraft-trainer"),
        "./bases": host.place("bases", "fedgraft-trainer"),
    }
    return [
        from_compose(host, "server.yaml", "server", volumes),
        from_compose(host, "client.yaml", "trainer", volumes),
        from_compose(host, "client.yaml", "supernode", volumes),
    ]


def systemd_kind(host: Host, ports: tuple[int, int]) -> list[Shipped]:
    """The units; StateDirectory= is made and given away as systemd does it."""
    etc = host.folder / "etc"
    etc.mkdir()
    node, trainer = host.users["fedgraft-node"], host.users["fedgraft-trainer"]
    server_state = host.place("fedgraft-server", "fedgraft")
    keys = Keys.create(server_state / "keys", ["localhost"])
    keys.invite("north")
    subprocess.run(["cp", "-r", keys.client_folder("north"), etc / "keys"], check=True)
    for path in [*server_state.rglob("*")]:
        os.chown(path, host.users["fedgraft"], host.users["fedgraft"])
    for path in [etc / "keys", *(etc / "keys").iterdir()]:  # as docs/deployment.md says
        os.chown(path, 0, node)
        path.chmod(0o750 if path.is_dir() else 0o640)
    for source, name in ((SYSTEMD, "server"), (SYSTEMD, "client"), (DOCKER, "policy")):
        write(host, source / f"{name}.toml", f"etc/{name}.toml", ports)
    os.chown(etc / "policy.toml", 0, trainer)
    (etc / "policy.toml").chmod(0o640)
    data = host.place("data", "fedgraft-trainer")
    found = []
    for name, config in (
        ("server", "status --to /etc/fedgraft/server.toml --parts"),
        ("trainer", "status --client /etc/fedgraft/client.toml"),
        ("supernode", "status --client /etc/fedgraft/client.toml"),
    ):
        unit = Unit(SYSTEMD / f"fedgraft-{name}.service")
        user = unit.service["User"]
        mounts = [Mount(etc, "/etc/fedgraft", True), Mount(data, "/srv/fedgraft/data", True)]
        mounts += [
            Mount(host.place(state, user), str(LIBRARY / state))
            for state in unit.service["StateDirectory"].split()
        ]
        if name == "supernode":  # the socket's folder is the trainer unit's, and read-only here
            shared = host.folder / "fedgraft" / "socket"
            mounts.append(Mount(shared, str(LIBRARY / "fedgraft" / "socket"), True))
        box = Box(
            host.users,
            user,
            unit.service.get("SupplementaryGroups", "").split(),
            unit.service.get("PrivateNetwork") != "yes",
            mounts,
        )
        program = unit.command[0]
        found.append(Shipped(box, unit.command, [program, *config.split()]))
    return found


@dataclass
class Running:
    """What runs, in the order server, trainer, SuperNode."""

    host: Host
    shipped: list[Shipped]
    processes: list[subprocess.Popen[bytes]]

    def said(self) -> str:
        return (self.host.folder / "said").read_text()

    def until(self, check: Callable[[], Any], what: str, seconds: float = 180.0) -> Any:
        end = time.monotonic() + seconds
        while not (found := check()):
            assert all(one.poll() is None for one in self.processes), self.said()
            assert time.monotonic() < end, f"{what} did not happen\n{self.said()}"
            time.sleep(0.1)
        return found

    def well(self, number: int) -> bool:
        one = self.shipped[number]
        return one.box.run(one.health).returncode == 0


@contextmanager
def running(host: Host, shipped: list[Shipped], marks: Sequence[str]) -> Iterator[Running]:
    """Start commands one after the other, each when the one before it has said that it is ready."""
    made = Running(host, shipped, [])
    try:
        for one, mark in zip(shipped, marks, strict=True):
            made.processes.append(one.box.start(one.words, host.folder / "said"))
            made.until(lambda mark=mark: mark in made.said(), mark)  # type: ignore[misc]
        yield made
        for process in reversed(made.processes):
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, made.said()
    finally:
        for process in made.processes:
            process.kill()  # its leash ends the rest
            process.wait()


KINDS = {"compose": (compose_kind, image_users), "systemd": (systemd_kind, unit_users)}
MARKS = ["the server is ready", "trainer of north is ready", "SuperNode ID"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["compose", pytest.param("systemd", marks=pytest.mark.soak)])
def test_server_and_client_run_as_shipped(kind: str, tmp_path: Path) -> None:
    """They come up, meet, are well, see what they may and no more, and end cleanly."""
    need_boxes()
    need_nginx()
    make, users = KINDS[kind]
    host = Host(tmp_path, users())
    tmp_path.chmod(0o755)
    with running(host, make(host, (free_port(), free_port())), MARKS) as made:
        processes = [psutil.Process(one.pid) for one in made.processes]
        assert [one.uids().real for one in processes] == [
            host.users[one.box.user] for one in made.shipped
        ]
        assert [made.well(number) for number in range(3)] == [True] * 3
        interfaces = Path(f"/proc/{processes[1].pid}/net/dev").read_text()
        assert re.findall(r"^ *(\w+):", interfaces, re.MULTILINE) == ["lo"]
        data = made.shipped[1].box.mounts[-1].target if kind == "systemd" else "/data"
        hidden = [data, "/etc/fedgraft/policy.toml", "/state/trainer"]
        cannot = "import os,sys; print([p for p in sys.argv[1:] if os.access(p, os.R_OK)])"
        look = made.shipped[2].box.run(["python", "-c", cannot, *hidden])
        assert look.stdout == "[]\n", (look.stdout, look.stderr)
    assert not made.well(0)


@pytest.mark.soak
def test_the_federations_keys_reach_each_client_and_no_other(tmp_path: Path) -> None:
    """The one-shot service of federation.yaml, which `up` runs again and again."""
    need_boxes()
    tmp_path.chmod(0o755)
    host = Host(tmp_path, {"root": 0, **image_users()})
    volumes = {
        name: host.place(name, "root", mode=0o755) for name in ("keys-0", "keys-1", "keys-2")
    }
    volumes["keys"] = host.place("keys", "fedgraft")
    one = from_compose(host, "federation.yaml", "keys", volumes)
    words = [word.replace("$$", "$") for word in one.words]  # as compose does
    private = []
    for _ in range(2):
        done = one.box.run(words)
        assert done.returncode == 0, done.stderr
        private.append([(volumes[f"keys-{name}"] / "node").read_bytes() for name in "012"])
    assert private[0] == private[1] and len(set(private[0])) == 3
    node = image_users()["fedgraft-node"]
    for path in (path for name in "012" for path in volumes[f"keys-{name}"].iterdir()):
        assert path.stat().st_uid == node
    assert {one.stat().st_uid for one in volumes["keys"].rglob("*")} == {image_users()["fedgraft"]}
    assert sorted(Keys(volumes["keys"]).invited()) == ["0", "1", "2"]
