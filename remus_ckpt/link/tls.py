"""Who we are and whom we trust: the folder of certificates behind mutual TLS 1.3, and what its errors mean."""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from remus_ckpt.errors import LinkError
from remus_ckpt.link.revocation import REFRESH, Revoked, check_lists, is_in, load_lists, revoked_in

_logger = logging.getLogger("remus_ckpt")

RENEW = "renew it with `remus-ckpt keys issue CA_FOLDER NAME --renew`"
RENEW_CA = "replace it with `remus-ckpt keys rotate CA_FOLDER begin`"

_COPY = "copy it again from where `remus-ckpt keys` made it, or make a new folder with `remus-ckpt keys issue`"


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The result of reading the files once."""

    server: ssl.SSLContext
    client: ssl.SSLContext
    expires: datetime
    authorities: tuple[x509.Certificate, ...]
    revoked: Revoked | None
    """None: there is no crl.pem."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What our files say about a peer's certificate.

    by: the reading of the files on which this is based
    is_ours: whether a CA in ca.pem issued it; None: unknown
    fault: why it may not stay, as the end of a sentence; None if it may
    """

    by: object
    is_ours: bool | None
    fault: str | None


class TlsFiles:
    """The folder that says who we are and whom we trust: ca.pem, cert.pem and key.pem, as `keys issue` makes it.

    directory: the folder
    certificate_name: the name to expect in a server's certificate, if not the host of the address
    ca.pem may hold several CAs, in any order: one that has expired does no harm while a
    good one issued our certificate.
    cert.pem may hold intermediate CAs after our certificate.
    crl.pem, which may be missing, holds the lists of revoked certificates, one of each CA in ca.pem.
    The files are read again when they have changed, so that a renewed certificate needs no restart; while they cannot
    be used, the last good ones stay in use.
    Raises LinkError if a file is missing, expired, damaged, or does not match the others.
    """

    def __init__(self, directory: str | Path, certificate_name: str | None = None) -> None:
        self.directory = Path(directory)
        self.certificate_name = certificate_name
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._loaded = self._load()

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        """Of the CA's certificate, our own, and its key."""
        return self.directory / "ca.pem", self.directory / "cert.pem", self.directory / "key.pem"

    @property
    def _lists_path(self) -> Path:
        return self.directory / "crl.pem"

    def server_context(self) -> ssl.SSLContext:
        """TLS 1.3 for a listener, which demands a certificate of our CA."""
        return self._current().server

    def client_context(self) -> ssl.SSLContext:
        """TLS 1.3 for a client, which checks the CA and the name of the server."""
        return self._current().client

    def expires(self) -> datetime:
        """When the certificate in use expires, or its CA if that is earlier."""
        return self._current().expires

    def judge(self, certificate: bytes, before: Judgement | None = None) -> Judgement:
        """Whether that certificate of a peer, in DER, may stay in a session that it was let into.

        before: the judgement of the same certificate at the handshake, or later
        """
        loaded = self._current()
        if before is not None and before.by is loaded:
            return before
        try:
            found = x509.load_der_x509_certificate(certificate)
        except ValueError:
            return Judgement(loaded, None, "cannot be read")  # OpenSSL has read it and we cannot: no verdict
        is_ours = any(was_issued_by(found, authority) for authority in loaded.authorities)
        if loaded.revoked and is_in(loaded.revoked, found):
            return Judgement(loaded, is_ours, "has been revoked")
        # What an intermediate CA has issued was never one of ours, and stays.
        if before is not None and before.is_ours and not is_ours:
            return Judgement(loaded, before.is_ours, "is from a CA that is no longer trusted")
        return Judgement(loaded, is_ours, None)

    def _stamp(self) -> list[tuple[int, int, int]]:
        stamps = []
        for path in (*self.paths, self._lists_path):
            try:
                status = path.stat()
            except OSError:
                continue  # _load says it better
            stamps.append((status.st_ino, status.st_size, status.st_mtime_ns))
        return stamps

    def _current(self) -> _Loaded:
        with self._lock:
            stamp = self._stamp()
            if stamp != self._seen:
                self._seen = stamp
                try:
                    if self._loaded.revoked is not None and not self._lists_path.exists():
                        # Copying it again may remove it for a moment, in which no revoked peer may get in.
                        raise LinkError(
                            f"{self._lists_path} is gone: after a restart, no certificate counts as revoked"
                        )
                    self._loaded = self._load()
                except (LinkError, OSError) as error:
                    _logger.warning("tls files unusable", extra={"fields": {"reason": str(error)}})
            return self._loaded

    def _load(self) -> _Loaded:
        try:
            return self._read()
        except OSError as error:  # the folder may not be read, or its file system is gone
            raise LinkError(f"{error.filename or self.directory}: {error.strerror}") from error
        except UnsupportedAlgorithm as error:
            raise LinkError(f"{self.directory} holds a key of an unknown kind: {_COPY}") from error

    def _read(self) -> _Loaded:
        """Raises LinkError, OSError, UnsupportedAlgorithm."""
        for path in self.paths:
            if not path.is_file():
                if (self.directory / "ca-key.pem").exists():
                    raise LinkError(
                        f"{self.directory} is the CA's own folder, which must stay with you: name one that "
                        f"`remus-ckpt keys issue {self.directory} NAME` makes, such as {self.directory / 'NAME'}"
                    )
                raise LinkError(
                    f"{path} is missing: `remus-ckpt keys issue` makes a folder with ca.pem, cert.pem and key.pem"
                )
        authority_path, certificate_path, key_path = self.paths
        authorities, chain = load_certificates(authority_path), load_certificates(certificate_path)
        try:
            key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
        except (ValueError, TypeError) as error:
            raise LinkError(f"{key_path} holds no key in PEM, or a damaged or encrypted one: {_COPY}") from error
        if key.public_key() != chain[0].public_key():
            raise LinkError(
                f"{key_path} is not the key of the first certificate in {certificate_path}: take both from one"
                " `keys issue`"
            )
        expires = self._check_times(list(chains(chain, authorities)))
        lists = load_lists(self._lists_path) if self._lists_path.exists() else []
        if lists:
            check_lists(self._lists_path, lists, authorities, datetime.now(UTC))
        server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for context in (server, client):
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.verify_mode = ssl.CERT_REQUIRED
            # Each CA in ca.pem is trusted as it is, whoever issued it.
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            try:
                context.load_verify_locations(
                    cadata=b"".join(one.public_bytes(serialization.Encoding.DER) for one in authorities)
                )
                if lists:
                    context.load_verify_locations(cafile=self._lists_path)
                    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
                context.load_cert_chain(certificate_path, key_path)
            except OSError as error:
                raise LinkError(f"{self.directory}: {error}: make it again with `remus-ckpt keys issue`") from error
        client.hostname_checks_common_name = False
        # Sessions are never resumed; a ticket would be bytes on the wire that no frame accounts for.
        server.num_tickets = 0
        return _Loaded(server, client, expires, tuple(authorities), revoked_in(lists) if lists else None)

    def _check_times(self, found: list[tuple[x509.Certificate, ...]]) -> datetime:
        """When the chain of those found that lasts longest expires. Raises LinkError where none is valid now."""
        authority_path, certificate_path, _ = self.paths
        if not found:
            raise LinkError(
                f"{certificate_path} was not issued by a CA in {authority_path}: take both from one `keys issue`"
            )
        now = datetime.now(UTC)
        good = [ends(chain) for chain in found if starts(chain) <= now <= ends(chain)]
        if good:
            return max(good)
        # The error describes the chain that lasts longest, and our own certificate before its CA's.
        chain = max(found, key=ends)
        for number, certificate in enumerate(chain):
            where = str(authority_path if 0 < number == len(chain) - 1 else certificate_path)
            if number:
                where += f": the CA {common_name(certificate.subject)!r}, which our certificate depends on,"
            if now > certificate.not_valid_after_utc:
                advice = RENEW if number == 0 else RENEW_CA
                raise LinkError(
                    f"{where} has expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: {advice}"
                )
            if now < certificate.not_valid_before_utc:
                raise LinkError(
                    f"{where} is only valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: check the clock"
                )
        raise AssertionError("a chain that is not valid holds a certificate that is not")


