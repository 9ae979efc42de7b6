"""A server: SuperLink and gateway under one supervisor, and the checks before they start."""

from __future__ import annotations

import errno
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil

from deploy import gateway
from deploy.admission import Admission, digest
from deploy.certificates import WARN_DAYS, days_left, read_certificate, read_issued, read_key_file
from deploy.keys import Keys
from deploy.lock import only_one
from deploy.merged_log import MergedLog
from deploy.server_config import ServerConfig
from deploy.superlink import superlink
from deploy.supervisor import OWN, Supervisor
from fedgraft.errors import ConfigError, RunError
from fedgraft.files import disk_errors

_ACCESS_LOG_BYTES, _ACCESS_LOGS_KEPT = 100 * 2**20, 5
_DAY = 86400.0
_GRACE_SECONDS = 10.0


def serve(config: ServerConfig, screen: bool = True) -> None:
    """Run a server until SIGTERM or Ctrl-C.

    Args:
        config: what to run.
        screen: whether the log is also shown.

    Raises:
        ConfigError: something it needs is missing, taken, expired or unreadable, or another
            server runs on the same state.
        RunError: a part could not be started.
    """
    keys = Keys(config.keys)
    gateway.find_nginx()
    check_certificates(keys)
    with only_one(config.lock, "server"):
        check_ports(config)
        with disk_errors(config.state):
            config.state.chmod(0o700)  # the database, and what runs leave behind
            gateway.folder_of(config).mkdir(exist_ok=True)
        known = digest(keys)
        gateway.write_config(config, keys)
        log = MergedLog(config.log, screen)
        house = _Housekeeping(config, keys, log, known)
        parts = [superlink(config, keys), gateway.gateway(config)]
        try:
            Supervisor(parts, log, config.parts).run(house.open, house.tick)
        finally:
            house.close()
            log.close()


def check_certificates(keys: Keys) -> list[str]:
    """Check all that a server reads of its keys; return warnings of what expires soon.

    Raises:
        ConfigError: a file is missing, unreadable or damaged, or a certificate does not hold now.
    """
    folder = keys.server
    server = read_issued(folder / "server.crt", folder / "server.key").certificate
    renew = f"fedgraft keys init --dir {keys.folder} --host NAME --renew"
    authority = read_certificate(folder / "ca.crt")
    read_key_file(keys.crl)
    keys.clients()
    warnings = []
    for name, certificate, remedy in (
        ("the server's certificate", server, f"Renew it: {renew}"),
        ("the CA's certificate", authority, "Make new keys for everybody: fedgraft keys init"),
    ):
        end = certificate.not_valid_after_utc.date()
        left = days_left(certificate)
        if left < 0:
            raise ConfigError(f"{name} ({folder}) expired on {end}", remedy)
        if certificate.not_valid_before_utc > datetime.now(UTC):
            raise ConfigError(f"{name} ({folder}) does not hold yet", "Set this machine's clock.")
        if left < WARN_DAYS:
            warnings.append(f"{name} expires on {end}, in {left:.0f} days. {remedy}")
    for client in keys.invited().values():
        left = (client.expires - datetime.now(UTC)).total_seconds() / _DAY
        if left < WARN_DAYS:
            told = f"expires on {client.expires.date()}" if left > 0 else "has expired"
            remedy = f"fedgraft keys client {client.name} --dir {keys.folder} --renew"
            warnings.append(f"the certificate of client {client.name} {told}. Renew it: {remedy}")
    return warnings


def check_ports(config: ServerConfig) -> None:
    """Check that both ports can be listened on.

    Where the last server here was killed, what ends its parts may still be at work: some seconds
    are granted.

    Raises:
        ConfigError: see `check_port`.
    """
    limit = time.monotonic() + (_GRACE_SECONDS if config.parts.exists() else 0.0)
    while True:
        try:
            check_port(config.host, config.port, "listen")
            check_port("127.0.0.1", config.superlink_port, "superlink-port")
            return
        except ConfigError:
            if time.monotonic() >= limit:
                raise
        time.sleep(0.1)


def check_port(host: str, port: int, key: str) -> None:
    """Check that a port can be listened on.

    Raises:
        ConfigError: it is taken (by whom, where that may be known), forbidden, or the address is
            none of this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        remedy = f"Set {key} to another one in the server's config."
        if error.errno == errno.EADDRINUSE:
            remedy = f"Stop what listens there{_who(port)}, or set {key} to another port."
        elif error.errno == errno.EACCES:
            remedy = f"Ports below 1024 are root's: set {key} to a higher one."
        raise ConfigError(
            f"{key}: {host}:{port} cannot be listened on: {error.strerror}", remedy
        ) from None


def _who(port: int) -> str:
    with suppress(psutil.Error, OSError):
        for one in psutil.net_connections("tcp"):
            listens = one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port
            if listens and one.pid:
                return f" (process {one.pid}, {psutil.Process(one.pid).name()})"
    return ""


class _Housekeeping:
    """What a server does beside watching its parts."""

    def __init__(self, config: ServerConfig, keys: Keys, log: MergedLog, known: str) -> None:
        self._config, self._keys, self._log = config, keys, log
        self._admission = Admission(keys, config, self._say, known)
        self._next_check = 0.0  # monotonic seconds

    def open(self) -> None:
        """Settle who is let in, and say that the server is there."""
        self.tick()
        self._say(f"the server is ready: clients reach it on {self._config.listen}")

    def tick(self) -> None:
        """Settle who is let in, warn once a day of what expires, and put large logs aside."""
        self._admission.tick()
        if time.monotonic() >= self._next_check:
            self._next_check = time.monotonic() + _DAY
            self._warn()
        self._put_aside()

    def close(self) -> None:
        """Say in KEYS that no server runs with them any more."""
        self._admission.close()

    def _warn(self) -> None:
        try:
            warnings = check_certificates(self._keys)
        except ConfigError as error:
            warnings = [str(error).replace("\n", ". ")]
        for line in warnings:
            self._say(f"warning: {line}")

    def _put_aside(self) -> None:
        path = self._config.access_log
        with suppress(OSError, RunError):
            if path.stat().st_size < _ACCESS_LOG_BYTES:
                return
            for number in range(_ACCESS_LOGS_KEPT - 1, 0, -1):
                with suppress(FileNotFoundError):
                    _numbered(path, number).replace(_numbered(path, number + 1))
            path.replace(_numbered(path, 1))
            # Not SIGUSR1: on that, workers without root's rights would open the new one themselves.
            gateway.reload(self._config)

    def _say(self, line: str) -> None:
        self._log.write(OWN, line)


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")
