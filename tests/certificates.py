"""Certificates that `keys` does not make: intermediates, CAs that share a key, any dates."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from ssl import MemoryBIO, SSLWantReadError

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from remus_ckpt.link.tls import TlsFiles

DAY = timedelta(days=1)


class Made:
    """A certificate and its key.

    issuer: another, or None for one that signs itself
    days: (from, to), counted from now
    key: of another, whose key it takes
    uris: further entries of the subjectAltName
    """

    def __init__(
        self,
        name: str,
        issuer: Made | None = None,
        *,
        is_ca: bool = True,
        days: tuple[float, float] = (-1, 100),
        key: Made | None = None,
        uris: Sequence[str] = (),
    ) -> None:
        self.key = key.key if key is not None else ec.generate_private_key(ec.SECP256R1())
        self.subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        by = issuer or self
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.subject)
            .issuer_name(by.subject)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + days[0] * DAY)
            .not_valid_after(now + days[1] * DAY)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.key.public_key()), critical=False)
        )
        if not is_ca:
            hosts: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            hosts += [x509.UniformResourceIdentifier(uri) for uri in uris]
            builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        self.certificate = builder.sign(by.key, hashes.SHA256())

    def revoke(self, *them: Made, days: tuple[float, float] = (-1, 100)) -> bytes:
        """A list of revoked certificates in PEM. days: (from, to), counted from now"""
        now = datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.subject)
            .last_update(now + days[0] * DAY)
            .next_update(now + days[1] * DAY)
        )
        for one in them:
            entry = x509.RevokedCertificateBuilder().serial_number(one.certificate.serial_number).revocation_date(now)
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


def put(folder: Path, trusted: Sequence[Made], chain: Sequence[Made], key: Made | None = None) -> Path:
    """A folder for --tls-dir. key: whose it is, that of the first of the chain where it is not given"""
    folder.mkdir(exist_ok=True)
    (folder / "ca.pem").write_bytes(b"".join(one.pem for one in trusted))
    (folder / "cert.pem").write_bytes(b"".join(one.pem for one in chain))
    (folder / "key.pem").write_bytes((key or chain[0]).key_pem)
    return folder


def shake(server: TlsFiles, client: TlsFiles) -> None:
    """A handshake in memory, for the host 127.0.0.1. Raises ssl.SSLError, on whichever side refuses."""
    up, down = MemoryBIO(), MemoryBIO()
    here = client.client_context().wrap_bio(down, up, server_hostname="127.0.0.1")
    there = server.server_context().wrap_bio(up, down, server_side=True)
    waiting = [here, there, here, there]  # two ways each are enough for TLS 1.3
    for side in waiting:
        try:
            side.do_handshake()
        except SSLWantReadError:
            continue
