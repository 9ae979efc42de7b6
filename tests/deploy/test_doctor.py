"""`fedgraft doctor`: what it finds on a machine where something is wrong, each with its remedy."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from command_line import call

from deploy import doctor_client
from deploy.client_config import ClientConfig
from deploy.client_config import write_example as write_client
from deploy.doctor_client import examine_client
from deploy.doctor_server import examine_server
from deploy.findings import Finding
from deploy.keys import Keys
from deploy.server_config import ServerConfig
from deploy.server_config import write_example as write_server
from fedgraft.config import Config
from fedgraft.flower import free_port

RUN = Config().with_overrides({"federation.clients": 3, "model.device": "cpu", "threads": 1})


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path leaves room for a socket's, which pytest's own need not do."""
    with tempfile.TemporaryDirectory(prefix="fg-") as made:
        yield Path(made)


@pytest.fixture
def folder(short_path: Path) -> Path:
    """Keys, a server and a client of partition 1 of 3, as the example configs have them."""
    keys = Keys.create(short_path / "KEYS", ["localhost"])
    keys.invite("a")
    write_server(short_path / "server.toml", short_path / "KEYS")
    server = f"127.0.0.1:{free_port()}"
    client = short_path / "client.toml"
    write_client(client, short_path / "KEYS" / "clients" / "a", server=server, partition=1)
    for path in (short_path / "server.toml", client):
        text = path.read_text().replace("9443", str(free_port())).replace("8000", str(free_port()))
        path.write_text(text.replace('device = "auto"', 'device = "cpu"'))
    return short_path


def server_of(folder: Path) -> ServerConfig:
    return ServerConfig.load(folder / "server.toml")


def client_of(folder: Path) -> ClientConfig:
    return ClientConfig.load(folder / "client.toml")


def wrong(findings: list[Finding]) -> dict[str, Finding]:
    found = {one.subject: one for one in findings if one.verdict == "wrong"}
    assert all(one.remedy for one in found.values()), found
    return found


def test_a_server_that_could_start(folder: Path) -> None:
    findings = examine_server(server_of(folder), RUN)
    assert wrong(findings).keys() <= {"nginx"}
    told = {one.subject: one.text for one in findings}
    assert told["server"] == "it does not run now" and told["clients"] == "invited: a"
    assert "validation examples" in told["data"] and told["base"].startswith("its hash is ")
    assert "fedavg can honour it" in told["config"]


def test_a_server_whose_port_is_taken_and_whose_key_is_gone(folder: Path) -> None:
    server = server_of(folder)
    (folder / "KEYS" / "server" / "server.key").unlink()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", server.port))
        taken.listen()
        found = wrong(examine_server(server, None))
    assert "server.key" in found["certificates"].text
    assert str(server.port) in found["ports"].text


def test_a_small_disk_and_a_gpu_that_is_not_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(
        "deploy.findings.shutil.disk_usage", lambda path: usage._replace(free=1 << 20)
    )
    path = folder / "client.toml"
    path.write_text(path.read_text().replace('device = "cpu"', 'device = "cuda:77"'))
    found = wrong(examine_client(client_of(folder), None))
    assert "0.0 GiB free" in found["disk"].text and "cuda:77" in found["GPU"].text


def test_a_server_that_does_not_answer(folder: Path) -> None:
    found = wrong(examine_client(client_of(folder), None))
    assert found.keys() == {"server"} and "does not answer" in found["server"].text


def test_a_certificate_that_has_expired(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_client, "days_left", lambda certificate: -1.0)
    texts = [one.text for one in examine_client(client_of(folder), None) if one.verdict == "wrong"]
    assert any(text.startswith("this client's expired on") for text in texts)


@pytest.mark.parametrize(
    ("seconds", "verdict"), [(0, "good"), (30, "good"), (-90, "wrong"), (90, "wrong")]
)
def test_the_clock_against_the_servers_date(seconds: int, verdict: str) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    date = format_datetime(now - timedelta(seconds=seconds), usegmt=True)
    (finding,) = doctor_client._clock(date, now)
    assert finding.verdict == verdict
    assert (
        finding.text == f"{abs(seconds)} s {'ahead of' if seconds > 0 else 'behind'} the server's"
    )


def test_a_policy_that_forbids_the_run_and_a_base_that_is_not_on_its_list(folder: Path) -> None:
    policy = client_of(folder).policy
    text = policy.read_text()
    policy.write_text(text.replace("largest-rank = 64", "largest-rank = 4"))
    found = wrong(examine_client(client_of(folder), RUN))
    assert "largest-rank" in found["policy against the config"].text
    policy.write_text(f'bases = ["{"0" * 64}"]\n')
    found = wrong(examine_client(client_of(folder), RUN))
    assert "is not on its list" in found["base"].text
    policy.write_text("largest-ranks = 3\n")
    assert "largest-rank" in wrong(examine_client(client_of(folder), None))["policy"].remedy


def test_own_data_are_looked_for_without_a_runs_config(folder: Path) -> None:
    file = folder / "client.toml"
    own = file.read_text().replace("partition = 1\npartitions = 3\n", 'path = "rows.jsonl"\n')
    file.write_text(own)
    found = wrong(examine_client(client_of(folder), None))
    assert found["data"].text == f"data.path {folder / 'rows.jsonl'} is not there"
    both = file.read_text().replace("[data]\n", "[data]\npartition = 1\npartitions = 3\n")
    file.write_text(both)
    assert "data" in wrong(examine_client(client_of(folder), None))
    assert "data" in wrong(examine_client(client_of(folder), RUN))
    (folder / "rows.jsonl").touch()
    found = {one.subject: one for one in examine_client(client_of(folder), None)}
    assert "data" not in found and found["base and memory"].verdict == "warning"


def test_a_state_folder_too_deep_for_a_socket(folder: Path) -> None:
    file = folder / "client.toml"
    file.write_text(file.read_text().replace('"client-state"', f'"{"deep/" * 20}state"'))
    found = wrong(examine_client(client_of(folder), None))
    assert "longer than 100 bytes" in found["socket"].text


def test_a_federation_of_another_size(folder: Path) -> None:
    run = RUN.with_overrides({"federation.clients": 2, "federation.partition": "iid"})
    found = wrong(examine_client(client_of(folder), run))
    assert "to 2 clients" in found["data"].text and "a part of 3" in found["data"].text


def test_one_user_is_a_warning_that_says_what_is_missing(folder: Path) -> None:
    findings = {one.subject: one for one in examine_client(client_of(folder), None)}
    finding = findings["two users"]
    assert finding.verdict == "warning" and "could read this client's data" in finding.text


def test_the_command_prints_and_exits_by_what_it_found(folder: Path) -> None:
    done = call("doctor", "--client", folder / "client.toml")
    assert done.status == 1 and "WRONG   server:" in done.out
    done = call("doctor", "--client", folder / "client.toml", "--json")
    told = json.loads(done.out)
    assert done.status == 1 and told["good"] is False
    assert {"subject", "verdict", "text", "remedy"} == told["findings"][0].keys()
    assert call("doctor").status == 2
