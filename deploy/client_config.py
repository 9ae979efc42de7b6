"""client.toml: where a client's server is, and what is its own: keys, data, base and policy."""

from __future__ import annotations

import os
import pwd
import re
from json import dumps
from pathlib import Path
from typing import Annotated, ClassVar

from cryptography import x509
from cryptography.x509.oid import NameOID
from pydantic import Field, PrivateAttr

from client.policy import EXAMPLE as POLICY
from client.resident.own import Own
from deploy.config_file import (
    DEFAULT_GATEWAY,
    NODE,
    TRAINER,
    FilePath,
    House,
    WithState,
    as_written_in,
    check_new,
)
from fedgraft.config import Group, Positive
from fedgraft.errors import ConfigError
from fedgraft.files import write_text

_SERVER = re.compile(r"(?P<host>[^\s\[\]:]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})")
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_LONGEST_NAME = 100

EXAMPLE = """\
# A FedGraft client. Start it with: fedgraft client --config {file}
# Relative paths are relative to this file.

server = {server}  # the server's gateway
keys = {keys}  # what `fedgraft keys client` made for this client
policy = {policy}  # what this client lets a run do
state = {state}  # log, socket, personal state and the privacy ledger: keep it

# After so long without a request the base and the data leave the memory.
idle-minutes = 30.0

# Started by root, the two processes can be two Unix users: what the server sends runs as the
# second one, which can read neither data nor policy nor ledger (docs/client.md).
# trainer-user = "fedgraft-trainer"
# node-user = "fedgraft-node"

[data]
{data}

[model]
{base}
device = "auto"  # auto, cpu, cuda, cuda:1, mps
"""
_PARTITION = """\
# Partition {partition} of the task's data, dealt as to {partitions} clients of a simulation.
partition = {partition}
partitions = {partitions}
# path = "data.jsonl"  # data of this client's own; then leave partition and partitions out"""
_PATH = """\
path = "data.jsonl"  # this client's own data: a file or a folder, as `fedgraft data` reads it"""


class DataConfig(Group):
    """`[data]`: what this client trains on."""

    path: FilePath | None = None
    partition: Annotated[int, Field(ge=0)] | None = None
    partitions: Positive | None = None


class BaseConfig(Group):
    """`[model]`: the base on this machine, and where it runs."""

    base: str | None = None  # a folder or a Hub id; digits brings its own
    revision: str | None = None
    offline: bool = False
    device: str = "auto"


class ClientConfig(WithState):
    """What `fedgraft client` is started with; paths are absolute once it is loaded."""

    SIDE: ClassVar[str] = "client"

    server: str
    policy: FilePath
    keys: FilePath | None = None
    name: str | None = None  # without keys, which name the client
    idle_minutes: Annotated[float, Field(gt=0.0)] = 30.0
    trainer_user: str | int | None = None
    node_user: str | int | None = None
    data: DataConfig = DataConfig()
    model: BaseConfig = BaseConfig()
    _file: Path | None = PrivateAttr(default=None)

    @property
    def client(self) -> str:
        """The client's name: what its certificate says, or `name` where there is none.

        Raises:
            ConfigError: the certificate cannot be read, or names nobody.
        """
        if self.keys is None:
            assert self.name is not None  # checked when the file was read
            return self.name
        return name_in(self.keys / "client.crt")

    @property
    def two_users(self) -> bool:
        """Whether trainer and SuperNode are users of their own."""
        return self.node_user is not None

    @property
    def socket(self) -> Path:
        """Where the resident trainer listens."""
        return self.state / "socket" / "trainer.sock"

    @property
    def kept(self) -> Path:
        """The trainer's folder: personal state, privacy ledger, rounds counted."""
        return self.state / "trainer"

    @property
    def node(self) -> Path:
        """The SuperNode's folder, which holds nothing of the client's data."""
        return self.state / "node"

    @property
    def node_keys(self) -> Path:
        """The SuperNode's copy of the client's keys, where it is a user of its own."""
        return self.state / "node-keys"

    def house(self, only: str | None = None) -> House:
        """Return where a supervisor keeps its log and lock.

        Args:
            only: the one part that it runs; it then has that part's folder and no other.
        """
        return House({None: self.state, TRAINER: self.kept, NODE: self.node}[only], self.SIDE)

    @property
    def data_missing(self) -> bool:
        """Whether data of this client's own are not there, or not yet: a late mount, say."""
        return self.data.path is not None and not os.path.lexists(self.data.path)

    @property
    def file(self) -> Path | None:
        """The file that this was read from."""
        return self._file

    def own(self) -> Own:
        """Return what the resident trainer works with."""
        return Own(
            name=self.client,
            policy_file=self.policy,
            state=self.kept,
            data=None if self.data.path is None else str(self.data.path),
            partition=self.data.partition,
            partitions=self.data.partitions or 1,
            base=self.model.base,
            revision=self.model.revision,
            offline=self.model.offline,
            device=self.model.device,
        )

    @classmethod
    def load(cls, path: Path) -> ClientConfig:
        """Read client.toml; relative paths become absolute, from the file's folder on.

        Raises:
            ConfigError: no such file, no TOML, an unknown key (the nearest valid one is named), a
                missing one, a wrong type or value, or keys that contradict each other.
        """
        read = cls.read(path)
        _check(read, path)
        folder = path.resolve().parent
        paths = {
            name: folder / found.expanduser()
            for name in ("state", "policy", "keys")
            if (found := getattr(read, name)) is not None
        }
        data, model = read.data, read.model
        if data.path is not None:
            data = data.model_copy(update={"path": folder / data.path.expanduser()})
        if model.base is not None and (folder / model.base).exists():
            model = model.model_copy(update={"base": str(folder / model.base)})
        loaded = read.model_copy(update={**paths, "data": data, "model": model})
        loaded._file = path.absolute()
        return loaded


