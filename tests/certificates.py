"""Certificates that `keys` does not make: intermediates, CAs that share a key, any dates."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = timedelta(days=1)


class Made:
    """A certificate and its key.

    issuer: another, or None for one that signs itself
    days: (from, to), counted from now
    key: of another, whose key it takes
    """

    def __init__(
        self,
        name: str,
        issuer: Made | None = None,
        *,
        is_ca: bool = True,
        days: tuple[float, float] = (-1, 100),
        key: Made | None = None,
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
            hosts = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        self.certificate = builder.sign(by.key, hashes.SHA256())

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
