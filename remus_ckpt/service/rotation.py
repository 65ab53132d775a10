"""Changing the CA in three stages, while services run (specs/keys.md §4).

    begin     a new CA; every folder trusts both
    reissue   the new CA issues every certificate anew
    finish    no folder trusts the old CA

A stage that was interrupted is run again: what it has done already, it leaves alone. Between two stages, the user
copies files to the other machines. Which stage has begun is told by the keys in the CA's folder: next-ca-key.pem until
the new CA issues, old-ca-key.pem from then on until the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from remus_ckpt import disk
from remus_ckpt.errors import LinkError
from remus_ckpt.link.revocation import check_lists, is_in, revoked_in
from remus_ckpt.link.rights import EVERYTHING
from remus_ckpt.link.tls import common_name, load_certificates, was_issued_by
from remus_ckpt.service.authority import (
    ISSUED,
    KEY,
    NEXT_KEY,
    OLD_KEY,
    alone_in,
    certificate_of,
    folders_of,
    is_listed,
    key_pem,
    lists_for,
    load_all,
    load_authority,
    load_key,
    make_authority,
    merged,
    pem,
    read_lists,
    renew_lists,
    replace_all,
)
from remus_ckpt.service.keys import CA_DAYS, CERTIFICATE_DAYS, issue_into


@dataclass(frozen=True, slots=True)
class Done:
    """What a stage has done.

    authority: name of the new CA
    changed: files to copy, by folder; those that were as they should be already are among them
    left_out: folders whose certificate is revoked or has expired, and was not issued anew
    """

    authority: str
    changed: tuple[tuple[Path, tuple[str, ...]], ...]
    left_out: tuple[Path, ...] = ()


def stage(directory: str | Path) -> str | None:
    """The stage that was begun last, `begin` or `reissue`; None: no rotation is under way."""
    if (Path(directory) / OLD_KEY).exists():
        return "reissue"
    return "begin" if (Path(directory) / NEXT_KEY).exists() else None


def begin(
    directory: str | Path, *, to: Sequence[str | Path] = (), days: int = CA_DAYS, now: datetime | None = None
) -> Done:
    """Make a new CA, and let every folder trust both: those below the CA's and those in `to`. Raises LinkError."""
    directory, now = Path(directory), now or datetime.now(UTC)
    with alone_in(directory):
        _, trusted = load_authority(directory)
        if (directory / OLD_KEY).exists():
            raise LinkError(f"{directory}: in the rotation under way the new CA issues already: go on with `reissue`")
        if not (directory / NEXT_KEY).exists():
            replace_all({directory / NEXT_KEY: key_pem(ec.generate_private_key(ec.SECP256R1()))})
        key = load_key(directory / NEXT_KEY)
        fresh = certificate_of(key, trusted)
        if fresh is None:
            fresh = make_authority(key, days, now)
            trusted = [*trusted, fresh]
            replace_all({directory / "ca.pem": pem(*trusted)})
        folders = folders_of(directory, [Path(folder) for folder in to])
        lists = []
        if is_listed(directory, folders):
            lists = renew_lists(directory, load_all(directory), folders, now)
            replace_all({directory / "crl.pem": pem(*merged(directory, lists, trusted))})
        plan = {}
        for folder in folders:
            there = list(dict.fromkeys([*load_certificates(folder / "ca.pem"), *trusted]))
            # The list comes first: without it, whatever a CA has issued is refused.
            plan[folder] = lists_for(folder, lists, there, now) | {folder / "ca.pem": pem(*there)}
        for files in plan.values():
            replace_all(files)
    return Done(common_name(fresh.subject), tuple((folder, _names(plan[folder])) for folder in folders))


def reissue(
    directory: str | Path, *, to: Sequence[str | Path] = (), days: int = CERTIFICATE_DAYS, now: datetime | None = None
) -> Done:
    """Let the new CA issue, and issue the certificate of every folder anew: those below the CA's and those in `to`.

    Hosts and rights are kept. A revoked certificate is not issued anew.
    Raises LinkError if a folder does not trust the new CA yet.
    """
    directory, now = Path(directory), now or datetime.now(UTC)
    with alone_in(directory):
        fresh = _fresh(directory)
        folders = folders_of(directory, [Path(folder) for folder in to])
        for folder in folders:
            if fresh not in load_certificates(folder / "ca.pem"):
                raise LinkError(
                    f"{folder / 'ca.pem'} does not hold the new CA yet: run `begin` again, with --to for a folder"
                    f" outside {directory}"
                )
            if lists := read_lists(folder):
                check_lists(folder / "crl.pem", lists, [fresh], now)
        revoked = revoked_in(read_lists(directory))
        _swap_keys(directory)
        changed, left_out = [], []
        for folder in folders:
            certificate = load_certificates(folder / "cert.pem")[0]
            if is_in(revoked, certificate):
                left_out.append(folder)
                continue
            if not was_issued_by(certificate, fresh):
                name = common_name(certificate.subject)
                issue_into(folder, directory, name, (), EVERYTHING, days=days, renew=True, now=now)
            changed.append((folder, ("cert.pem", "key.pem")))
    return Done(common_name(fresh.subject), tuple(changed), tuple(left_out))


