"""Certificates, checked by OpenSSL's own handshake and path validation."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from deploy.certificates import (
    Issued,
    days_left,
    issue_client,
    issue_server,
    make_authority,
    read_certificate,
    read_issued,
    revocation_list,
    write_private,
)
from fedgraft.errors import ConfigError


@pytest.fixture(scope="module")
def authority() -> Issued:
    return make_authority("CA of a test")


def handshake(
    folder: Path,
    server: Issued,
    client: Issued | None,
    trusted: Issued,
    host: str = "localhost",
    crl: bytes | None = None,
) -> str:
    """Shake hands in memory and return the client's name as the server sees it."""
    names = {"server": server, "client": client, "ca": trusted}
    for name, issued in names.items():
        if issued is not None:
            issued.write(folder / f"{name}.crt", folder / f"{name}.key")
    below = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    below.load_cert_chain(folder / "server.crt", folder / "server.key")
    below.load_verify_locations(folder / "ca.crt")
    below.verify_mode = ssl.CERT_REQUIRED
    above = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    # what Python 3.13 asks for by default
    below.verify_flags |= ssl.VERIFY_X509_STRICT
    above.verify_flags |= ssl.VERIFY_X509_STRICT
    if crl is not None:
        (folder / "crl.pem").write_bytes(crl)
        below.load_verify_locations(folder / "crl.pem")
        below.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    if client is not None:
        above.load_cert_chain(folder / "client.crt", folder / "client.key")
    a, b = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = below.wrap_bio(a, b, server_side=True)
    two = above.wrap_bio(b, a, server_hostname=host)
    done = set()
    while len(done) < 2:
        for side in (two, one):
            try:
                side.do_handshake()
                done.add(side)
            except ssl.SSLWantReadError:
                pass
    (pair,) = one.getpeercert()["subject"]
    return pair[0][1]


def test_a_client_is_who_its_certificate_says(tmp_path: Path, authority: Issued):
    server = issue_server(authority, ["fl.example.org", "10.0.0.7", "localhost"])
    client = issue_client(authority, "hospital-1")
    for host in ("fl.example.org", "10.0.0.7", "localhost"):
        assert handshake(tmp_path, server, client, authority, host) == "hospital-1"
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(tmp_path, server, client, authority, "elsewhere.org")


def test_what_openssl_refuses(tmp_path: Path, authority: Issued):
    server = issue_server(authority, ["localhost"])
    client = issue_client(authority, "a")
    stranger = issue_client(make_authority("CA of a test"), "a")  # the same name even
    with pytest.raises(ssl.SSLError, match="certificate verify failed"):
        handshake(tmp_path, server, stranger, authority)
    with pytest.raises(ssl.SSLError, match="peer did not return a certificate"):
        handshake(tmp_path, server, None, authority)
    old = issue_client(authority, "a", days=1, now=datetime.now(UTC) - timedelta(days=2))
    with pytest.raises(ssl.SSLError, match="certificate has expired"):
        handshake(tmp_path, server, old, authority)
    serial = client.certificate.serial_number
    empty = revocation_list(authority, [])
    assert handshake(tmp_path, server, client, authority, crl=empty) == "a"
    with pytest.raises(ssl.SSLError, match="certificate revoked"):
        crl = revocation_list(authority, [(serial, datetime.now(UTC))])
        handshake(tmp_path, server, client, authority, crl=crl)


def test_neither_side_may_play_the_other_or_the_authority(tmp_path: Path, authority: Issued):
    server, client = issue_server(authority, ["localhost"]), issue_client(authority, "a")
    with pytest.raises(ssl.SSLError, match="unsuitable certificate purpose"):
        handshake(tmp_path, server, server, authority)
    with pytest.raises(ssl.SSLError, match="unsuitable certificate purpose"):
        handshake(tmp_path, client, client, authority)
    forged = issue_client(Issued(client.certificate, client.key), "b")
    with pytest.raises(ssl.SSLError, match="certificate verify failed"):
        handshake(tmp_path, server, forged, authority)


def test_days_and_serial_numbers(authority: Issued):
    now = datetime(2026, 1, 1, tzinfo=UTC)
    one = issue_client(authority, "a", days=90, now=now).certificate
    assert days_left(one, now) == 90.0
    assert days_left(one, now + timedelta(days=91)) == -1.0
    assert one.not_valid_before_utc == now - timedelta(minutes=10)
    other = issue_client(authority, "a", days=90, now=now).certificate
    assert one.serial_number != other.serial_number


def test_a_host_that_is_none_is_refused(authority: Issued):
    for host in ("a..b", "bad host!", ""):
        with pytest.raises(ConfigError, match="neither a host's name nor an address"):
            issue_server(authority, [host])
    long = issue_server(authority, [f"{'a' * 60}.example.org"]).certificate
    names = long.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [f"{'a' * 60}.example.org"]


def test_a_private_file_is_never_open_to_others(tmp_path: Path):
    path = tmp_path / "folder" / "key"
    write_private(path, b"one")
    path.chmod(0o644)
    write_private(path, b"two")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"two", 0o600)
    assert [p.name for p in path.parent.iterdir()] == ["key"]


def test_damaged_files_are_named(tmp_path: Path, authority: Issued):
    certificate, key = tmp_path / "c.crt", tmp_path / "c.key"
    issue_client(authority, "a").write(certificate, key)
    assert read_issued(certificate, key).certificate == read_certificate(certificate)
    other = issue_client(authority, "a")
    other.write(tmp_path / "d.crt", tmp_path / "d.key")
    with pytest.raises(ConfigError, match=r"d\.key is not the key of .*c\.crt"):
        read_issued(certificate, tmp_path / "d.key")
    certificate.write_text("x")
    with pytest.raises(ConfigError, match=r"c\.crt is no certificate"):
        read_certificate(certificate)
    with pytest.raises(ConfigError, match="there is no"):
        read_certificate(tmp_path / "none.crt")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory") as caught:
        read_certificate(tmp_path)
    assert "backup" in caught.value.remedy
    key.write_text("x")
    with pytest.raises(ConfigError, match=r"c\.key is no private key"):
        read_issued(tmp_path / "d.crt", key)
    assert isinstance(other.key, ec.EllipticCurvePrivateKey)
