"""The KEYS directory: who is invited, with what keys, until when, and who no longer is.

```
KEYS/ca.crt  ca.key                                  the federation's own CA
KEYS/crl.pem                                         the revocation list, which the gateway reads
KEYS/clients.json                                    every client ever invited
KEYS/server/{ca.crt,server.crt,server.key}           what a server needs besides these two
KEYS/clients/NAME/{ca.crt,client.crt,client.key}     the folder handed to client NAME: TLS,
KEYS/clients/NAME/{node,node.pub}                    and the node key that its SuperNode signs with
```
A server reads server/, crl.pem and clients.json, never ca.key: the CA may be kept elsewhere.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)

from deploy.certificates import (
    DAYS,
    Issued,
    issue_client,
    issue_server,
    key_bytes,
    make_authority,
    make_node_key,
    node_public_text,
    read_certificate,
    read_issued,
    read_key_file,
    revocation_list,
    write_private,
    write_public,
)
from deploy.lock import turn
from fedgraft.errors import ConfigError
from fedgraft.files import write_json

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_ALWAYS = ("localhost", "127.0.0.1", "::1")
"""Hosts that every server's certificate is for, too: the gateway speaks to its SuperLink."""


@dataclass(frozen=True)
class Certificate:
    """What clients.json keeps of a client's certificate."""

    serial: str  # hexadecimal
    expires: str  # ISO 8601


@dataclass(frozen=True)
class Client:
    """One invitation.

    Attributes:
        name: the client's, and the common name of its certificates.
        node_key: its node's public key, a line of OpenSSH.
        node_id: its node's id at the server, once it is registered there.
        created: when it was invited.
        revoked: when that was taken back, or None.
        certificates: all that were ever issued for this node key, the present one last.
    """

    name: str
    node_key: str
    created: str
    certificates: tuple[Certificate, ...]
    node_id: int | None = None
    revoked: str | None = None

    @property
    def public_key(self) -> bytes:
        """The node's public key as it travels in Flower: PEM."""
        key = load_ssh_public_key(self.node_key.encode())
        return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @property
    def expires(self) -> datetime:
        """When the present certificate ends."""
        return datetime.fromisoformat(self.certificates[-1].expires)


