"""The folder of a CA: its key, what it signs, and the files that it writes. `keys`, `revocation` and `rotation` use it.

Files are replaced whole and durably, one after another, each set in an order that leaves a usable folder wherever it
is interrupted. Only one command at a time changes a CA's folder.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from remus_ckpt import disk
from remus_ckpt.errors import LinkError
from remus_ckpt.link.revocation import check_lists, issued_by, load_lists
from remus_ckpt.link.tls import load_certificates, was_issued_by

CLOCK_SKEW = timedelta(minutes=5)
"""What is signed is valid from a little before now: the clocks of two machines differ."""
KEY, NEXT_KEY, OLD_KEY = "ca-key.pem", "next-ca-key.pem", "old-ca-key.pem"
"""The key that issues; in a rotation also the new one, until it issues, and from then on the old one."""
ISSUED = "issued.pem"
"""Every certificate that was issued here and has not expired: whoever is to be revoked must be known."""

Lists = list[x509.CertificateRevocationList]


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA whose key is here."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Keep other commands from changing the CA's folder meanwhile. Raises LinkError if one does, or there is none."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise LinkError(f"{directory} holds no CA: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LinkError(f"{directory}: another `remus-ckpt keys` is at work there: try again") from error
        yield
    finally:
        os.close(descriptor)


def load_authority(directory: Path) -> tuple[Authority, list[x509.Certificate]]:
    """The CA that issues, and all certificates in ca.pem. Raises LinkError."""
    path, key_path = directory / "ca.pem", directory / KEY
    if not path.is_file() or not key_path.is_file():
        raise LinkError(f"{directory} holds no CA: make one there with `remus-ckpt keys init {directory}`")
    certificates = load_certificates(path)
    key = load_key(key_path)
    found = certificate_of(key, certificates)
    if found is None:
        raise LinkError(f"{key_path} is not the key of a certificate in {path}")
    return Authority(found, key), certificates


def load_all(directory: Path) -> list[Authority]:
    """Every CA whose key is here: one, and in a rotation two; the one that issues comes first. Raises LinkError."""
    first, certificates = load_authority(directory)
    found = [first]
    for name in (NEXT_KEY, OLD_KEY):
        if (path := directory / name).is_file():
            key = load_key(path)
            certificate = certificate_of(key, certificates)
            if certificate is not None and certificate != first.certificate:
                found.append(Authority(certificate, key))
    return found


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A CA's key. Raises LinkError."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise LinkError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise LinkError(f"{path} holds no key in PEM") from error
    except UnsupportedAlgorithm as error:
        raise LinkError(f"{path} holds a key of an unknown kind ({error}): restore the key of your CA") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise LinkError(f"{path} is no key of an elliptic curve: make a CA with `remus-ckpt keys init`")
    return key


def certificate_of(
    key: ec.EllipticCurvePrivateKey, certificates: Iterable[x509.Certificate]
) -> x509.Certificate | None:
    """The certificate of that key. A CA that was renewed with its old key has several: the one that lasts longest."""
    own = [one for one in certificates if one.public_key() == key.public_key()]
    return max(own, key=lambda one: one.not_valid_after_utc, default=None)


# What it signs


def make_authority(key: ec.EllipticCurvePrivateKey, days: int, now: datetime) -> x509.Certificate:
    """The certificate of a CA with that key."""
    serial = x509.random_serial_number()
    # The serial number makes the name of each CA unique, so that a certificate of another CA is not taken for a broken
    # one.
    name = subject(f"remus-ckpt CA {serial >> 128:08x}")
    return (
        builder(name, name, key.public_key(), serial, days, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage(is_ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    serial: int,
    days: int,
    now: datetime,
    authority: x509.Certificate | None = None,
) -> x509.CertificateBuilder:
    """What every certificate has; with an authority it is valid no longer than that."""
    try:
        expires = now + timedelta(days=days)
    except OverflowError:
        raise LinkError(f"{days} days are more than the calendar has") from None
    starts = now - CLOCK_SKEW
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


def usage(*, is_ca: bool) -> x509.KeyUsage:
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


def identifier_of(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        key = authority.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(key)
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _make_list(
    authority: Authority, revoked: Mapping[int, datetime], number: int, now: datetime
) -> x509.CertificateRevocationList:
    """The list of a CA. It lasts as long as the CA: specs/keys.md §3.2 says why.

    revoked: when, by serial number
    """
    signed = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(max(now - CLOCK_SKEW, authority.certificate.not_valid_before_utc))
        .next_update(authority.certificate.not_valid_after_utc)
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(identifier_of(authority.certificate), critical=False)
    )
    for serial, when in revoked.items():
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when).build()
        signed = signed.add_revoked_certificate(entry)
    return signed.sign(authority.key, hashes.SHA256())


# Folders


def folders_of(directory: Path, to: Sequence[Path] = ()) -> list[Path]:
    """The folders whose certificates this CA issued: those below its own, and those in `to`.

    Raises LinkError if one in `to` is none.
    """
    authorities = load_certificates(directory / "ca.pem")
    found = {}
    for folder in [*sorted(path.parent for path in directory.glob("*/cert.pem")), *to]:
        is_named = folder in to
        if not (folder / "cert.pem").is_file() or not (folder / "ca.pem").is_file():
            if is_named:
                raise LinkError(f"{folder} is no folder made by `remus-ckpt keys issue`")
            continue
        certificate = load_certificates(folder / "cert.pem")[0]
        if any(was_issued_by(certificate, authority) for authority in authorities):
            found[folder.resolve()] = folder
        elif is_named:
            raise LinkError(f"{folder / 'cert.pem'} was not issued by the CA in {directory}")
    return list(found.values())


def read_lists(folder: Path) -> Lists:
    """What crl.pem in a folder holds; nothing where there is none. Raises LinkError."""
    return load_lists(folder / "crl.pem") if (folder / "crl.pem").is_file() else []


def is_listed(directory: Path, folders: Sequence[Path]) -> bool:
    """Whether there is a list of revoked certificates anywhere."""
    return any((folder / "crl.pem").exists() for folder in (directory, *folders))


def renew_lists(
    directory: Path,
    authorities: Sequence[Authority],
    folders: Sequence[Path],
    now: datetime,
    revoke: Sequence[x509.Certificate] = (),
) -> Lists:
    """A new list of each CA: what its lists hold already, in its own folder or in any of these, and what to revoke.

    The other folders count too, for a CA that was restored from a backup may not know what was revoked since. A CA that
    has expired gets none.
    Raises LinkError if the list in the CA's folder cannot be read: a new one would forget what is in it.
    """
    try:
        there = read_lists(directory)
    except LinkError as error:
        raise LinkError(
            f"{directory / 'crl.pem'} is damaged: replace it with the crl.pem of any machine; a new one would forget"
            " what was revoked"
        ) from error
    for folder in folders:
        with suppress(LinkError):  # it is written anew
            there += read_lists(folder)
    made = []
    for authority in authorities:
        if authority.certificate.not_valid_after_utc < now:
            continue
        own = [one for one in there if issued_by(one, authority.certificate)]
        entries = {entry.serial_number: entry.revocation_date_utc for one in own for entry in one}
        for certificate in revoke:
            if was_issued_by(certificate, authority.certificate):
                entries.setdefault(certificate.serial_number, now)
        made.append(_make_list(authority, entries, max(map(_number, own), default=0) + 1, now))
    return made


def _number(one: x509.CertificateRevocationList) -> int:
    try:
        return one.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except x509.ExtensionNotFound:
        return 0


def merged(folder: Path, lists: Lists, trusted: Sequence[x509.Certificate]) -> Lists:
    """These lists, and those that a folder has of other CAs that it trusts."""
    try:
        there = read_lists(folder)
    except LinkError:
        there = []  # it is replaced
    ours = {one.issuer for one in lists}
    return lists + [one for one in there if one.issuer not in ours and any(issued_by(one, ca) for ca in trusted)]


def lists_for(folder: Path, lists: Lists, trusted: Sequence[x509.Certificate], now: datetime) -> dict[Path, bytes]:
    """crl.pem for a folder to connect with; nothing where there are no lists.

    trusted: what the folder's ca.pem holds, or will hold
    Raises LinkError if a CA would be without a list: OpenSSL would then refuse all that it issued.
    """
    if not lists:
        return {}
    path = folder / "crl.pem"
    all_of_them = merged(folder, lists, trusted)
    check_lists(path, all_of_them, trusted, now)
    return {path: pem(*all_of_them)}


def record(directory: Path, certificate: x509.Certificate, now: datetime) -> None:
    """Add a certificate to those that were issued; call this before anybody can have it."""
    path = directory / ISSUED
    there = load_certificates(path) if path.is_file() else []
    replace_all({path: pem(*(one for one in there if one.not_valid_after_utc > now), certificate)})


# Files


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def pem(*them: x509.Certificate | x509.CertificateRevocationList) -> bytes:
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in them)


def write_all(files: Mapping[Path, bytes]) -> None:
    """Write new files, all of them or none: half a set would have to be removed by hand before the next try."""
    written: list[Path] = []
    try:
        for path, data in files.items():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _mode(path))
            written.append(path)
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for folder in dict.fromkeys(path.parent for path in files):
            disk.sync_directory(folder)
    except OSError as error:
        for done in written:
            done.unlink(missing_ok=True)
        raise LinkError(f"{path}: {error.strerror}{disk.what_next(error, 'output')}") from error


def replace_all(files: Mapping[Path, bytes]) -> None:
    """Replace each file whole and durably, one right after the other, in the order given. None is replaced while one
    has no room.

    A reader in between may find files that do not match: `TlsFiles` then keeps what it had, and looks again.
    """
    try:
        with ExitStack() as stack:
            for path, data in reversed(list(files.items())):  # the last to be entered is the first to take its place
                disk.remove_unfinished(path)  # it may hold a key
                descriptor = stack.enter_context(disk.appearing(path))
                disk.write_all(descriptor, [data])
                mode = _mode(path)
                if path.exists():  # whoever can read the old file must be able to read the new one
                    old = path.stat()
                    mode = stat.S_IMODE(old.st_mode)
                    if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                        os.fchown(descriptor, old.st_uid, old.st_gid)
                os.fchmod(descriptor, mode)
    except OSError as error:
        raise LinkError(f"{error.filename or path}: {error.strerror}{disk.what_next(error, 'output')}") from error


def _mode(path: Path) -> int:
    return 0o600 if path.name.endswith("key.pem") else 0o644