def load_certificates(path: Path) -> list[x509.Certificate]:
    """All certificates of a PEM file, in order. Raises LinkError if there is none, or if one cannot be read."""
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise LinkError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise LinkError(f"{path} holds no certificate in PEM, or a damaged one: {_COPY}") from error


def chains(
    presented: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate]
) -> Iterator[tuple[x509.Certificate, ...]]:
    """Every chain from a certificate to a trusted one, whatever the time: (it, its issuer, …, the trusted one).

    presented: the certificate, then possible intermediates, in any order
    authorities: the trusted certificates
    """

    def climb(below: tuple[x509.Certificate, ...]) -> Iterator[tuple[x509.Certificate, ...]]:
        if below[-1] in authorities:
            yield below
            return
        for issuer in dict.fromkeys([*authorities, *presented[1:]]):
            if issuer not in below and was_issued_by(below[-1], issuer):
                yield from climb((*below, issuer))

    return climb((presented[0],))


def starts(chain: Sequence[x509.Certificate]) -> datetime:
    """From when on all of them are valid."""
    return max(certificate.not_valid_before_utc for certificate in chain)


def ends(chain: Sequence[x509.Certificate]) -> datetime:
    """Until when all of them are valid."""
    return min(certificate.not_valid_after_utc for certificate in chain)