def finish(directory: str | Path, *, to: Sequence[str | Path] = (), now: datetime | None = None) -> Done:
    """Take the old CA out of every folder: those below the CA's, those in `to`, and the CA's own.

    Raises LinkError if a certificate of the old CA is still in use, as far as can be known here.
    """
    directory, now = Path(directory), now or datetime.now(UTC)
    with alone_in(directory):
        authority, trusted = load_authority(directory)
        if (directory / NEXT_KEY).exists():
            raise LinkError(f"{directory}: the old CA still issues: run `reissue` first")
        name = common_name(authority.certificate.subject)
        if not (directory / OLD_KEY).exists():
            return Done(name, ())
        old = load_key(directory / OLD_KEY).public_key()
        folders = folders_of(directory, [Path(folder) for folder in to])
        _check_unused(directory, folders, [one for one in trusted if one.public_key() == old], now)
        lists = renew_lists(directory, [authority], folders, now) if is_listed(directory, folders) else []
        plan = {}
        for folder in folders:
            kept = [one for one in load_certificates(folder / "ca.pem") if one.public_key() != old]
            if authority.certificate not in kept:
                raise LinkError(f"{folder / 'ca.pem'} does not hold the new CA: copy it from another folder")
            # A list of a CA that is not trusted does no harm: it goes last.
            plan[folder] = {folder / "ca.pem": pem(*kept)} | lists_for(folder, lists, kept, now)
        for files in plan.values():
            replace_all(files)
        trusted = [one for one in trusted if one.public_key() != old]
        replace_all({directory / "ca.pem": pem(*trusted)})
        if lists:
            replace_all({directory / "crl.pem": pem(*merged(directory, lists, trusted))})
        try:
            (directory / OLD_KEY).unlink()
            disk.sync_directory(directory)
        except OSError as error:
            raise LinkError(f"{directory / OLD_KEY}: {error.strerror}") from error
    alive = [
        folder for folder in folders if was_issued_by(load_certificates(folder / "cert.pem")[0], authority.certificate)
    ]
    left_out = tuple(folder for folder in folders if folder not in alive)
    return Done(name, tuple((folder, _names(plan[folder])) for folder in alive), left_out)


def _names(files: Iterable[Path]) -> tuple[str, ...]:
    return tuple(path.name for path in files)


def _fresh(directory: Path) -> x509.Certificate:
    """The certificate of the new CA. Raises LinkError if no rotation is under way."""
    authority, trusted = load_authority(directory)
    if (directory / NEXT_KEY).exists():
        found = certificate_of(load_key(directory / NEXT_KEY), trusted)
        if found is None:
            raise LinkError(f"{directory}: `begin` was interrupted: run it again")
        return found
    if not (directory / OLD_KEY).exists():
        raise LinkError(f"{directory}: no rotation is under way: run `begin` first")
    return authority.certificate


def _swap_keys(directory: Path) -> None:
    """From here on the new CA issues. At every moment there is a key that issues, and none is lost."""
    if not (directory / NEXT_KEY).exists():
        return
    try:
        replace_all({directory / OLD_KEY: (directory / KEY).read_bytes()})
        os.replace(directory / NEXT_KEY, directory / KEY)
        disk.sync_directory(directory)
    except OSError as error:
        raise LinkError(f"{directory}: {error.strerror}") from error


def _check_unused(directory: Path, folders: Sequence[Path], old: Sequence[x509.Certificate], now: datetime) -> None:
    """Raises LinkError if a certificate of the old CA is in use: in a folder, or issued under a name that has no newer
    one. An expired or revoked one is in nobody's use."""
    revoked = revoked_in(read_lists(directory))

    def is_of_old(one: x509.Certificate) -> bool:
        is_spent = one.not_valid_after_utc < now or is_in(revoked, one)
        return not is_spent and any(was_issued_by(one, authority) for authority in old)

    for folder in folders:
        if is_of_old(load_certificates(folder / "cert.pem")[0]):
            raise LinkError(f"{folder / 'cert.pem'} is still one of the old CA: run `reissue` again")
    path = directory / ISSUED
    newest = {common_name(one.subject): one for one in (load_certificates(path) if path.is_file() else [])}
    for name, one in newest.items():
        if is_of_old(one):
            raise LinkError(
                f"{name!r} has only a certificate of the old CA: issue it anew with"
                f" `remus-ckpt keys issue {directory} {name} --out FOLDER --renew`, or revoke it with"
                f" `remus-ckpt keys revoke {directory} {name}`"
            )
