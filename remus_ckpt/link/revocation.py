"""Certificates that their CA has revoked: the lists in crl.pem (RFC 5280, section 5; specs/keys.md §3).

OpenSSL checks the lists at each handshake. `revoked_in` is for connections that are open when a list arrives.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from cryptography import x509

from remus_ckpt.errors import LinkError

REFRESH = "make a new one with `remus-ckpt keys revoke CA_FOLDER`, and copy it to each machine"
Revoked = frozenset[tuple[bytes, int]]
"""Of each revoked certificate: the name of its CA in DER, and its serial number."""

_BEGIN = b"-----BEGIN X509 CRL-----"
_LIST = re.compile(re.escape(_BEGIN) + rb".*?-----END X509 CRL-----", re.DOTALL)


def load_lists(path: Path) -> list[x509.CertificateRevocationList]:
    """All lists of a PEM file. Raises LinkError if there is none, or if one is truncated or cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LinkError(f"{path}: {error.strerror}") from error
    blocks = _LIST.findall(data)
    # OpenSSL would trust a certificate that it finds here.
    if not blocks or len(blocks) != data.count(b"-----BEGIN"):
        raise LinkError(f"{path} does not hold exactly one good list of revoked certificates in PEM: {REFRESH}")
    try:
        lists = [x509.load_pem_x509_crl(block) for block in blocks]
        revoked_in(lists)  # entries are parsed when they are read
    except ValueError as error:
        raise LinkError(f"{path} holds a damaged list of revoked certificates: {REFRESH}") from error
    return lists


def issued_by(one: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    """Whether its issuer's name and signature are those of that CA, whatever the time."""
    try:
        return one.issuer == authority.subject and one.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
    except Exception:  # of several kinds, among them one for each kind of key
        return False


def check_lists(
    path: Path,
    lists: Sequence[x509.CertificateRevocationList],
    authorities: Iterable[x509.Certificate],
    now: datetime,
) -> None:
    """Check that each CA has a valid list; without one, OpenSSL refuses everything that the CA issued.

    A CA that has expired needs none.
    Raises LinkError.
    """
    for authority in authorities:
        if authority.not_valid_after_utc < now:
            continue
        own = [one for one in lists if issued_by(one, authority)]
        name = authority.subject.rfc4514_string()
        if not own:
            raise LinkError(f"{path} holds no list from the CA {name!r}, which ca.pem trusts: {REFRESH}")
        newest = max(own, key=lambda one: one.last_update_utc)
        if newest.next_update_utc is not None and newest.next_update_utc < now:
            raise LinkError(
                f"{path}: the list of the CA {name!r} has expired at {newest.next_update_utc:%Y-%m-%d %H:%M} UTC: "
                + REFRESH
            )
        if newest.last_update_utc > now:
            raise LinkError(
                f"{path}: the list of the CA {name!r} is only valid from {newest.last_update_utc:%Y-%m-%d %H:%M} "
                "UTC: check the clock"
            )


def revoked_in(lists: Iterable[x509.CertificateRevocationList]) -> Revoked:
    """The certificates that the lists revoke."""
    return frozenset((one.issuer.public_bytes(), entry.serial_number) for one in lists for entry in one)


def is_in(revoked: Revoked, certificate: x509.Certificate) -> bool:
    """Whether the lists revoke that certificate."""
    return (certificate.issuer.public_bytes(), certificate.serial_number) in revoked
