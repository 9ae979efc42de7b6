"""What could keep a server or a client from its work, found before it does, with the remedy.

Each check is a function that returns findings; what a check cannot do on this machine is a finding,
too. Nothing is changed.
"""

from __future__ import annotations

import os
import shutil
import socket
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import Literal

import torch

from client.policy import Policy
from client.resident.own import Own
from deploy import gateway
from deploy.certificates import WARN_DAYS, days_left, read_certificate, read_issued, read_key_file
from deploy.client_config import ClientConfig, user_and_group
from deploy.isolation import private_paths, readable
from deploy.keys import Keys
from deploy.lock import holder
from deploy.server import check_certificates, check_port
from deploy.server_config import ServerConfig
from fedgraft.config import Config
from fedgraft.devices import pick_device
from fedgraft.errors import ConfigError, FedGraftError
from fedgraft.logs import hushed
from fedgraft.memory_estimate import advice, estimate
from fedgraft.nodes import nodes_of
from fedgraft.resident_model import resident_model, resident_task
from strategies.fitness import check_rule
from strategies.registry import build_rule

Verdict = Literal["good", "warning", "wrong"]
LEAST_DISK = 2 << 30
"""Bytes: checkpoints, personal state and logs of a run with a 100 MB adapter fit twice."""
MOST_SKEW = 60.0
"""Seconds between two clocks; certificates and signed requests bear no more for long."""
_CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        subject: what was looked at.
        verdict: good, a warning (it works, and may not for long or not safely), or wrong.
        text: what was found.
        remedy: what to do; "" where nothing needs to be done.
    """

    subject: str
    verdict: Verdict
    text: str
    remedy: str = ""


def examine_server(server: ServerConfig, against: Config | None) -> list[Finding]:
    """Look at a server's machine, keys, ports and, with a run's config, base and data."""
    findings = [
        *_tried("nginx", lambda: f"nginx is {gateway.find_nginx()}"),
        *_server_certificates(server),
        *_server_ports(server),
        _disk(server.state),
        *_invited(server),
        _device(against.model.device if against else "auto"),
    ]
    if against is None:
        return [*findings, _without_config()]
    return [
        *findings,
        *_tried("config", lambda: _rule_fits(against)),
        *_work(against, lambda: _held_out(against), None),
    ]


def examine_client(client: ClientConfig, against: Config | None) -> list[Finding]:
    """Look at a client's machine, keys, server, data, base and policy."""
    findings = [
        *_client_certificates(client),
        *_server_reached(client),
        _disk(client.state),
        _device(client.model.device),
        *_tried("policy", lambda: _policy_read(client)),
        _two_users(client),
    ]
    own = _own(client)
    if own is None:
        return findings
    config = against
    if config is None:
        if own.partition is None:
            return [*findings, _without_config()]
        config = Config().with_overrides({"federation.clients": own.partitions})
    else:
        asked = config
        findings += _tried(
            "policy against the config",
            lambda: _policy_allows(client, asked),
            f"Change the run's config, or the clause in {client.policy}.",
        )
    try:
        mine = own.config(config)
    except FedGraftError as error:
        return [*findings, Finding("config", "wrong", error.message, error.remedy)]
    return [*findings, *_work(mine, lambda: _own_data(mine, own), client.policy)]


def _tried(subject: str, look: Callable[[], str], remedy: str = "") -> Iterable[Finding]:
    """Look, and take an error for what is wrong; `remedy` serves one that brings none."""
    try:
        with hushed():
            text = look()
    except FedGraftError as error:
        yield Finding(subject, "wrong", error.message, error.remedy or remedy)
    else:
        yield Finding(subject, "good", text)


def _without_config() -> Finding:
    return Finding(
        "base, memory and data",
        "warning",
        "not looked at: no run's config was named",
        "Name one: --against CONFIG.toml",
    )


# Machine


def _disk(state: Path) -> Finding:
    there = state
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK):
        return Finding(
            "disk", "wrong", f"{there} may not be written to", f"Let it: {_chown(there)}"
        )
    free = shutil.disk_usage(there).free
    text = f"{_size(free)} free where {state} lies"
    if free < LEAST_DISK:
        return Finding("disk", "wrong", text, f"Make room: {_size(LEAST_DISK)} at least.")
    return Finding("disk", "good", text)


def _device(name: str) -> Finding:
    try:
        device = pick_device(name)
    except FedGraftError as error:
        return Finding("GPU", "wrong", error.message, error.remedy)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        text = f"{torch.cuda.get_device_name(device)}, {_size(free)} of {_size(total)} free"
        return Finding("GPU", "good", text)
    return Finding("GPU", "good", f"none is used: the model runs on {device}")


def _work(config: Config, data: Callable[[], str], policy: Path | None) -> Iterable[Finding]:
    """Look at data, memory and base, the quick ones first; the base is loaded."""
    yield from _tried("data", data)
    memory = list(_memory(config))
    yield from memory
    if any(finding.verdict == "wrong" for finding in memory):
        return  # and is not loaded
    listed = "Let model.base name a base of the policy's list, or add this hash to it."
    yield from _tried("base", lambda: _base(config, policy), listed)


