"""The federation's own certificate authority: X.509 certificates (RFC 5280) and node keys.

One CA signs the server's certificate and every client's, and nobody else's is accepted. All keys
are EC: P-256 for TLS, and P-384 for the node keys that Flower's SuperNodes sign with.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedgraft.errors import ConfigError
from fedgraft.files import disk_errors

CA_DAYS = 3650
DAYS = 365
"""How long server and client certificates hold, unless told otherwise."""
WARN_DAYS = 30
"""How long before a certificate expires everybody is warned of it."""
_HOST = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_.-]*[a-z0-9])?", re.IGNORECASE)
_SKEW = timedelta(minutes=10)
"""Certificates hold from this long before they are made: clocks differ."""


@dataclass(frozen=True)
class Issued:
    """A certificate with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def write(self, certificate: Path, key: Path) -> None:
        """Write both as PEM files, the key for its owner alone."""
        write_private(key, key_bytes(self.key))
        write_public(certificate, self.certificate.public_bytes(Encoding.PEM))


def make_authority(name: str, days: int = CA_DAYS) -> Issued:
    """Make a certificate authority that may sign end certificates and a revocation list only."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(name)
    builder = _builder(subject, subject, key.public_key(), datetime.now(UTC), days)
    builder = builder.add_extension(x509.BasicConstraints(True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    return Issued(builder.sign(key, hashes.SHA256()), key)


def issue_server(
    authority: Issued, hosts: Sequence[str], days: int = DAYS, now: datetime | None = None
) -> Issued:
    """Issue a server's certificate for names and addresses; the first host is its common name."""
    names = [_host(host) for host in hosts]
    builder, key = _end_certificate(authority, hosts[0], days, now, ExtendedKeyUsageOID.SERVER_AUTH)
    alternatives = x509.SubjectAlternativeName(names)
    builder = builder.add_extension(alternatives, critical=False)
    return Issued(builder.sign(authority.key, hashes.SHA256()), key)


def issue_client(
    authority: Issued, name: str, days: int = DAYS, now: datetime | None = None
) -> Issued:
    """Issue a client's certificate; its common name is the client's name.

    Args:
        authority: who signs it.
        name: the client's.
        days: how long it holds.
        now: when it is made; for tests of expiry.
    """
    builder, key = _end_certificate(authority, name, days, now, ExtendedKeyUsageOID.CLIENT_AUTH)
    return Issued(builder.sign(authority.key, hashes.SHA256()), key)


def revocation_list(authority: Issued, revoked: Iterable[tuple[int, datetime]]) -> bytes:
    """Return a certificate revocation list as PEM.

    It holds as long as the CA does: nginx refuses everybody once a list is out of date, and reads
    this one from its own disk, where it is replaced at every revocation.

    Args:
        authority: who signs it.
        revoked: serial numbers, and when they were revoked.
    """
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(authority.certificate.not_valid_before_utc)
        .next_update(authority.certificate.not_valid_after_utc)
    )
    for serial, when in revoked:
        one = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when)
        builder = builder.add_revoked_certificate(one.build())
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def make_node_key() -> ec.EllipticCurvePrivateKey:
    """Make the key with which a SuperNode signs its requests."""
    return ec.generate_private_key(ec.SECP384R1())


def node_public_text(key: ec.EllipticCurvePrivateKey, name: str) -> str:
    """Return a node's public key as `flwr supernode register` reads it: one line of OpenSSH."""
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return f"{line} {name}"


def node_header(path: Path) -> str:
    """Return what a SuperNode with this private node key says of itself in a header.

    Raises:
        ConfigError: it is missing, may not be read or is no such key.
    """
    try:
        key = load_ssh_private_key(read_key_file(path), None)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is no node key: {error}", _REMEDY) from None
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(public).decode()


def key_bytes(key: ec.EllipticCurvePrivateKey, openssh: bool = False) -> bytes:
    """Return a private key without a passphrase, as PKCS#8 or in OpenSSH's form."""
    form = PrivateFormat.OpenSSH if openssh else PrivateFormat.PKCS8
    return key.private_bytes(Encoding.PEM, form, NoEncryption())


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, from its first byte on."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def write_public(path: Path, content: bytes) -> None:
    """Write a file that everybody may read, whatever the umask."""
    write_private(path, content)
    with disk_errors(path):
        path.chmod(0o644)


def read_certificate(path: Path) -> x509.Certificate:
    """Read a PEM certificate.

    Raises:
        ConfigError: it is missing, may not be read, or is no certificate.
    """
    try:
        return x509.load_pem_x509_certificate(read_key_file(path))
    except ValueError as error:
        raise ConfigError(f"{path} is no certificate: {error}", _REMEDY) from None


def read_issued(certificate: Path, key: Path) -> Issued:
    """Read a certificate with its private key.

    Raises:
        ConfigError: a file is missing, may not be read or is damaged, or they do not belong
            together.
    """
    issued = read_certificate(certificate)
    try:
        private = load_pem_private_key(read_key_file(key), None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key} is no private key: {error}", _REMEDY) from None
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{key} is no EC key", _REMEDY)
    if private.public_key() != issued.public_key():
        raise ConfigError(f"{key} is not the key of {certificate}", _REMEDY)
    return Issued(issued, private)


_REMEDY = "Restore the folder from its backup, or make it anew with fedgraft keys."


def read_key_file(path: Path) -> bytes:
    """Read one file of a folder of keys.

    Raises:
        ConfigError: it is missing or may not be read; the remedy says what to do.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"there is no {path}", _REMEDY) from None
    except PermissionError:
        raise ConfigError(
            f"{path} may not be read by this user",
            f"Run as the folder's owner, or give it to this user: chown -R {os.geteuid()} ...",
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", _REMEDY) from None


def days_left(certificate: x509.Certificate, now: datetime | None = None) -> float:
    """Return how many days a certificate still holds; negative once it has expired."""
    left = certificate.not_valid_after_utc - (now or datetime.now(UTC))
    return left / timedelta(days=1)


def _end_certificate(
    authority: Issued,
    name: str,
    days: int,
    now: datetime | None,
    purpose: x509.ObjectIdentifier,
) -> tuple[x509.CertificateBuilder, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject, issuer = _subject(name[:64]), authority.certificate.subject  # 64: X.520's limit
    builder = _builder(subject, issuer, key.public_key(), now or datetime.now(UTC), days)
    identifier = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    return (
        builder.add_extension(x509.BasicConstraints(False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier.value),
            critical=False,
        ),
        key,
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    days: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    with suppress(UnicodeError):
        name = host.encode("idna").decode()
        if _HOST.fullmatch(name):
            return x509.DNSName(name)
    raise ConfigError(
        f"{host!r} is neither a host's name nor an address", "Write it like fl.example.org."
    )
