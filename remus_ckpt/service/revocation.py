"""Revoking certificates: the lists of a CA, and the folders that they go to (specs/keys.md §3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from remus_ckpt.errors import LinkError
from remus_ckpt.link.tls import common_name, load_certificates, was_issued_by
from remus_ckpt.service.authority import (
    ISSUED,
    alone_in,
    folders_of,
    lists_for,
    load_all,
    merged,
    pem,
    renew_lists,
    replace_all,
)
from remus_ckpt.service.keys import Certificate, describe


@dataclass(frozen=True, slots=True)
class Revocation:
    """What was revoked, and which folders know."""

    revoked: tuple[Certificate, ...]
    written: tuple[Path, ...]
    failed: tuple[tuple[Path, str], ...]
    """Folders whose list could not be written, and why."""


def revoke(
    directory: str | Path,
    what: str | None = None,
    *,
    superseded: bool = False,
    to: Sequence[str | Path] = (),
    now: datetime | None = None,
) -> Revocation:
    """Revoke certificates, and write the new list into the CA's folder, those below it, and those in `to`.

    what: a name, for every certificate that was issued under it, or the path of a certificate or its folder; None
        revokes nothing and writes the list anew
    superseded: only certificates of that name that a renewal has replaced
    Raises LinkError if there is no such certificate; nothing is written then.
    """
    directory, now = Path(directory), now or datetime.now(UTC)
    with alone_in(directory):
        authorities, trusted = load_all(directory), load_certificates(directory / "ca.pem")
        if all(one.certificate.not_valid_after_utc < now for one in authorities):
            raise LinkError(f"{directory / 'ca.pem'} has expired: whatever it issued is refused already")
        folders = folders_of(directory, [Path(folder) for folder in to])
        issuers = [one.certificate for one in authorities]
        found = _find(directory, what, folders, issuers, superseded=superseded) if what is not None else []
        lists = renew_lists(directory, authorities, folders, now, [certificate for _, certificate in found])
        replace_all({directory / "crl.pem": pem(*merged(directory, lists, trusted))})
        written, failed = [], []
        for folder in folders:
            try:
                replace_all(lists_for(folder, lists, load_certificates(folder / "ca.pem"), now))
                written.append(folder)
            except LinkError as error:
                failed.append((folder, str(error)))
    return Revocation(tuple(describe(*one) for one in found), tuple(written), tuple(failed))


def _find(
    directory: Path, what: str, folders: Sequence[Path], issuers: Sequence[x509.Certificate], *, superseded: bool
) -> list[tuple[Path, x509.Certificate]]:
    """The certificates that are meant, and where each lies. Raises LinkError if there is none."""
    issued = directory / ISSUED
    known = [(issued, one) for one in (load_certificates(issued) if issued.is_file() else [])]
    current = [(folder / "cert.pem", load_certificates(folder / "cert.pem")[0]) for folder in folders]

    def is_ours(one: x509.Certificate) -> bool:
        return one not in issuers and any(was_issued_by(one, issuer) for issuer in issuers)

    named = {one: path for path, one in [*known, *current] if common_name(one.subject) == what and is_ours(one)}
    if superseded:
        # The newest stays even where its folder is not known here, and one in a folder even if the newest never came
        # there.
        newest = next((one for _, one in reversed(known) if one in named), None)
        in_use = {one for _, one in current} | {newest}
        named = {one: path for one, path in named.items() if one not in in_use}
        if not named:
            raise LinkError(f"no certificate of {what!r} has been replaced by a renewal")
    if named:
        return [(path, one) for one, path in named.items()]
    path = Path(what)
    if path.is_dir():
        path /= "cert.pem"
    if not path.is_file():
        raise LinkError(f"{what!r} is neither the name of a certificate of the CA in {directory}, nor a file")
    certificate = load_certificates(path)[0]
    if not is_ours(certificate):
        raise LinkError(f"{path} was not issued by the CA in {directory}, which cannot revoke it")
    return [(path, certificate)]
