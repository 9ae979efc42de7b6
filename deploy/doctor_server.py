"""What could keep a server from its work, found before it does, with the remedy."""

from __future__ import annotations

import socket
from collections.abc import Iterable

from deploy import gateway
from deploy.certificates import read_certificate
from deploy.findings import CONNECT_SECONDS, Finding, device, disk, tried, without_config, work
from deploy.keys import Keys
from deploy.lock import holder
from deploy.server import check_certificates, check_port
from deploy.server_config import ServerConfig
from fedgraft.config import Config
from fedgraft.errors import FedGraftError
from fedgraft.nodes import nodes_of
from fedgraft.resident_model import resident_task
from strategies.fitness import check_rule
from strategies.registry import build_rule


def examine_server(server: ServerConfig, against: Config | None) -> list[Finding]:
    """Look at a server's machine, keys, ports and, with a run's config, base and data."""
    findings = [
        *tried("nginx", lambda: f"nginx is {gateway.find_nginx()}"),
        *_server_certificates(server),
        *_server_ports(server),
        disk(server.state),
        *_invited(server),
        device(against.model.device if against else "auto"),
    ]
    if against is None:
        return [*findings, without_config()]
    return [
        *findings,
        *tried("config", lambda: _rule_fits(against)),
        *work(against, lambda: _held_out(against), None),
    ]


def _held_out(config: Config) -> str:
    task = resident_task(config)
    return f"{len(task.validation())} validation examples"


def _rule_fits(config: Config) -> str:
    check_rule(build_rule(config.strategy.name, config.strategy.options), config)
    return f"{config.strategy.name} can honour it"


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
            yield from tried("ports", lambda h=host, p=port, k=key: _free(h, p, k))  # type: ignore[misc]
        return
    yield Finding("server", "good", f"it runs (process {pid})")
    yield from tried("SuperLink", lambda: _superlink(server))
    host = "127.0.0.1" if server.host in ("0.0.0.0", "::") else server.host
    try:
        socket.create_connection((host, server.port), CONNECT_SECONDS).close()
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