def was_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether its issuer's name and signature are those of that CA, whatever the time."""
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception:  # of several kinds, among them one for each kind of key
        return False
    return True


def common_name(name: x509.Name) -> str:
    """The common name, or the whole name if it has none."""
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else name.rfc4514_string()


_REASONS = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate does not pass",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it shows no certificate: it needs --tls-dir, with one from the same CA",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it demands a certificate: give --tls-dir",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know the CA of our certificate: both sides need one from the same CA",
    "TLSV1_ALERT_DECRYPT_ERROR": "it does not accept our certificate: both sides need one from the same CA",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it says that our certificate, or its own crl.pem, has expired: " + RENEW,
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "it says that our certificate has been revoked: " + RENEW,
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it does not accept our certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not accept our certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "our certificate is not of a kind that it accepts",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it does not speak TLS 1.3",
    "UNSUPPORTED_PROTOCOL": "it does not speak TLS 1.3",
    "WRONG_VERSION_NUMBER": "what it sends is not TLS: check that it does not use tcp://, and that the port is "
    "the right one",
    "HTTP_REQUEST": "it sends HTTP, not TLS",
    "UNEXPECTED_EOF_WHILE_READING": "it hung up in the middle of the handshake",
}
"""OpenSSL's name for what went wrong → what that means here."""


def say_tls(error: ssl.SSLError) -> str:
    """What a TLS error means, and what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        advice = ""
        if "mismatch" in error.verify_message:
            advice = (
                ": renew it with that --host and the others (`remus-ckpt keys issue … --renew`), or connect to a name "
                "that it holds"
            )
        elif "CRL" in error.verify_message:
            return f"its certificate cannot be checked: {error.verify_message.rstrip('.')}: in our crl.pem, {REFRESH}"
        elif "revoked" in error.verify_message:
            advice = f": to let that side in again, {RENEW}"
        elif "expired" in error.verify_message:
            advice = f": on that side, {RENEW}; where it is the CA that has expired, {RENEW_CA}"
        elif "not yet valid" in error.verify_message:
            advice = ": check the clocks of both sides"
        elif "issuer" in error.verify_message or "self-signed" in error.verify_message:
            advice = ": both sides need one from the same CA"
        return f"its certificate does not pass: {error.verify_message.rstrip('.')}{advice}"
    reason = error.reason or ""
    return _REASONS.get(reason, f"TLS fails: {reason.lower().replace('_', ' ') or error}")
