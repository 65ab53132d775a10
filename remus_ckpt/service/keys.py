"""A small certificate authority for the mutual TLS between primary and backup. No network.

    DIR/             0700, made by `init`; stays with the issuer, never on the machines that connect
      ca.pem               the CA's certificate
      ca-key.pem     0600  its key: whoever has it can issue certificates
      NAME/          0700  made by `issue`; goes to one machine, and is what --tls-dir takes
        ca.pem             whom to trust
        cert.pem           who this is, for both ends of a connection
        key.pem      0600  its key

Existing files are never overwritten, except by a renewal, which replaces key.pem and cert.pem.

To change the CA, work in steps: put the certificates of the old and the new CA, in any order, into every ca.pem in use
and into the ca.pem of the new CA's folder; renew each certificate from that folder; finally remove the old CA.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from remus_ckpt.errors import LinkError
from remus_ckpt.link.tls import RENEW_CA, chains, common_name, ends, load_certificates, was_issued_by

CA_DAYS = 3650
CERTIFICATE_DAYS = 825
"""Two and a quarter years: the most that most TLS software accepts."""
SOON_DAYS = 30
_CLOCK_SKEW = timedelta(minutes=5)
"""A certificate is valid from a little before now: the clocks of two machines differ."""
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
    now = now or datetime.now(UTC)
    certificate_path, key_path = directory / "ca.pem", directory / "ca-key.pem"
    _refuse_to_replace(certificate_path, key_path)
    _make_private(directory)
    key = ec.generate_private_key(ec.SECP256R1())
    serial = x509.random_serial_number()
    # The serial number makes the name of each CA unique, so that a certificate of another CA is not taken for a broken
    # one.
    name = _subject(f"remus-ckpt CA {serial >> 128:08x}")
    certificate = (
        _builder(name, name, key.public_key(), serial, days, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(is_ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_all({key_path: _key_pem(key), certificate_path: _pem(certificate)})
    return _describe(certificate_path, certificate)


def issue(
    directory: str | Path,
    name: str,
    *,
    hosts: Sequence[str] = (),
    days: int = CERTIFICATE_DAYS,
    out: str | Path | None = None,
    renew: bool = False,
    now: datetime | None = None,
) -> Certificate:
    """Issue a certificate, valid for listening and for connecting, into a folder of its own.

    directory: the CA's folder
    name: of the machine or the service; it becomes the common name
    hosts: DNS names and IP addresses at which it is reached; by default `name` alone
    out: the folder; directory/name by default
    renew: replace the certificate and key of that name in the folder; without `hosts`, the old certificate's hosts are
        kept. Running services pick up the new files without a restart. Any CA in this CA's ca.pem may have issued the
        old certificate; if the folder's ca.pem lacks the issuing CA, all CAs of this CA's ca.pem are added to it
    If the CA's ca.pem holds several certificates, the one whose key is there issues, and the folder trusts them all.
    The certificate never outlives its CA: its days are cut to those that the CA has left.
    Raises LinkError if there is no CA, or if the folder already holds a certificate; for a renewal, if it holds none of
    that name and those CAs.
    """
    if not _NAME.fullmatch(name):
        raise LinkError(f"{name!r} is no name for a certificate: letters, digits, dots and dashes, 64 at most")
    directory = Path(directory)
    now = now or datetime.now(UTC)
    out = Path(out) if out is not None else directory / name
    authority, authority_key, trusted = _load_authority(directory)
    if now > authority.not_valid_after_utc:
        raise LinkError(f"{directory / 'ca.pem'} has expired at {authority.not_valid_after_utc:%Y-%m-%d}: {RENEW_CA}")
    certificate_path, key_path, trusted_path = out / "cert.pem", out / "key.pem", out / "ca.pem"
    if renew:
        old = _find_renewable(certificate_path, name, trusted)
        hosts = hosts or old.hosts
    names = [_general_name(host) for host in (hosts or [name])]
    if not renew:
        _refuse_to_replace(
            certificate_path,
            key_path,
            trusted_path,
            advice="name another folder, or say --renew to replace certificate and key",
        )
        _make_private(out)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(_subject(name), authority.subject, key.public_key(), x509.random_serial_number(), days, now, authority)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(is_ca=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_identifier_of(authority), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    files = {key_path: _key_pem(key), certificate_path: _pem(certificate)}
    if renew:
        there = load_certificates(trusted_path) if trusted_path.is_file() else []
        if authority not in there:  # first, so that the folder always trusts its own certificate
            files = {trusted_path: _pem(*dict.fromkeys([*there, *trusted]))} | files
        _replace_all(files)
    else:
        _write_all(files | {trusted_path: _pem(*trusted)})
    return _describe(certificate_path, certificate)


def show(directory: str | Path) -> list[Certificate]:
    """Every certificate in a folder: a CA's and all those below it, or the one in an issued folder.

    Raises LinkError if there is none, or if one cannot be read.
    """
    directory = Path(directory)
    authority_path, certificate_path = directory / "ca.pem", directory / "cert.pem"
    authorities = load_certificates(authority_path) if authority_path.is_file() else []
    paths = [certificate_path] if certificate_path.is_file() else []
    if (directory / "ca-key.pem").is_file():
        in_use = [_load_authority(directory)[0]] if authorities else []
        paths += sorted(directory.glob("*/cert.pem"))
    elif paths and (found := list(chains(load_certificates(certificate_path), authorities))):
        in_use = [max(found, key=ends)[-1]]
    else:
        in_use = authorities
    if not authorities and not paths:
        raise LinkError(f"{directory} holds no certificates: make a CA there with `remus-ckpt keys init`")
    return [
        *(_describe(authority_path, one, in_use=one in in_use) for one in authorities),
        *(_describe(path, one) for path in paths for one in load_certificates(path)),
    ]


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    serial: int,
    days: int,
    now: datetime,
    authority: x509.Certificate | None = None,
) -> x509.CertificateBuilder:
    try:
        expires = now + timedelta(days=days)
    except OverflowError:
        raise LinkError(f"{days} days are more than the calendar has") from None
    starts = now - _CLOCK_SKEW
    if authority is not None:
        starts, expires = (
            max(starts, authority.not_valid_before_utc),
            min(expires, authority.not_valid_after_utc),
        )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(starts)
        .not_valid_after(expires)
    )


def _usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        if not _DNS_NAME.fullmatch(host):
            raise LinkError(f"{host!r} is neither a DNS name nor an IP address") from None
        return x509.DNSName(host)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _load_authority(
    directory: Path,
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey, list[x509.Certificate]]:
    """The certificate that issues, its key, and all certificates in ca.pem."""
    certificate_path, key_path = directory / "ca.pem", directory / "ca-key.pem"
    if not certificate_path.is_file() or not key_path.is_file():
        raise LinkError(f"{directory} holds no CA: make one there with `remus-ckpt keys init {directory}`")
    certificates = load_certificates(certificate_path)
    try:
        key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
    except OSError as error:
        raise LinkError(f"{key_path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise LinkError(f"{key_path} holds no key in PEM") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise LinkError(f"{key_path} is no key of an elliptic curve: make a CA with `remus-ckpt keys init`")
    # A CA that was renewed with its old key has several certificates.
    own = [one for one in certificates if one.public_key() == key.public_key()]
    if not own:
        raise LinkError(f"{key_path} is not the key of a certificate in {certificate_path}")
    return max(own, key=lambda one: one.not_valid_after_utc), key, certificates


def _identifier_of(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        key = authority.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(key)
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _describe(path: Path, certificate: x509.Certificate, *, in_use: bool = True) -> Certificate:
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = tuple(str(entry.value) for entry in alternatives if isinstance(entry, x509.DNSName | x509.IPAddress))
    except x509.ExtensionNotFound:
        hosts = ()
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
    found = _describe(path, certificate)
    if found.name != name:
        raise LinkError(f"{path} is the certificate of {found.name!r}, not of {name!r}")
    if not any(was_issued_by(certificate, authority) for authority in authorities):
        raise LinkError(
            f"{path} was not issued by this CA: take the CA that did, or another folder; to change the CA, add the"
            " old one's certificate to the new one's ca.pem first"
        )
    return found


def _make_private(directory: Path) -> None:
    # An existing folder may be anything, such as /etc: leave its mode alone, since the key files have their own.
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise LinkError(f"{directory}: {error.strerror}") from error


def _pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)


def _write_all(files: dict[Path, bytes]) -> None:
    """Write all of them or none: half a set would have to be removed by hand before the next try."""
    written: list[Path] = []
    try:
        for path, data in files.items():
            mode = 0o600 if path.name.endswith("key.pem") else 0o644
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            written.append(path)
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        for done in written:
            done.unlink(missing_ok=True)
        raise LinkError(f"{path}: {error.strerror}") from error


def _replace_all(files: dict[Path, bytes]) -> None:
    """Replace each file atomically, one right after the other. A reader in between finds a key and a certificate that
    do not match.

    `TlsFiles` then keeps the old pair, and looks again at the next connection.
    """
    fresh = {path.with_name(f".new-{path.name}"): data for path, data in files.items()}
    for path in fresh:
        path.unlink(missing_ok=True)  # left by a renewal that was killed
    _write_all(fresh)
    try:
        for new, path in zip(fresh, files, strict=True):
            if path.exists():  # whoever can read the old file must be able to read the new one
                old = path.stat()
                if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                    os.chown(new, old.st_uid, old.st_gid)
                new.chmod(stat.S_IMODE(old.st_mode))
        for new, path in zip(fresh, files, strict=True):
            new.replace(path)
    except OSError as error:
        for new in fresh:
            new.unlink(missing_ok=True)
        raise LinkError(f"{path}: {error.strerror}") from error
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