def _memory(config: Config) -> Iterable[Finding]:
    try:
        with hushed():
            found = estimate(resident_task(config), config)
    except FedGraftError as error:
        yield Finding("memory", "wrong", error.message, error.remedy)
        return
    if found is None:
        yield Finding("memory", "good", "not estimated: the task brings a small base of its own")
    elif found.fits:
        yield Finding("memory", "good", str(found))
    else:
        yield Finding("memory", "wrong", str(found), advice(found, config))


def _base(config: Config, policy: Path | None) -> str:
    found = resident_model(resident_task(config), config).base_hash
    if policy is not None:
        Policy.load(policy).check_base("here", found)
    return f"its hash is {found}"


def _held_out(config: Config) -> str:
    task = resident_task(config)
    return f"{len(task.validation())} validation examples"


def _own_data(config: Config, own: Own) -> str:
    if own.partition is not None and own.partitions != config.federation.clients:
        raise ConfigError(
            f"the run deals its data to {config.federation.clients} clients (federation.clients), "
            f"and this one holds a part of {own.partitions}",
            "Let federation.clients and partitions in client.toml be the same.",
        )
    task = resident_task(config)
    return f"{len(task.train(own.partition or 0))} training examples"


def _rule_fits(config: Config) -> str:
    check_rule(build_rule(config.strategy.name, config.strategy.options), config)
    return f"{config.strategy.name} can honour it"


# A server


def _server_certificates(server: ServerConfig) -> Iterable[Finding]:
    try:
        keys = Keys(server.keys)
        warnings = check_certificates(keys)
        end = read_certificate(keys.server / "server.crt").not_valid_after_utc.date()
    except FedGraftError as error:
        yield Finding("certificates", "wrong", error.message, error.remedy)
        return
    yield Finding("certificates", "good", f"the server's holds until {end}")
    for text in warnings:
        told, _, remedy = text.partition(" Renew it: ")
        yield Finding("certificates", "warning", told, f"Renew it: {remedy}" if remedy else "")


def _server_ports(server: ServerConfig) -> Iterable[Finding]:
    try:
        pid = holder(server.lock)
    except OSError as error:
        yield Finding("server", "wrong", f"{server.lock}: {error.strerror}", "Run as its user.")
        return
    if pid is None:
        yield Finding("server", "good", "it does not run now")
        for host, port, key in (
            (server.host, server.port, "listen"),
            ("127.0.0.1", server.superlink_port, "superlink-port"),
        ):
            yield from _tried("ports", lambda h=host, p=port, k=key: _free(h, p, k))  # type: ignore[misc]
        return
    yield Finding("server", "good", f"it runs (process {pid})")
    yield from _tried("SuperLink", lambda: _superlink(server))
    host = "127.0.0.1" if server.host in ("0.0.0.0", "::") else server.host
    try:
        socket.create_connection((host, server.port), _CONNECT_SECONDS).close()
    except OSError as error:
        yield Finding(
            "ports", "wrong", f"the gateway does not answer on {server.listen}: {error}",
            f"See {server.log}.",
        )  # fmt: skip
    else:
        yield Finding("ports", "good", f"the gateway answers on {server.listen}")


def _free(host: str, port: int, key: str) -> str:
    check_port(host, port, key)
    return f"{host}:{port} ({key}) is free"


def _superlink(server: ServerConfig) -> str:
    with nodes_of(server.superlink_port, server.keys / "server" / "ca.crt") as nodes:
        online = sum(node.status == "online" for node in nodes.all())
    return f"it answers; {online} clients are online"


def _invited(server: ServerConfig) -> Iterable[Finding]:
    try:
        names = sorted(Keys(server.keys).invited())
    except FedGraftError:
        return  # the certificates' finding says it
    if names:
        yield Finding("clients", "good", f"invited: {', '.join(names)}")
    else:
        yield Finding(
            "clients", "warning", "none is invited",
            f"Invite one: fedgraft keys client NAME --dir {server.keys}",
        )  # fmt: skip


# A client


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
    ask = f"Ask the server's owner: fedgraft keys client {client.client} --renew"
    for name, certificate in (("this client's", issued), ("the CA's", authority)):
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
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        except OSError as error:
            yield Finding("server", "wrong", f"{client.server}: {error}", "Start it there.")
        else:
            yield Finding("server", "good", f"{client.server} answers")
        return
    try:
        context = ssl.create_default_context(cafile=str(client.keys / "ca.crt"))
        context.load_cert_chain(client.keys / "client.crt", client.keys / "client.key")
        asked = datetime.now(UTC)
        connection = HTTPSConnection(host, int(port), timeout=_CONNECT_SECONDS, context=context)
        connection.request("GET", "/")
        answer = connection.getresponse()
        body = answer.read(1000).decode(errors="replace")
        connection.close()
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
    if os.geteuid() != 0:
        return Finding("two users", "warning", "only root can tell what they can read")
    assert client.node_user is not None
    try:
        uid, gid = user_and_group(client.node_user)
        open_to = readable(uid, gid, private_paths(client))
    except FedGraftError as error:
        return Finding("two users", "wrong", error.message, error.remedy)
    if open_to:
        return Finding(
            "two users", "wrong", f"node-user {client.node_user} can read {open_to[0]}",
            f"Take it away: chmod go= {open_to[0]}",
        )  # fmt: skip
    return Finding("two users", "good", f"{client.node_user} can read nothing of this client's")


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _chown(path: Path) -> str:
    return f"chown {os.getuid()} {path}"
