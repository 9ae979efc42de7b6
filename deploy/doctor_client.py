"""What could keep a client from its work, found before it does, with the remedy."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection

from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

from client.policy import Policy
from client.resident.own import Own
from client.resident.protocol import check_socket
from deploy.certificates import (
    WARN_DAYS,
    days_left,
    node_header,
    read_certificate,
    read_issued,
    read_key_file,
)
from deploy.client_config import ClientConfig
from deploy.findings import (
    CONNECT_SECONDS,
    Finding,
    allow,
    device,
    disk,
    tried,
    without_config,
    work,
)
from deploy.isolation import StrangerError, check_users
from fedgraft.config import Config
from fedgraft.errors import ConfigError, FedGraftError
from fedgraft.resident_model import resident_task

MOST_SKEW = 60.0
"""Seconds between two clocks; certificates and signed requests bear no more for long."""


def examine_client(client: ClientConfig, against: Config | None) -> list[Finding]:
    """Look at a client's machine, keys, server, data, base and policy."""
    findings = [
        *_client_certificates(client),
        *_server_reached(client),
        disk(client.state),
        *tried("socket", lambda: _socket(client)),
        device(client.model.device),
        *tried("policy", lambda: _policy_read(client)),
        _two_users(client),
    ]
    missing = list(_data_out_of_reach(client))
    own = _own(client)
    if own is None or missing:
        return [*findings, *missing]
    config = against
    if config is None:
        if own.partition is None or own.data is not None:  # what it is for, only a run says
            return [*findings, without_config()]
        config = Config().with_overrides({"federation.clients": own.partitions})
    else:
        asked = config
        findings += tried(
            "policy against the config",
            lambda: _policy_allows(client, asked),
            f"Change the run's config, or the clause in {client.policy}.",
        )
    try:
        mine = own.config(config)
    except FedGraftError as error:
        return [*findings, Finding("config", "wrong", error.message, error.remedy)]
    return [*findings, *work(mine, lambda: _own_data(mine, own), client.policy)]


def _own_data(config: Config, own: Own) -> str:
    if own.partition is not None and own.partitions != config.federation.clients:
        raise ConfigError(
            f"the run deals its data to {config.federation.clients} clients (federation.clients), "
            f"and this one holds a part of {own.partitions}",
            "Let federation.clients and partitions in client.toml be the same.",
        )
    task = resident_task(config)
    return f"{len(task.train(own.partition or 0))} training examples"


def _own(client: ClientConfig) -> Own | None:
    try:
        return client.own()
    except FedGraftError:
        return None  # the certificates' finding says it


def _client_certificates(client: ClientConfig) -> Iterable[Finding]:
    if client.keys is None:
        yield Finding(
            "certificates", "warning", "no keys are set: what it says to the server is open",
            "Set keys to the folder that `fedgraft keys client NAME` made.",
        )  # fmt: skip
        return
    try:
        issued = read_issued(client.keys / "client.crt", client.keys / "client.key").certificate
        authority = read_certificate(client.keys / "ca.crt")
        read_key_file(client.keys / "node")
    except FedGraftError as error:
        yield Finding("certificates", "wrong", error.message, error.remedy)
        return
    renew = f"Ask the server's owner: fedgraft keys client {client.client} --renew"
    anew = "Ask the server's owner for new keys: all are made anew (fedgraft keys init)."
    for name, certificate, ask in (
        ("this client's", issued, renew),
        ("the CA's", authority, anew),
    ):
        left, end = days_left(certificate), certificate.not_valid_after_utc.date()
        if left < 0:
            yield Finding("certificates", "wrong", f"{name} expired on {end}", ask)
        elif left < WARN_DAYS:
            yield Finding("certificates", "warning", f"{name} expires on {end}", ask)
        else:
            yield Finding("certificates", "good", f"{name} holds until {end}")