def user_and_group(user: str | int) -> tuple[int, int]:
    """Return the ids of a Unix user and its main group; a number stands for both where unknown.

    Raises:
        ConfigError: there is no user of that name.
    """
    try:
        found = pwd.getpwuid(user) if isinstance(user, int) else pwd.getpwnam(user)
        return found.pw_uid, found.pw_gid
    except KeyError:
        if isinstance(user, int):
            return user, user
        raise ConfigError(
            f"there is no Unix user {user!r}", f"Make it: useradd -r {user}"
        ) from None


def name_in(certificate: Path) -> str:
    """Return the common name of a certificate.

    Raises:
        ConfigError: it cannot be read, or has none.
    """
    try:
        read = x509.load_pem_x509_certificate(certificate.read_bytes())
        found = read.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        name = str(found[0].value) if found else ""
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the client's certificate {certificate} cannot be read: {error}",
            "Let `keys` be the folder that `fedgraft keys client NAME` made.",
        ) from None
    if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        raise ConfigError(f"the certificate {certificate} names no client", "Make new keys.")
    return name


def _check(read: ClientConfig, path: Path) -> None:
    match = _SERVER.fullmatch(read.server)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ConfigError(
            f"config key server in {path} is {read.server!r}, and must be HOST:PORT",
            f'Set it like server = "{DEFAULT_GATEWAY}".',
        )
    if (read.keys is None) == (read.name is None):
        raise ConfigError(
            f"{path} must set one of keys and name",
            "Set keys to the folder that `fedgraft keys client NAME` made; name is for a server "
            "on this machine without TLS.",
        )
    if read.keys is None and match["host"] not in _LOOPBACK:
        raise ConfigError(
            f"{path} sets no keys, and server is {read.server}",
            "Set keys: without them only a server on this machine is spoken to.",
        )
    data = read.data
    if (data.partition is None) != (data.partitions is None) or (
        data.partition is not None and data.partition >= (data.partitions or 0)
    ):
        raise ConfigError(
            f"[data] in {path} has partition {data.partition} of partitions {data.partitions}",
            "Set both, with partition from 0 to partitions - 1, or none of them.",
        )
    if data.partition is None and data.path is None:
        raise ConfigError(f"[data] in {path} names no data", "Set data.path, or data.partition.")
    if (read.trainer_user is None) != (read.node_user is None):
        raise ConfigError(
            f"{path} must set both of trainer-user and node-user, or none of them",
            "They keep what the server sends away from the data.",
        )


def write_example(
    path: Path,
    keys: Path,
    *,
    server: str = DEFAULT_GATEWAY,
    partition: int | None = None,
    partitions: int = 3,
    base_hash: str = "",
) -> Path:
    """Write a commented client.toml and its policy, which run as they stand on one machine.

    Args:
        path: of client.toml; the policy lies beside it.
        keys: the client's folder of keys.
        server: HOST:PORT of the gateway.
        partition: of the digits; None for data of the client's own.
        partitions: into how many the digits are dealt.
        base_hash: of the one base that the policy allows; "" for none on its list yet.

    Returns:
        The policy's path.

    Raises:
        ConfigError: one of the files exists, or the keys are no client's.
    """
    name_in(keys / "client.crt")
    policy = path.with_name(f"{path.stem}-policy.toml")
    check_new(path, policy)
    built_in = partition is not None
    text = EXAMPLE.format(
        file=path,
        server=dumps(server),
        keys=dumps(str(as_written_in(path, keys))),
        policy=dumps(policy.name),
        state=dumps(f"{path.stem}-state"),
        data=_PARTITION.format(partition=partition, partitions=partitions) if built_in else _PATH,
        base='# base = "FOLDER"  # a folder or a Hub id; the digits task brings its own',
    )
    bases = f'bases = ["{base_hash}"]' if base_hash else '# bases = ["HASH"]'
    task = "digits" if built_in else "text-classification"
    write_text(policy, POLICY.format(bases=bases, task=dumps(task)))
    write_text(path, text)
    return policy