class Keys:
    """A KEYS directory.

    Args:
        folder: where it is.

    Raises:
        ConfigError: it is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not self.records.exists():
            raise ConfigError(
                f"{folder} holds no keys",
                f"Make them: fedgraft keys init --dir {folder} --host NAME",
            )

    @property
    def server(self) -> Path:
        """The server's folder: ca.crt, server.crt, server.key."""
        return self.folder / "server"

    @property
    def crl(self) -> Path:
        """The revocation list."""
        return self.folder / "crl.pem"

    @property
    def running(self) -> Path:
        """Where a server that runs with these keys says so, and what it has taken in."""
        return self.folder / "running.json"

    @property
    def records(self) -> Path:
        """Every invitation there ever was."""
        return self.folder / "clients.json"

    def client_folder(self, name: str) -> Path:
        """Return the folder that is handed to a client."""
        return self.folder / "clients" / name

    @classmethod
    def create(cls, folder: Path, hosts: Sequence[str], days: int = DAYS) -> Keys:
        """Make a CA and a server's certificate.

        Args:
            folder: a new or empty one.
            hosts: names and addresses that clients reach the server by.
            days: how long the server's certificate holds.

        Raises:
            ConfigError: the folder holds something already, or a host is none.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                f"{folder} is not empty",
                "Name a new folder; for a new server certificate of the same CA add --renew.",
            )
        authority = make_authority(f"FedGraft CA of {hosts[0]}"[:64])
        server = _server(authority, hosts, days)
        authority.write(folder / "ca.crt", folder / "ca.key")
        folder.chmod(0o755)
        _write_server(folder, server)
        write_public(folder / "crl.pem", revocation_list(authority, []))
        write_json(folder / "clients.json", {"clients": []})
        return cls(folder)

    def renew_server(self, hosts: Sequence[str], days: int = DAYS) -> None:
        """Issue a new certificate and key for the server; clients notice nothing."""
        _write_server(self.folder, _server(self._authority(), hosts, days))

    def invite(self, name: str, days: int = DAYS) -> Client:
        """Issue certificate and node key for a new client, or for one that was revoked.

        Raises:
            ConfigError: the name cannot be one, or is invited already.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} cannot be a client's name",
                "Use small letters, digits, dots, dashes and underscores, like hospital-1.",
            )
        with self._changing() as records:
            if any(record.name == name for record in records if record.revoked is None):
                raise ConfigError(
                    f"client {name} is invited already",
                    "For a new certificate add --renew; where its keys leaked, revoke it first.",
                )
            authority, node = self._authority(), make_node_key()
            issued = issue_client(authority, name, days)
            text = node_public_text(node, name)
            client = Client(name, text, _now(), (_certificate(issued),))
            folder = self.client_folder(name)
            shutil.rmtree(folder, ignore_errors=True)  # of one that was revoked
            self._hand_over(folder, issued)
            write_private(folder / "node", key_bytes(node, openssh=True))
            write_public(folder / "node.pub", f"{text}\n".encode())
            records.append(client)
        return client

    def renew(self, name: str, days: int = DAYS) -> Client:
        """Issue a new certificate for a client; its node key and its old certificate stay good.

        Raises:
            ConfigError: there is no such client, or it was revoked.
        """
        with self._changing() as records:
            index = self._find(records, name)
            issued = issue_client(self._authority(), name, days)
            self._hand_over(self.client_folder(name), issued)
            old = records[index]
            records[index] = replace(old, certificates=(*old.certificates, _certificate(issued)))
            return records[index]

    def revoke(self, name: str) -> Client:
        """Take a client's invitation back: all its certificates go on the revocation list.

        Raises:
            ConfigError: there is no such client, or it was revoked.
        """
        with self._changing() as records:
            index = self._find(records, name)
            records[index] = replace(records[index], revoked=_now())
            revoked = [
                (int(certificate.serial, 16), datetime.fromisoformat(record.revoked))
                for record in records
                if record.revoked is not None
                for certificate in record.certificates
            ]
            # The list first: where it cannot be written, nobody is told that it was.
            write_public(self.crl, revocation_list(self._authority(), revoked))
            return records[index]

    def clients(self) -> list[Client]:
        """Return every invitation there ever was, in order; a name may come again.

        Raises:
            ConfigError: clients.json is damaged.
        """
        try:
            tree = json.loads(read_key_file(self.records))
            return [_client(record) for record in tree["clients"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.records} is damaged: {error}", "Restore it from its backup."
            ) from None

    def invited(self) -> dict[str, Client]:
        """Return the clients that are invited now, by name."""
        return {one.name: one for one in self.clients() if one.revoked is None}

    def set_node_ids(self, ids: dict[str, int | None]) -> None:
        """Note the ids that nodes have at the server, by their public key as in `node_key`."""
        with self._changing() as records:
            records[:] = [
                replace(one, node_id=ids[one.node_key]) if one.node_key in ids else one
                for one in records
            ]

    def certificates(self) -> dict[str, x509.Certificate]:
        """Return the certificates of this folder that can end: CA, server, and each client's."""
        found = {
            "CA": read_certificate(self.server / "ca.crt"),
            "server": read_certificate(self.server / "server.crt"),
        }
        for name in self.invited():
            path = self.client_folder(name) / "client.crt"
            if path.exists():  # a folder that was handed over may be gone from here
                found[name] = read_certificate(path)
        return found

    @contextmanager
    def _changing(self) -> Iterator[list[Client]]:
        """Give the records to change; what they are at the end is written."""
        with turn(self.folder / ".lock"):
            records = self.clients()
            before = list(records)
            yield records
            if records != before:
                write_json(self.records, {"clients": [asdict(one) for one in records]})

    def _find(self, records: Sequence[Client], name: str) -> int:
        for index, record in enumerate(records):
            if record.name == name and record.revoked is None:
                return index
        invited = sorted(one.name for one in records if one.revoked is None)
        gone = [one for one in records if one.name == name]
        raise ConfigError(
            f"client {name} was revoked already" if gone else f"there is no client {name}",
            f"Invited are: {', '.join(invited) or 'none'}.",
        )

    def _authority(self) -> Issued:
        return read_issued(self.folder / "ca.crt", self.folder / "ca.key")

    def _hand_over(self, folder: Path, issued: Issued) -> None:
        issued.write(folder / "client.crt", folder / "client.key")
        write_public(folder / "ca.crt", read_key_file(self.folder / "ca.crt"))


def _server(authority: Issued, hosts: Sequence[str], days: int) -> Issued:
    return issue_server(authority, list(dict.fromkeys([*hosts, *_ALWAYS])), days)


def _write_server(folder: Path, server: Issued) -> None:
    server.write(folder / "server" / "server.crt", folder / "server" / "server.key")
    write_public(folder / "server" / "ca.crt", read_key_file(folder / "ca.crt"))


def _certificate(issued: Issued) -> Certificate:
    one = issued.certificate
    return Certificate(f"{one.serial_number:x}", one.not_valid_after_utc.isoformat())


def _client(record: dict[str, Any]) -> Client:
    certificates = tuple(Certificate(**one) for one in record["certificates"])
    client = Client(**{**record, "certificates": certificates})
    try:
        load_ssh_public_key(client.node_key.encode())
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None
    return client


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