def _server_reached(client: ClientConfig) -> Iterable[Finding]:
    """Speak to the gateway as this client, and compare clocks by the Date of its answer."""
    host, _, port = client.server.rpartition(":")
    host = host.strip("[]")
    if client.keys is None:
        try:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        except OSError as error:
            yield Finding("server", "wrong", f"{client.server}: {error}", "Start it there.")
        else:
            yield Finding("server", "good", f"{client.server} answers")
        return
    try:
        context = ssl.create_default_context(cafile=str(client.keys / "ca.crt"))
        context.load_cert_chain(client.keys / "client.crt", client.keys / "client.key")
        asked = datetime.now(UTC)
        connection = HTTPSConnection(host, int(port), timeout=CONNECT_SECONDS, context=context)
        # The gateway answers 401 where node key and certificate are not one client's; what it lets
        # pass the SuperLink does not take, as nothing is in it.
        node = {FLEET_HTTP_PUBLIC_KEY_HEADER: node_header(client.keys / "node")}
        connection.request("POST", "/v1/fleet/pull-messages", headers=node)
        answer = connection.getresponse()
        body = answer.read(1000).decode(errors="replace")
        connection.close()
    except ConfigError as error:
        yield Finding("server", "wrong", error.message, error.remedy)
        return
    except ssl.SSLCertVerificationError as error:
        yield Finding(
            "server", "wrong", f"{client.server} is not who it should be: {error.verify_message}",
            "Let `server` be a name that its certificate is for (fedgraft keys init --host), and "
            "`keys` be of the same federation; look at this machine's clock.",
        )  # fmt: skip
        return
    except (OSError, HTTPException) as error:
        yield Finding(
            "server", "wrong", f"{client.server} does not answer: {error}",
            "Check `server`, the network, the firewall on the way, and that the server runs.",
        )  # fmt: skip
        return
    if answer.status == 400:  # nginx's answer to a certificate that it does not take
        why = "revoked, expired or of another CA" if "certificate error" in body else "not taken"
        yield Finding(
            "server", "wrong", f"{client.server} refuses this client's certificate: {why}",
            "Ask the server's owner for new keys (fedgraft keys client).",
        )  # fmt: skip
    elif answer.status == 401:
        yield Finding(
            "server", "wrong", f"{client.server} does not know {client.keys / 'node'} as this "
            "client's node key",
            "Let `keys` be the folder that `fedgraft keys client` made, all of it, and the newest.",
        )  # fmt: skip
    elif answer.status >= 500:
        yield Finding(
            "server", "wrong", f"{client.server} lets this client in, and has no SuperLink behind "
            f"it just now ({answer.status})",
            "Ask the server's owner to look: fedgraft status, fedgraft doctor --server.",
        )  # fmt: skip
    else:
        yield Finding("server", "good", f"{client.server} lets this client in")
    yield from _clock(answer.getheader("Date"), asked)


def _clock(date: str | None, asked: datetime) -> Iterable[Finding]:
    if date is None:
        return
    skew = (asked - parsedate_to_datetime(date)).total_seconds()
    text = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the server's"
    if abs(skew) > MOST_SKEW:
        remedy = "Set this machine's clock, or the server's: timedatectl set-ntp true"
        yield Finding("clock", "wrong", text, remedy)
    else:
        yield Finding("clock", "good", text)


def _socket(client: ClientConfig) -> str:
    check_socket(client.socket)
    return f"{client.socket} is short enough"


def _data_out_of_reach(client: ClientConfig) -> Iterable[Finding]:
    path = client.data.path
    if client.data_missing:
        yield Finding(
            "data", "wrong", f"data.path {path} is not there",
            "Correct data.path, or mount what it is on.",
        )  # fmt: skip
    elif path is not None and not client.two_users and not os.access(path, os.R_OK):
        yield Finding("data", "wrong", f"data.path {path} cannot be read", f"Let it: {allow(path)}")


def _policy_read(client: ClientConfig) -> str:
    Policy.load(client.policy)
    return f"{client.policy} can be read"


def _policy_allows(client: ClientConfig, config: Config) -> str:
    Policy.load(client.policy).check_run(client.client, config)
    return "it allows this run"


def _two_users(client: ClientConfig) -> Finding:
    if not client.two_users:
        return Finding(
            "two users",
            "warning",
            "trainer and SuperNode are one Unix user: code that a hostile server sends could read "
            "this client's data, policy and ledger",
            "Make two users and name them as trainer-user and node-user (docs/client.md).",
        )
    try:
        check_users(client)
    except StrangerError as error:
        return Finding("two users", "warning", error.message, error.remedy)
    except ConfigError as error:
        return Finding("two users", "wrong", error.message, error.remedy)
    return Finding(
        "two users", "good", f"{client.node_user} can read and change nothing of this client's"
    )
