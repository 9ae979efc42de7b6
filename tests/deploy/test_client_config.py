"""client.toml: what it may say, what it may not, and the examples that are written."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from command_line import call
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from client.policy import Policy
from deploy.client_config import ClientConfig, user_and_group, write_example
from fedgraft.config import known_keys
from fedgraft.errors import ConfigError

WHOLE = """
server = "gate.example.org:9443"
keys = "keys/north"
policy = "policy.toml"
state = "state"
[data]
path = "rows.jsonl"
[model]
base = "models/b"
device = "cpu"
"""
LOCAL = """
server = "127.0.0.1:8000"
name = "north"
policy = "policy.toml"
state = "state"
[data]
partition = 1
partitions = 3
"""


def certificate(folder: Path, name: str) -> Path:
    """Write a folder of keys with a certificate of that name."""
    folder.mkdir(parents=True)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    (folder / "client.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return folder


def load(folder: Path, text: str) -> ClientConfig:
    path = folder / "client.toml"
    path.write_text(text)
    return ClientConfig.load(path)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    certificate(tmp_path / "keys" / "north", "north")
    config = load(tmp_path, WHOLE)
    own = config.own()
    assert own.name == config.client == "north"
    assert own.data == str(tmp_path / "rows.jsonl") and own.base == "models/b"  # the Hub's
    assert own.partition is None and own.policy_file == tmp_path / "policy.toml"
    assert own.ledger == tmp_path / "state" / "trainer" / "ledger.jsonl"
    (tmp_path / "models" / "b").mkdir(parents=True)
    assert load(tmp_path, WHOLE).own().base == str(tmp_path / "models" / "b")


def test_a_server_on_this_machine_needs_no_keys(tmp_path: Path) -> None:
    own = load(tmp_path, LOCAL).own()
    assert (own.name, own.partition, own.partitions) == ("north", 1, 3)


@pytest.mark.parametrize(
    ("was", "becomes", "said"),
    [
        ('state = "state"', 'sate = "state"', "state is missing|unknown config key sate"),
        ('state = "state"', "", "config key state is missing"),
        ('"127.0.0.1:8000"', '"127.0.0.1"', "must be HOST:PORT"),
        ('"127.0.0.1:8000"', '"10.0.0.1:8000"', "sets no keys, and server is 10.0.0.1:8000"),
        ('name = "north"', "", "must set one of keys and name"),
        ('name = "north"', 'name = "north"\nkeys = "k"', "must set one of keys and name"),
        ("partition = 1", "partition = 3", "partition 3 of partitions 3"),
        ("partitions = 3", "", "partition 1 of partitions None"),
        ("partition = 1\npartitions = 3", "", "names no data"),
        ('name = "north"', 'name = "north"\nnode-user = "nobody"', "must set both of"),
        ('name = "north"', 'name = "north"\nidle-minutes = 0.0', "idle-minutes"),
    ],
)
def test_what_is_wrong_is_said(was: str, becomes: str, said: str, tmp_path: Path) -> None:
    assert was in LOCAL
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, LOCAL.replace(was, becomes))


def test_a_certificate_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"certificate .*client.crt cannot be read"):
        _ = load(tmp_path, WHOLE).client
    (tmp_path / "keys" / "north").mkdir(parents=True)
    (tmp_path / "keys" / "north" / "client.crt").write_text("none")
    with pytest.raises(ConfigError, match=r"certificate .*client.crt cannot be read"):
        _ = load(tmp_path, WHOLE).client


def test_users_by_name_and_by_number() -> None:
    assert user_and_group(os.getuid())[0] == os.getuid()
    assert user_and_group(54321) == (54321, 54321)
    with pytest.raises(ConfigError, match="no Unix user 'nobody-at-all'"):
        user_and_group("nobody-at-all")


def test_examples_are_valid(tmp_path: Path) -> None:
    keys = certificate(tmp_path / "KEYS" / "clients" / "north", "north")
    path = tmp_path / "client.toml"
    policy = write_example(path, keys, partition=2, partitions=3, base_hash="ab" * 32)
    config = ClientConfig.load(path)
    assert config.client == "north" and config.server == "127.0.0.1:9443"
    assert (config.data.partition, config.data.partitions) == (2, 3)
    assert config.policy == policy and Policy.load(policy).bases == ["ab" * 32]
    assert 'keys = "KEYS/clients/north"' in path.read_text()
    with pytest.raises(ConfigError, match="exists already"):
        write_example(path, keys)
    write_example(tmp_path / "own.toml", keys, server="gate:1")
    own = ClientConfig.load(tmp_path / "own.toml")
    assert own.data.path == tmp_path / "data.jsonl" and own.server == "gate:1"
    assert Policy.load(own.policy).bases is None


def test_every_key_and_clause_is_on_the_clients_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "client.md").read_text()
    for key in (*known_keys(ClientConfig), *known_keys(Policy)):
        assert f"`{key}`" in page, key


def test_a_partition_that_is_none_writes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "client.toml"
    done = call("client", "--init", file, "--keys", tmp_path, "--partition", "3")
    assert done.status == 2 and "--partition 3 of --partitions 3: take 0 to 2" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--config", "c.toml", "--partition", "2"), "--partition goes with --init"),
        (("--config", "c.toml", "--server", "h:1"), "--server goes with --init"),
        (("--config", "c.toml", "--keys", "k"), "--keys goes with --init"),
        (("--init", "c.toml", "--keys", "k", "--only", "trainer"), "--only goes with --config"),
    ],
)
def test_options_of_the_other_use_are_not_passed_over(words: tuple[str, ...], said: str) -> None:
    done = call("client", *words)
    assert done.status == 2 and said in done.err


def test_an_example_without_a_partition_asks_for_data_first(tmp_path: Path) -> None:
    keys = certificate(tmp_path / "KEYS" / "clients" / "north", "north")
    done = call("client", "--init", tmp_path / "c.toml", "--keys", keys)
    assert done.status == 0 and f"name your data in it ({tmp_path / 'data.jsonl'} for" in done.out
    assert ClientConfig.load(tmp_path / "c.toml").data_missing
