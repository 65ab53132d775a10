"""A small certificate authority for the mutual TLS between primary and backup (specs/keys.md). No network.

    DIR/             0700, made by `init`; stays with the issuer, never on the machines that connect
      ca.pem               the CA's certificate; in a rotation, also that of the other CA
      ca-key.pem     0600  its key: whoever has it can issue certificates. The one file to back up
      issued.pem           the certificates that it issued
      crl.pem              the list of those that it revoked; missing until the first one is
      NAME/          0700  made by `issue`; goes to one machine, and is what --tls-dir takes
        ca.pem             whom to trust
        cert.pem           who this is, for both ends of a connection, and what it may do
        key.pem      0600  its key
        crl.pem            whom not to trust; missing until the first one is revoked

`issue` never overwrites a certificate or a key, except by a renewal. `rotation` changes the CA, `revocation` revokes.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from remus_ckpt.disk import what_next
from remus_ckpt.errors import LinkError
from remus_ckpt.link.revocation import Revoked, is_in, revoked_in
from remus_ckpt.link.rights import EVERYTHING, Rights
from remus_ckpt.link.tls import RENEW_CA, chains, common_name, ends, load_certificates, was_issued_by
from remus_ckpt.service.authority import (
    KEY,
    Lists,
    alone_in,
    builder,
    identifier_of,
    key_pem,
    lists_for,
    load_authority,
    make_authority,
    pem,
    read_lists,
    record,
    replace_all,
    subject,
    usage,
    write_all,
)

CA_DAYS = 3650
CERTIFICATE_DAYS = 825
"""Two and a quarter years: the most that most TLS software accepts."""
SOON_DAYS = 30
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_DNS_NAME = re.compile(
    r"(?=.{1,253}\Z)(?:\*\.)?(?:[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?)"
    r"(?:\.[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?)*"
)


@dataclass(frozen=True, slots=True)
class Certificate:
    """The facts about a certificate on disk."""

    path: Path
    name: str
    hosts: tuple[str, ...]
    """Names and addresses at which it may be reached."""
    issuer: str
    serial: int
    sha256: str
    """Digest of the whole certificate, in hex."""
    starts: datetime
    expires: datetime
    is_ca: bool
    rights: Rights
    is_revoked: bool = False
    in_use: bool = True
    """Whether its folder depends on it. Other CAs in a ca.pem are there for peers whose certificates they issued."""

    def days_left(self, now: datetime) -> float:
        """Days until it expires; negative once it has."""
        return (self.expires - now) / timedelta(days=1)


def init(directory: str | Path, *, days: int = CA_DAYS, now: datetime | None = None) -> Certificate:
    """Make a CA: its certificate and its key.

    directory: created with mode 0700 if it does not exist
    now: the start of the validity
    Raises LinkError if the directory already holds a CA.
    """
    directory = Path(directory)
    path, key_path = directory / "ca.pem", directory / KEY
    _refuse_to_replace(path, key_path)
    _make_private(directory)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = make_authority(key, days, now or datetime.now(UTC))
    write_all({key_path: key_pem(key), path: pem(certificate)})
    return describe(path, certificate)


def issue(
    directory: str | Path,
    name: str,
    *,
    hosts: Sequence[str] = (),
    rights: Rights = EVERYTHING,
    days: int = CERTIFICATE_DAYS,
    out: str | Path | None = None,
    renew: bool = False,
    now: datetime | None = None,
) -> Certificate:
    """Issue a certificate, valid for listening and for connecting, into a folder of its own.

    directory: the CA's folder
    name: of the machine or the service; it becomes the common name
    hosts: DNS names and IP addresses at which it is reached; by default `name` alone
    rights: what its holder may do on a backup; by default everything
    out: the folder; directory/name by default
    renew: replace the certificate and key of that name in the folder; hosts, actions and names of the old certificate
        are kept where no others are given. Running services pick up the new files without a restart. Any CA in this
        CA's ca.pem may have issued the old certificate; if the folder's ca.pem lacks the issuing CA, all CAs of this
        CA's ca.pem are added to it
    If the CA's ca.pem holds several certificates, the one whose key is there issues, and the folder trusts them all.
    The certificate never outlives its CA: its days are cut to those that the CA has left.
    Raises LinkError if there is no CA, or if the folder already holds a certificate; for a renewal, if it holds none of
    that name and those CAs.
    """
    if not _NAME.fullmatch(name):
        raise LinkError(f"{name!r} is no name for a certificate: letters, digits, dots and dashes, 64 at most")
    directory = Path(directory)
    out = Path(out) if out is not None else directory / name
    with alone_in(directory):
        return issue_into(out, directory, name, hosts, rights, days=days, renew=renew, now=now or datetime.now(UTC))


def issue_into(
    out: Path,
    directory: Path,
    name: str,
    hosts: Sequence[str],
    rights: Rights,
    *,
    days: int,
    renew: bool,
    now: datetime,
) -> Certificate:
    """`issue` for whoever is alone in the CA's folder."""
    authority, trusted = load_authority(directory)
    if now > authority.certificate.not_valid_after_utc:
        expired = authority.certificate.not_valid_after_utc
        raise LinkError(f"{directory / 'ca.pem'} has expired at {expired:%Y-%m-%d}: {RENEW_CA}")
    certificate_path, key_path, trusted_path = out / "cert.pem", out / "key.pem", out / "ca.pem"
    if renew:
        old = _find_renewable(certificate_path, name, trusted)
        hosts = hosts or old.hosts
        rights = Rights(rights.actions or old.rights.actions, rights.names or old.rights.names)
    names: list[x509.GeneralName] = [_general_name(host) for host in (hosts or [name])]
    names += [x509.UniformResourceIdentifier(uri) for uri in rights.uris]
    there = load_certificates(trusted_path) if renew and trusted_path.is_file() else []
    # Whom to trust comes first, so that the folder always trusts its own certificate; a list too many does no harm.
    files = {}
    if authority.certificate not in there:
        there = list(dict.fromkeys([*there, *trusted]))
        files = {trusted_path: pem(*there)}
    files = lists_for(out, read_lists(directory), there, now) | files
    if not renew:
        _refuse_to_replace(
            *files,
            certificate_path,
            key_path,
            advice="name another folder, or say --renew to replace certificate and key",
        )
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        builder(
            subject(name),
            authority.certificate.subject,
            key.public_key(),
            x509.random_serial_number(),
            days,
            now,
            authority.certificate,
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage(is_ca=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(identifier_of(authority.certificate), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    files |= {key_path: key_pem(key), certificate_path: pem(certificate)}
    if not renew:
        _make_private(out)
    record(directory, certificate, now)
    (replace_all if renew else write_all)(files)
    return describe(certificate_path, certificate)


def show(directory: str | Path) -> list[Certificate]:
    """Every certificate in a folder: a CA's and all those below it, or the one in an issued folder.

    Raises LinkError if there is none, or if one cannot be read.
    """
    directory = Path(directory)
    authority_path, certificate_path = directory / "ca.pem", directory / "cert.pem"
    authorities = load_certificates(authority_path) if authority_path.is_file() else []
    paths = [certificate_path] if certificate_path.is_file() else []
    if (directory / KEY).is_file():
        in_use = [load_authority(directory)[0].certificate] if authorities else []
        paths += sorted(directory.glob("*/cert.pem"))
    elif paths and (found := list(chains(load_certificates(certificate_path), authorities))):
        in_use = [max(found, key=ends)[-1]]
    else:
        in_use = authorities
    if not authorities and not paths:
        raise LinkError(f"{directory} holds no certificates: make a CA there with `remus-ckpt keys init`")
    lists: Lists = read_lists(directory)
    revoked = revoked_in(lists)
    return [
        *(describe(authority_path, one, in_use=one in in_use) for one in authorities),
        *(describe(path, one, revoked) for path in paths for one in load_certificates(path)),
    ]


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        if not _DNS_NAME.fullmatch(host):
            raise LinkError(f"{host!r} is neither a DNS name nor an IP address") from None
        return x509.DNSName(host)


def describe(
    path: Path, certificate: x509.Certificate, revoked: Revoked = frozenset(), *, in_use: bool = True
) -> Certificate:
    """The facts about a certificate that lies there."""
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = tuple(str(entry.value) for entry in alternatives if isinstance(entry, x509.DNSName | x509.IPAddress))
        rights = Rights.of(alternatives.get_values_for_type(x509.UniformResourceIdentifier))
    except x509.ExtensionNotFound:
        hosts, rights = (), EVERYTHING
    try:
        is_ca = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        is_ca = False
    return Certificate(
        path=path,
        name=common_name(certificate.subject),
        hosts=hosts,
        issuer=common_name(certificate.issuer),
        serial=certificate.serial_number,
        sha256=certificate.fingerprint(hashes.SHA256()).hex(),
        starts=certificate.not_valid_before_utc,
        expires=certificate.not_valid_after_utc,
        is_ca=is_ca,
        rights=rights,
        is_revoked=is_in(revoked, certificate),
        in_use=in_use,
    )


def _refuse_to_replace(*paths: Path, advice: str = "name another folder") -> None:
    for path in paths:
        if os.path.lexists(path):
            raise LinkError(f"{path} is there already, and is not written over: {advice}")


def _find_renewable(path: Path, name: str, authorities: Sequence[x509.Certificate]) -> Certificate:
    """The certificate that a renewal replaces. Raises LinkError if it has another name or CA."""
    if not path.is_file():
        raise LinkError(f"{path} is not there: there is nothing to renew; leave --renew away to issue it")
    certificate = load_certificates(path)[0]
    found = describe(path, certificate)
    if found.name != name:
        raise LinkError(f"{path} is the certificate of {found.name!r}, not of {name!r}")
    if not any(was_issued_by(certificate, authority) for authority in authorities):
        raise LinkError(
            f"{path} was not issued by this CA: take the CA that did, or another folder; `remus-ckpt keys rotate`"
            " changes the CA"
        )
    if found.rights.unknown:
        raise LinkError(f"{path} allows {found.rights}: renew it with the version that issued it")
    return found


def _make_private(directory: Path) -> None:
    # An existing folder may be anything, such as /etc: leave its mode alone, since the key files have their own.
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise LinkError(f"{directory}: {error.strerror}{what_next(error, 'output')}") from error
