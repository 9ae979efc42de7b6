"""The KEYS directory and `fedgraft keys`, without a server."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from command_line import call
from cryptography import x509
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import sign_message, verify_signature

from deploy import keys as keys_module
from deploy.admission import digest, wait_for_server
from deploy.keys import Keys
from deploy.lock import only_one
from fedgraft.errors import ConfigError, RunError


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys.create(tmp_path / "KEYS", ["fl.example.org"])


def revoked_serials(keys: Keys) -> set[str]:
    return {f"{one.serial_number:x}" for one in x509.load_pem_x509_crl(keys.crl.read_bytes())}


def test_a_client_gets_one_folder_and_its_secrets_are_private(keys: Keys):
    keys.invite("hospital-1")
    folder = keys.client_folder("hospital-1")
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    open_, private = 0o644, 0o600
    assert modes == {
        "ca.crt": open_,
        "client.crt": open_,
        "client.key": private,
        "node": private,
        "node.pub": open_,
    }
    assert (keys.folder / "ca.key").stat().st_mode & 0o777 == private
    assert (keys.server / "server.key").stat().st_mode & 0o777 == private
    assert (folder / "ca.crt").read_bytes() == (keys.server / "ca.crt").read_bytes()


def test_flower_reads_the_node_key(keys: Keys):
    from flwr.supernode.cli.flower_supernode import load_ssh_private_key

    client = keys.invite("a")
    folder = keys.client_folder("a")
    private = load_ssh_private_key((folder / "node").read_bytes(), None)
    public = try_load_public_key(folder / "node.pub")
    assert public == client.public_key
    assert verify_signature(private.public_key(), b"x", sign_message(private, b"x"))


def test_names_and_repetitions(keys: Keys):
    keys.invite("a")
    for name in ("", "A", "a b", "../a", "-a", "a,CN=b", "a" * 65):
        with pytest.raises(ConfigError, match="cannot be a client's name"):
            keys.invite(name)
    with pytest.raises(ConfigError, match="invited already") as caught:
        keys.invite("a")
    assert "--renew" in caught.value.remedy
    with pytest.raises(ConfigError, match="there is no client b") as caught:
        keys.revoke("b")
    assert "Invited are: a." in caught.value.remedy
    with pytest.raises(ConfigError, match="is not empty"):
        Keys.create(keys.folder, ["x"])
    with pytest.raises(ConfigError, match="holds no keys"):
        Keys(keys.folder / "server")


def test_renewing_keeps_the_node_and_revoking_takes_every_certificate(keys: Keys):
    first, other = keys.invite("a"), keys.invite("b")
    node = (keys.client_folder("a") / "node").read_bytes()
    second = keys.renew("a", days=30)
    assert second.node_key == first.node_key
    assert (keys.client_folder("a") / "node").read_bytes() == node
    assert len({one.serial for one in second.certificates}) == 2
    assert second.expires < first.expires
    assert revoked_serials(keys) == set()

    keys.revoke("a")
    assert revoked_serials(keys) == {one.serial for one in second.certificates}
    assert list(keys.invited()) == ["b"]
    for step in (keys.revoke, keys.renew):
        with pytest.raises(ConfigError, match="client a was revoked already"):
            step("a")

    third = keys.invite("a")  # all new
    assert third.node_key != first.node_key
    assert (keys.client_folder("a") / "node").read_bytes() != node
    keys.revoke("b")
    certificates = (*second.certificates, *other.certificates)
    assert revoked_serials(keys) == {one.serial for one in certificates}
    assert [(one.name, one.revoked is None) for one in Keys(keys.folder).clients()] == [
        ("a", False),
        ("b", False),
        ("a", True),
    ]


def test_the_server_gets_a_new_certificate_of_the_same_authority(keys: Keys):
    before = {p.name: p.read_bytes() for p in keys.server.iterdir()}
    keys.renew_server(["other.org"], days=10)
    after = {p.name: p.read_bytes() for p in keys.server.iterdir()}
    assert before["ca.crt"] == after["ca.crt"] and before["server.key"] != after["server.key"]
    names = keys.certificates()["server"].extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["other.org", "localhost"]


def test_two_commands_at_once_lose_no_client(keys: Keys):
    code = "import sys; from pathlib import Path; from deploy.keys import Keys;"
    code += "[Keys(Path(sys.argv[1])).invite(f'{sys.argv[2]}{n}') for n in range(8)]"
    both = [subprocess.Popen([sys.executable, "-c", code, str(keys.folder), name]) for name in "ab"]
    assert [one.wait(60) for one in both] == [0, 0]
    assert len(keys.invited()) == 16


def test_damaged_records_are_never_read_as_none(keys: Keys):
    keys.invite("a")
    path = keys.folder / "clients.json"
    whole = path.read_text()
    no_key = json.loads(whole)
    no_key["clients"][0]["node_key"] = "ecdsa-sha2-nistp384 AAAAbroken 2"
    for damaged in (whole[:50], '{"clients": [{"name": "a"}]}', "[]", json.dumps(no_key)):
        path.write_text(damaged)
        with pytest.raises(ConfigError, match=r"clients\.json is damaged"):
            keys.clients()
        with pytest.raises(ConfigError):
            keys.invite("b")
        assert path.read_text() == damaged


def test_a_server_is_waited_for_where_one_runs(keys: Keys, tmp_path: Path):
    assert not wait_for_server(keys)
    keys.running.write_text("{")
    assert not wait_for_server(keys)
    lock = tmp_path / "state" / "server.lock"
    told = {"state": str(lock.parent), "log": "the.log", "knows": digest(keys)}
    with only_one(lock, "server"):
        keys.running.write_text(json.dumps(told))
        assert wait_for_server(keys)
        keys.invite("a")
        with pytest.raises(RunError, match="has not taken it in") as caught:
            wait_for_server(keys, 0.1)
        assert "the.log" in caught.value.remedy
    assert not wait_for_server(keys)  # it was killed, and could not take its word back


def test_the_digest_is_of_who_is_let_in_and_not_of_node_ids(keys: Keys):
    digests = [digest(keys)]
    client = keys.invite("a")
    digests.append(digest(keys))
    keys.set_node_ids({client.node_key: 7})
    assert keys.invited()["a"].node_id == 7 and digest(keys) == digests[-1]
    keys.revoke("a")
    digests.append(digest(keys))
    assert len(set(digests)) == 3


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "KEYS"
    done = call("keys", "init", "--dir", folder, "--host", "localhost", "--days", 20)
    assert done.status == 0 and f"Next: fedgraft keys client NAME --dir {folder}" in done.out
    done = call("keys", "client", "a", "--dir", folder)
    assert done.status == 0 and f"Hand {folder / 'clients' / 'a'} to a" in done.out
    assert "No server runs here with these keys" in done.out
    done = call("keys", "client", "b", "--dir", folder, "--json")
    made = json.loads(done.out)
    assert (made["name"], made["node_id"]) == ("b", None)
    assert made["folder"] == str(folder / "clients" / "b")
    with monkeypatch.context() as patch:
        past = datetime.now(UTC) - timedelta(days=3)
        issue = keys_module.issue_client
        patch.setattr(keys_module, "issue_client", lambda *a: issue(*a, now=past))
        assert call("keys", "client", "old", "--dir", folder, "--days", 2).status == 0
    assert call("keys", "revoke", "b", "--dir", folder).out.startswith("Client b is revoked.")

    shown = json.loads(call("keys", "show", "--dir", folder, "--json").out)
    states = {row["name"]: row["state"] for row in (*shown["certificates"], *shown["clients"])}
    assert states == {
        "CA": "good",
        "server": "expires soon",
        "a": "good",
        "b": "revoked",
        "old": "expired",
    }
    assert len(shown["warnings"]) == 2
    table = call("keys", "show", "--dir", folder)
    assert table.status == 0 and "not registered" in table.out
    assert "Warning: server expires on" in table.out and "Warning: old expired on" in table.out

    renewed = call("keys", "client", "old", "--dir", folder, "--renew")
    assert renewed.status == 0
    assert (
        "Restart the server"
        in call("keys", "init", "--dir", folder, "--host", "localhost", "--renew").out
    )
    assert json.loads(call("keys", "show", "--dir", folder, "--json").out)["warnings"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["client", "a", "--dir", "KEYS"], "holds no keys"),
        (["show", "--dir", "KEYS"], "holds no keys"),
        (["init", "--dir", "KEYS"], "Missing option '--host'"),
        (["init", "--dir", "KEYS", "--host", "x", "--days", "0"], "--days"),
        (["shew"], "No such command 'shew'"),
    ],
)
def test_wrong_usage_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    done = call("keys", *arguments)
    assert done.status == 2 and message in done.err and len(done.err.splitlines()) <= 2


def test_the_commands_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One after the other in an empty folder; the server itself is started in test_server.py."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text()
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL))
    lines = [line.split("#")[0] for line in blocks.splitlines()]
    ours = [line for line in lines if line.startswith(("fedgraft keys", "fedgraft server --init"))]
    assert len(ours) >= 8
    for line in ours:
        done = call(*shlex.split(line)[1:])
        assert done.status == 0, f"{line}\n{done.err}"
