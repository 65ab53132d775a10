"""A small certificate authority for the mutual TLS between primary and backup. No network.

    DIR/             0700, made by `init`; stays with whoever issues, never on the machines that connect
      ca.pem               the CA's certificate
      ca-key.pem     0600  its key: who has it can issue
      NAME/          0700  made by `issue`; goes to one machine, and is what --tls-dir takes
        ca.pem             whom to trust
        cert.pem           who this is, for both ends of a connection
        key.pem      0600  its key

Files that lie there already are never written over, but by a renewal, which replaces key.pem and cert.pem.
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
from remus_ckpt.service.tls import RENEW_CA

CA_DAYS = 3650
CERTIFICATE_DAYS = 825
"""Two years and a quarter: what most TLS software takes at most."""
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
    """What is to be known of a certificate that lies on disk."""

    path: Path
    name: str
    hosts: tuple[str, ...]
    """Names and addresses under which it may be reached."""
    issuer: str
    serial: int
    sha256: str
    """Of the whole certificate, in hex."""
    starts: datetime
    expires: datetime
    is_ca: bool

    def days_left(self, now: datetime) -> float:
        """Until it expires; negative when it has."""
        return (self.expires - now) / timedelta(days=1)


def init(directory: str | Path, *, days: int = CA_DAYS, now: datetime | None = None) -> Certificate:
    """Make a CA: its certificate and its key.

    directory: made, mode 0700, where it is not there
    now: the instant to count from
    Raises LinkError where a CA is there already.
    """
    directory = Path(directory)
    now = now or datetime.now(UTC)
    certificate_path, key_path = directory / "ca.pem", directory / "ca-key.pem"
    _refuse_to_replace(certificate_path, key_path)
    _make_private(directory)
    key = ec.generate_private_key(ec.SECP256R1())
    serial = x509.random_serial_number()
    # The serial number makes the name of each CA its own, so that a certificate of another is told from a broken one.
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
    """Issue a certificate, good for listening and for connecting, into a folder of its own.

    directory: of the CA
    name: of the machine or the service; it becomes the common name
    hosts: DNS names and IP addresses under which it is reached; `name` alone where there are none
    out: the folder, directory/name where it is not given
    renew: replace certificate and key of that name in the folder; without `hosts`, the new one has those of the old.
        Whoever uses the folder takes them up without a restart
    Its days are cut to those that the CA has left.
    Raises LinkError where there is no CA, or the folder holds a certificate already; where it is to be renewed, if it
    holds none of that name and that CA.
    """
    if not _NAME.fullmatch(name):
        raise LinkError(f"{name!r} is no name for a certificate: letters, digits, dots and dashes, 64 at most")
    directory = Path(directory)
    now = now or datetime.now(UTC)
    out = Path(out) if out is not None else directory / name
    authority, authority_key = _load_authority(directory)
    if now > authority.not_valid_after_utc:
        raise LinkError(f"{directory / 'ca.pem'} has expired at {authority.not_valid_after_utc:%Y-%m-%d}: {RENEW_CA}")
    certificate_path, key_path = out / "cert.pem", out / "key.pem"
    if renew:
        old = _find_renewable(certificate_path, name, authority)
        hosts = hosts or old.hosts
    names = [_general_name(host) for host in (hosts or [name])]
    if not renew:
        _refuse_to_replace(
            certificate_path,
            key_path,
            out / "ca.pem",
            advice="name another folder, or say --renew to replace certificate and key",
        )
        _make_private(out)
    key = ec.generate_private_key(ec.SECP256R1())
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(_subject(name), authority.subject, key.public_key(), x509.random_serial_number(), days, now, authority)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(is_ca=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    files = {key_path: _key_pem(key), certificate_path: _pem(certificate)}
    if renew:
        _replace_all(files)
    else:
        _write_all(files | {out / "ca.pem": _pem(authority)})
    return _describe(certificate_path, certificate)


def show(directory: str | Path) -> list[Certificate]:
    """Every certificate in a folder: of a CA and all that lies below it, or of one that was issued.

    Raises LinkError where there is none, or one cannot be read.
    """
    directory = Path(directory)
    paths = [path for path in (directory / "ca.pem", directory / "cert.pem") if path.is_file()]
    if (directory / "ca-key.pem").is_file():
        paths += sorted(directory.glob("*/cert.pem"))
    if not paths:
        raise LinkError(f"{directory} holds no certificates: make a CA there with `remus-ckpt keys init`")
    return [_describe(path, _load(path)) for path in paths]


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


def _load(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise LinkError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise LinkError(f"{path} holds no certificate in PEM") from error


def _load_authority(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate_path, key_path = directory / "ca.pem", directory / "ca-key.pem"
    if not certificate_path.is_file() or not key_path.is_file():
        raise LinkError(f"{directory} holds no CA: make one there with `remus-ckpt keys init {directory}`")
    certificate = _load(certificate_path)
    try:
        key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
    except OSError as error:
        raise LinkError(f"{key_path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise LinkError(f"{key_path} holds no key in PEM") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise LinkError(f"{key_path} is not the key of {certificate_path}")
    return certificate, key


def _describe(path: Path, certificate: x509.Certificate) -> Certificate:
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
        name=_common_name(certificate.subject),
        hosts=hosts,
        issuer=_common_name(certificate.issuer),
        serial=certificate.serial_number,
        sha256=certificate.fingerprint(hashes.SHA256()).hex(),
        starts=certificate.not_valid_before_utc,
        expires=certificate.not_valid_after_utc,
        is_ca=is_ca,
    )


def _common_name(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else name.rfc4514_string()


def _refuse_to_replace(*paths: Path, advice: str = "name another folder") -> None:
    for path in paths:
        if os.path.lexists(path):
            raise LinkError(f"{path} is there already, and is not written over: {advice}")


def _find_renewable(path: Path, name: str, authority: x509.Certificate) -> Certificate:
    """The certificate that a renewal replaces. Raises LinkError for one that is not of that name and CA."""
    if not path.is_file():
        raise LinkError(f"{path} is not there: there is nothing to renew; leave --renew away to issue it")
    certificate = _load(path)
    found = _describe(path, certificate)
    if found.name != name:
        raise LinkError(f"{path} is the certificate of {found.name!r}, not of {name!r}")
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception:  # of several kinds, among them one for each kind of key
        raise LinkError(f"{path} was not issued by this CA: take the CA that did, or another folder") from None
    return found


def _make_private(directory: Path) -> None:
    # One that is there may be anything, such as /etc: its mode is left alone, since the keys have their own.
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise LinkError(f"{directory}: {error.strerror}") from error


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write_all(files: dict[Path, bytes]) -> None:
    """All of them or none: half a set would have to be removed by hand before the next try."""
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
    """Each in one step, one right behind the other: who reads between them finds a pair that does not fit.

    `TlsFiles` keeps the old pair then, and looks again for the next connection.
    """
    fresh = {path.with_name(f".new-{path.name}"): data for path, data in files.items()}
    for path in fresh:
        path.unlink(missing_ok=True)  # of a renewal that was killed
    _write_all(fresh)
    try:
        for new, path in zip(fresh, files, strict=True):
            if path.exists():  # whoever may read it now must be able to read the next one
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
