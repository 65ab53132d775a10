"""Who we are and whom we trust: the folder of certificates behind mutual TLS 1.3, and what its errors mean."""

from __future__ import annotations

import logging
import ssl
import threading
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from remus_ckpt.errors import LinkError

_logger = logging.getLogger("remus_ckpt")

RENEW = "renew it with `remus-ckpt keys issue CA_FOLDER NAME --renew`"
RENEW_CA = "make a new CA in a new folder with `remus-ckpt keys init`, and issue every certificate again"


class TlsFiles:
    """The folder that says who we are and whom we trust: ca.pem, cert.pem and key.pem, as `keys issue` makes it.

    directory: the folder
    certificate_name: the name to expect in a server's certificate, where it is not the host of the address
    The files are read again when they have changed, so that a renewed certificate needs no restart; while what lies
    there cannot be used, the last good one serves.
    Raises LinkError where a file is missing, expired, or does not fit the others.
    """

    def __init__(self, directory: str | Path, certificate_name: str | None = None) -> None:
        self.directory = Path(directory)
        self.certificate_name = certificate_name
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._contexts = self._load()

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        """Of the CA's certificate, our own, and its key."""
        return self.directory / "ca.pem", self.directory / "cert.pem", self.directory / "key.pem"

    def server_context(self) -> ssl.SSLContext:
        """TLS 1.3 for a listener, which demands a certificate of our CA."""
        return self._current()[0]

    def client_context(self) -> ssl.SSLContext:
        """TLS 1.3 for one who connects, and checks the CA and the name of the server."""
        return self._current()[1]

    def expires(self) -> datetime:
        """When the certificate that serves now, or its CA's, expires."""
        self._current()
        return self._expires

    def _stamp(self) -> list[tuple[int, int, int]]:
        stamps = []
        for path in self.paths:
            try:
                status = path.stat()
            except OSError:
                continue  # _load says it better
            stamps.append((status.st_ino, status.st_size, status.st_mtime_ns))
        return stamps

    def _current(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        with self._lock:
            stamp = self._stamp()
            if stamp != self._seen:
                self._seen = stamp
                try:
                    self._contexts = self._load()
                except LinkError as error:
                    _logger.warning("tls files unusable", extra={"fields": {"reason": str(error)}})
            return self._contexts

    def _load(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        for path in self.paths:
            if not path.is_file():
                if (self.directory / "ca-key.pem").exists():
                    raise LinkError(
                        f"{self.directory} is the folder of the CA, which stays with you: name one that"
                        f" `remus-ckpt keys issue {self.directory} NAME` makes, such as {self.directory / 'NAME'}"
                    )
                raise LinkError(
                    f"{path} is missing: `remus-ckpt keys issue` makes a folder with ca.pem, cert.pem and key.pem"
                )
        authority_path, certificate_path, key_path = self.paths
        try:
            authorities = x509.load_pem_x509_certificates(authority_path.read_bytes())
            chain = x509.load_pem_x509_certificates(certificate_path.read_bytes())
            key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
        except OSError as error:
            raise LinkError(f"{error.filename}: {error.strerror}") from error
        except (ValueError, TypeError) as error:
            raise LinkError(f"{self.directory}: a file holds no PEM, or an encrypted key: {error}") from error
        now = datetime.now(UTC)
        for path, certificate in ((authority_path, authorities[0]), (certificate_path, chain[0])):
            if now > certificate.not_valid_after_utc:
                raise LinkError(
                    f"{path} has expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: "
                    + (RENEW_CA if path == authority_path else RENEW)
                )
            if now < certificate.not_valid_before_utc:
                raise LinkError(
                    f"{path} is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on:"
                    " is the clock right?"
                )
        if key.public_key() != chain[0].public_key():
            raise LinkError(f"{key_path} is not the key of {certificate_path}: take both from one `keys issue`")
        if not any(_is_issued_by(chain[-1], authority) for authority in authorities):
            raise LinkError(f"{certificate_path} was not issued by {authority_path}: take both from one `keys issue`")
        self._expires = min(certificate.not_valid_after_utc for certificate in (chain[0], authorities[0]))
        server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for context in (server, client):
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(cafile=authority_path)
                context.load_cert_chain(certificate_path, key_path)
            except OSError as error:
                raise LinkError(f"{self.directory}: {error}: make it anew with `remus-ckpt keys issue`") from error
        client.hostname_checks_common_name = False
        # Nobody resumes a session here; a ticket would be bytes on the wire that no frame accounts for.
        server.num_tickets = 0
        return server, client


def _is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception:  # of several kinds, among them one for each kind of key
        return certificate == authority
    return True


_REASONS = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate does not pass",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it shows no certificate: it needs --tls-dir, with one of the same CA",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it demands a certificate of us: give --tls-dir",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know the CA of our certificate: both sides need one from the same CA",
    "TLSV1_ALERT_DECRYPT_ERROR": "it does not accept our certificate: both sides need one from the same CA",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it says that our certificate has expired: " + RENEW,
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it does not accept our certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not accept our certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "our certificate is not of a kind that it accepts",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it does not speak TLS 1.3",
    "UNSUPPORTED_PROTOCOL": "it does not speak TLS 1.3",
    "WRONG_VERSION_NUMBER": "what it sends is not TLS: does it use tcp://, or another program's port?",
    "HTTP_REQUEST": "it sends HTTP, not TLS",
    "UNEXPECTED_EOF_WHILE_READING": "it hung up in the middle of the handshake",
}
"""OpenSSL's name of what went wrong → what that means here."""


def say_tls(error: ssl.SSLError) -> str:
    """What an error of TLS means, and what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        advice = ""
        if "mismatch" in error.verify_message:
            advice = (
                ": renew it with that --host and the others (`remus-ckpt keys issue … --renew`), or connect to a name "
                "that it holds"
            )
        elif "expired" in error.verify_message:
            advice = ": on that side, " + RENEW
        elif "issuer" in error.verify_message or "self-signed" in error.verify_message:
            advice = ": both sides need one from the same CA"
        return f"its certificate does not pass: {error.verify_message.rstrip('.')}{advice}"
    reason = error.reason or ""
    return _REASONS.get(reason, f"TLS fails: {reason.lower().replace('_', ' ') or error}")
