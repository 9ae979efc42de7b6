"""Dockerfile, compose files and systemd units, held to what they must and must not say."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field
from shipped import (
    COMPOSE,
    DOCKER,
    ROOT,
    SYSTEMD,
    UNITS,
    Unit,
    compose,
    image_users,
    instructions,
    last,
    services,
    stages,
    unit_users,
)

from client.policy import Policy
from deploy.client_config import ClientConfig
from deploy.server_config import ServerConfig
from fedgraft import __version__

Duration = Annotated[str, Field(pattern=r"^\d+s$")]
Words = Annotated[list[str], Field(min_length=1)]


class Strict(BaseModel):
    """A part of a compose file: keys of the specification that we use, and no other."""

    model_config = ConfigDict(extra="forbid")


class Build(Strict):
    context: str
    dockerfile: str
    target: str
    args: dict[str, str]


class Healthcheck(Strict):
    test: Words
    interval: Duration
    timeout: Duration
    start_period: Duration
    start_interval: Duration


class Depends(Strict):
    condition: Literal["service_healthy", "service_completed_successfully"]


class Source(Strict):
    source: str
    target: str


class Device(Strict):
    driver: str
    count: int | Literal["all"]
    capabilities: Words


class Service(Strict):
    image: str
    build: Build | None = None
    command: Words
    entrypoint: Words | None = None
    user: str
    group_add: list[str] = []
    init: bool = False
    read_only: Literal[True]
    cap_drop: list[str]
    cap_add: list[str] = []
    security_opt: list[str]
    tmpfs: list[str]
    network_mode: Literal["none"] | None = None
    ports: list[str] = []
    volumes: list[str]
    configs: list[Source] = []
    healthcheck: Healthcheck | None = None
    depends_on: dict[str, Depends] = {}
    restart: Literal["unless-stopped"] | None = None
    stop_grace_period: Duration | None = None
    pids_limit: int | None = None
    mem_limit: str | None = None


class Whole(BaseModel):
    """A compose file; what begins with x- is its own."""

    name: str
    services: dict[str, Service]
    volumes: dict[str, dict[str, Any]]
    configs: dict[str, dict[str, str]] = {}


WHOLE = [path for path in COMPOSE if path.name != "cuda.yaml"]


# Dockerfile


def test_every_base_has_a_tag_that_is_not_latest() -> None:
    (base,) = [rest.split("=", 1)[1] for word, rest in instructions() if rest.startswith("BASE=")]
    assert re.fullmatch(r"python:3\.\d+-slim-[a-z]+", base)
    for rest in (rest for word, rest in instructions() if word == "FROM"):
        assert rest.split()[0] in ("${BASE}", *stages())


def test_what_is_copied_is_there_and_not_ignored() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in lines if line.startswith("!")]
    assert "*" in lines
    copied = [
        path
        for word, rest in instructions()
        if word == "COPY" and not rest.startswith("--from")
        for path in rest.split()[:-1]
    ]
    assert set(copied) == set(kept)
    for path in copied:
        assert (ROOT / path).exists(), path


def test_pip_installs_what_the_constraints_name() -> None:
    lines = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    assert len(lines) == 2
    for line in lines:
        assert "-c constraints.txt" in line and "--no-cache-dir" in line
    assert '${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"}' in lines[0]


@pytest.mark.parametrize("stage", ["server", "client"])
def test_an_image_runs_as_nobody_special_in_exec_form(stage: str) -> None:
    words = [word for word, _ in stages()[stage]]
    assert last(stage, "USER") in image_users()
    assert max(words.index(w) for w in ("USER",)) < words.index("CMD")
    assert "RUN" not in words[words.index("USER") :]
    assert last(stage, "ENTRYPOINT") == ["fedgraft"]
    assert isinstance(last(stage, "CMD"), list)
    assert last(stage, "HEALTHCHECK").split(" CMD ")[1].startswith('["fedgraft", "status"')


def test_packages_are_installed_without_leftovers() -> None:
    for _, rest in (pair for pair in instructions() if "apt-get install" in pair[1]):
        assert "--no-install-recommends" in rest and "rm -rf /var/lib/apt/lists/*" in rest


# Compose


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.name)
def test_compose_files_have_the_specifications_shape(path: Path) -> None:
    found = Whole.model_validate(compose(path))
    for name, service in found.services.items():
        assert re.fullmatch(rf"fedgraft-(server|client):{re.escape(__version__)}", service.image)
        assert service.cap_drop == ["ALL"], name
        assert service.security_opt == ["no-new-privileges:true"], name
        assert service.user in (*image_users(), *(["root"] if name == "keys" else [])), name
        assert set(service.group_add) <= set(image_users())
        assert (service.healthcheck is None) == (name == "keys")
        for one in service.volumes:
            source = one.split(":")[0]
            if source.startswith("."):
                known = ("./keys", "./data", "./bases")
                assert source.startswith(known) or (path.parent / source).is_file(), one
                assert one.endswith(":ro"), one
            else:
                assert source in found.volumes, one
        for config in service.configs:
            assert config.source in found.configs
        for other, wanted in service.depends_on.items():
            checked = found.services[other].healthcheck is not None
            assert checked == (wanted.condition == "service_healthy")
        if service.build is not None:
            context = (path.parent / service.build.context).resolve()
            assert context == ROOT and (context / service.build.dockerfile).is_file()
            assert service.build.target in stages()
            assert set(service.build.args) == {"TORCH_INDEX"}


def test_the_image_and_compose_ask_the_same_for_health() -> None:
    asked = {
        stage: json.loads(last(stage, "HEALTHCHECK").split(" CMD ")[1])
        for stage in ("server", "client")
    }
    for path, name, service in services():
        if "healthcheck" in service:
            kind = "server" if "server" in service["image"] else "client"
            assert service["healthcheck"]["test"] == ["CMD", *asked[kind]], (path, name)


def test_the_trainer_has_no_network_and_the_supernode_none_of_the_data() -> None:
    for path, name, service in services():
        if path.name == "cuda.yaml" or not name.startswith(("trainer", "supernode")):
            continue
        seen = {one.split(":")[1] for one in service["volumes"]}
        if name.startswith("trainer"):
            assert service["network_mode"] == "none"
        else:
            assert "network_mode" not in service
            seen -= {"/etc/fedgraft/client.toml"}
            assert seen == {"/state/node", "/state/socket", "/keys"}, (path, name)
            assert not service.get("group_add")


def test_the_cuda_file_adds_to_services_that_there_are() -> None:
    found = compose(DOCKER / "cuda.yaml")["services"]
    assert set(found) == set(compose(DOCKER / "client.yaml")["services"])
    (device,) = found["trainer"]["deploy"]["resources"]["reservations"]["devices"]
    assert Device.model_validate(device).capabilities == ["gpu"]


@pytest.mark.parametrize("folder", [DOCKER, SYSTEMD], ids=lambda folder: folder.name)
def test_shipped_configs_can_be_read(folder: Path, tmp_path: Path) -> None:
    assert ServerConfig.load(folder / "server.toml").listen == "0.0.0.0:9443"
    config = ClientConfig.load(folder / "client.toml")
    assert config.two_users and config.policy == Path("/etc/fedgraft/policy.toml")
    assert Policy.load(DOCKER / "policy.toml").tasks
    for name, config_file in compose(DOCKER / "federation.yaml")["configs"].items():
        (tmp_path / name).write_text(config_file["content"])
        assert ClientConfig.load(tmp_path / name).data.partitions == 3


# systemd

HARDENED = {
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "SystemCallFilter": "@system-service",
    "Restart": "always",
    "RestartPreventExitStatus": "2",
    "KillMode": "mixed",
}


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units_are_hardened_and_restart(path: Path) -> None:
    unit = Unit(path)
    assert HARDENED.items() <= unit.service.items()
    assert unit.service["User"] in unit_users() and unit.service["User"] != "root"


def test_the_units_of_a_client_keep_data_and_network_apart() -> None:
    trainer, node = (Unit(SYSTEMD / f"fedgraft-{x}.service") for x in ("trainer", "supernode"))
    assert trainer.service["PrivateNetwork"] == "yes" and "PrivateNetwork" not in node.service
    assert trainer.service["SupplementaryGroups"] == node.service["Group"]
    assert "SupplementaryGroups" not in node.service
    assert "-/var/lib/fedgraft/trainer" in node.service["InaccessiblePaths"].split()
    state = ClientConfig.load(SYSTEMD / "client.toml").state
    made = {Path("/var/lib", x) for x in trainer.service["StateDirectory"].split()}
    assert made == {state / "trainer", state / "socket"}
    assert Path("/var/lib", node.service["StateDirectory"]) == state / "node"
    wanted = Unit(SYSTEMD / "fedgraft-client.target").sections["Unit"]["Wants"].split()
    assert wanted == ["fedgraft-trainer.service", "fedgraft-supernode.service"]


def test_systemd_finds_nothing_to_complain_of(tmp_path: Path) -> None:
    """`systemd-analyze verify` on the units, with a program that is there in FedGraft's place."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    for path in [*UNITS, *SYSTEMD.glob("*.target")]:
        text = path.read_text().replace("/opt/fedgraft/bin/fedgraft", "/bin/true")
        (tmp_path / path.name).write_text(text)
    units = sorted(str(path) for path in tmp_path.iterdir())
    done = subprocess.run([program, "verify", *units], capture_output=True, text=True)
    ours = [x for x in done.stderr.splitlines() if fnmatch.fnmatch(x, "*fedgraft-*")]
    assert (done.returncode, ours) == (0, []), done.stderr


def test_systemd_counts_the_units_as_little_exposed(tmp_path: Path) -> None:
    """Its overall exposure is 0 to 10; below 4 it calls a service "OK"."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    for path in UNITS:
        shutil.copy(path, tmp_path)
        words = ["security", "--offline=true", "--threshold=40", str(tmp_path / path.name)]
        done = subprocess.run([program, *words], capture_output=True, text=True)
        if "unrecognized option" in done.stderr:
            pytest.skip("this systemd-analyze judges no files")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
