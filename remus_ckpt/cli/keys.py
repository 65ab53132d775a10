"""The commands for keys: a small CA for mutual TLS."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from remus_ckpt.cli.options import AsJson, app, print_json
from remus_ckpt.cli.terminal import complain, out

if TYPE_CHECKING:
    from remus_ckpt.service.keys import Certificate
    from remus_ckpt.service.rotation import Done

keys_app = typer.Typer(no_args_is_help=True, help="Make, show, replace and revoke TLS keys.", rich_markup_mode=None)
app.add_typer(keys_app, name="keys")

MAX_DAYS = 36_500
Authority = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the authority.")]
Folders = Annotated[
    list[Path] | None,
    typer.Option("--to", metavar="DIR", help="A folder made by `keys issue` outside DIR. Repeatable."),
]


@keys_app.command(short_help="Make a certificate authority.")
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the authority. Keep it to yourself.")],
    days: Annotated[
        int | None, typer.Option(metavar="DAYS", min=1, max=MAX_DAYS, help="Days until it expires. [default: 3650]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a certificate authority: ca.pem, and ca-key.pem, which signs certificates. Back up both, and keep ca-key.pem
    off the machines that connect.

    Example: remus-ckpt keys init keys/
    """
    from remus_ckpt.service import keys

    _report(keys.init(directory, days=days or keys.CA_DAYS), as_json)


@keys_app.command(short_help="Issue a certificate for one machine.")
def issue(
    directory: Authority,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the machine or service.")],
    hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            metavar="HOST",
            help="Host name or address of the machine. Repeatable. [default: NAME, or the old hosts with --renew]",
        ),
    ] = None,
    may: Annotated[
        list[str] | None,
        typer.Option(
            "--may",
            metavar="[protect|read|failover]",
            help="What it may do on a backup: protect memory, read checkpoints over the network, or order a failover. "
            "Repeatable. [default: everything, or as before with --renew]",
        ),
    ] = None,
    for_names: Annotated[
        list[str] | None,
        typer.Option(
            "--for-name",
            metavar="NAME",
            help="Name of the protected memory that this is for. Repeatable. [default: any, or as before with --renew]",
        ),
    ] = None,
    days: Annotated[
        int | None, typer.Option(metavar="DAYS", min=1, max=MAX_DAYS, help="Days until it expires. [default: 825]")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for the certificate. [default: DIR/NAME]")
    ] = None,
    renew: Annotated[
        bool, typer.Option("--renew", help="Replace the existing certificate and key; services may keep running.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Issue a certificate for one machine. Copy its folder there and pass it to --tls-dir.

    A running backup or primary uses a renewed certificate from its next connection on, without a restart. Every
    certificate may ask a backup for its status.

    Example: remus-ckpt keys issue keys/ backup --host backup.example.net --host 10.0.0.7

    Example: remus-ckpt keys issue keys/ orders --may protect --for-name orders
    """
    from remus_ckpt.link.rights import Rights
    from remus_ckpt.service import keys

    days = days or keys.CERTIFICATE_DAYS
    try:
        rights = Rights.limited(may or (), for_names or ())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    issued = keys.issue(
        directory,
        name,
        hosts=hosts or (),
        rights=rights,
        days=days,
        out=folder,
        renew=renew,
    )
    _report(issued, as_json)


@keys_app.command(short_help="List certificates and when they expire.")
def show(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of an authority, or of one machine.")],
    as_json: AsJson = False,
) -> None:
    """List the certificates in a folder, what they may do, and when they expire. Exits with 1 if one in use has expired
    or, in a machine's folder, has been revoked.

    If ca.pem holds several CAs, only one counts as in use: in an authority's folder the CA that signs new certificates,
    in a machine's folder the CA that signed its certificate.

    Example: remus-ckpt keys show keys/
    """
    from remus_ckpt.service import keys

    found = keys.show(directory)
    now = datetime.now(UTC)
    if as_json:
        print_json([_row(certificate) | {"days_left": round(certificate.days_left(now), 2)} for certificate in found])
    else:
        issuers = {certificate.name for certificate in found if certificate.is_ca}
        for certificate in found:
            hosts = f" ({' '.join(certificate.hosts)})" if certificate.hosts else ""
            until = f"{_say_left(certificate.days_left(now))} ({certificate.expires:%Y-%m-%d})"
            limits = _say_limits(certificate)
            if certificate.issuer not in issuers:
                limits += "; not issued by a CA in ca.pem"
            out.print(Text(f"{certificate.path}: {certificate.name}{hosts}, {until}{limits}"))
    is_authority = (directory / "ca-key.pem").is_file()
    for certificate in found:
        left = certificate.days_left(now)
        if certificate.is_revoked:
            complain(f"{certificate.path} has been revoked: {_advice(directory, certificate)}, or remove the folder")
        elif left < keys.SOON_DAYS:
            what = certificate.path if certificate.in_use else f"{certificate.path}: {certificate.name}"
            complain(f"{what} {_say_left(left)}: {_advice(directory, certificate)}")
    if any(
        certificate.in_use and (certificate.days_left(now) < 0 or (certificate.is_revoked and not is_authority))
        for certificate in found
    ):
        raise typer.Exit(1)


@keys_app.command(short_help="Revoke certificates.")
def revoke(
    directory: Authority,
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME|CERT]",
            help="A name, for all certificates ever issued under it, or the path of one certificate. Without it, "
            "nothing is revoked; the list is only written again.",
        ),
    ] = None,
    old: Annotated[bool, typer.Option("--old", help="Only certificates of NAME that a renewal has replaced.")] = False,
    to: Folders = None,
    as_json: AsJson = False,
) -> None:
    """Revoke certificates: write them into crl.pem of DIR, of each folder in it, and of each --to.

    Backups and primaries that run from these folders refuse the certificates at once, and end open sessions within
    seconds. Copy crl.pem into the --tls-dir folder of every other machine; no restart is needed there either. With
    --auto-failover, revoking the certificate of a running primary makes the backup take over. To replace a stolen key
    without that, renew first, copy the folder to its machine, and revoke the old certificates.

    Example: remus-ckpt keys revoke keys/ laptop

    Example: remus-ckpt keys issue keys/ orders --renew && remus-ckpt keys revoke keys/ orders --old
    """
    from remus_ckpt.service import revocation

    if old and what is None:
        raise typer.BadParameter("--old needs a NAME")
    done = revocation.revoke(directory, what, superseded=old, to=to or ())
    if as_json:
        print_json(
            {
                "revoked": [_row(certificate) for certificate in done.revoked],
                "written": [str(folder / "crl.pem") for folder in (directory, *done.written)],
                "failed": [{"folder": str(folder), "reason": reason} for folder, reason in done.failed],
            }
        )
    else:
        for certificate in done.revoked:
            until = f"would have expired {certificate.expires:%Y-%m-%d}"
            out.print(Text(f"revoked: {certificate.name}, serial {certificate.serial:x}, {until}"))
        for folder in (directory, *done.written):
            out.print(Text(f"written: {folder / 'crl.pem'}"))
        out.print(Text(f"next: copy {directory / 'crl.pem'} into the --tls-dir folder of every other machine"))
    for folder, reason in done.failed:
        complain(f"{folder} was not told: {reason}")
    if done.failed:
        raise typer.Exit(1)


@keys_app.command(short_help="Replace the authority, in three stages.")
def rotate(
    directory: Authority,
    stage: Annotated[
        Literal["begin", "reissue", "finish"] | None,
        typer.Argument(metavar="[begin|reissue|finish]", help="Without it, show which stage is next."),
    ] = None,
    to: Folders = None,
    days: Annotated[
        int | None,
        typer.Option(
            metavar="DAYS",
            min=1,
            max=MAX_DAYS,
            help="Days until what the stage makes expires. [default: 3650 for the authority, 825 for certificates]",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replace the authority while services run. After each stage, copy the files that it names to their machines.

    begin makes a new authority, and makes every folder trust both. reissue replaces every certificate with one from the
    new authority. finish removes the old authority. Services need no restart. If a stage was interrupted, run it again.

    Example: remus-ckpt keys rotate keys/ begin

    Example: remus-ckpt keys rotate keys/ reissue --to /etc/remus/tls
    """
    from remus_ckpt.service import keys, rotation

    folders = to or ()
    if stage is None:
        begun = rotation.stage(directory)
        if as_json:
            print_json({"stage": begun})
        else:
            out.print(Text(_say_next(directory, begun)))
        return
    if stage == "finish" and days is not None:
        raise typer.BadParameter("finish makes nothing that expires: leave out --days")
    if stage == "begin":
        done = rotation.begin(directory, to=folders, days=days or keys.CA_DAYS)
    elif stage == "reissue":
        done = rotation.reissue(directory, to=folders, days=days or keys.CERTIFICATE_DAYS)
    else:
        done = rotation.finish(directory, to=folders)
    _report_stage(directory, stage, done, as_json)


def _report_stage(directory: Path, stage: str, done: Done, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "stage": stage,
                "authority": done.authority,
                "changed": [{"folder": str(folder), "files": files} for folder, files in done.changed],
                "left_out": [str(folder) for folder in done.left_out],
            }
        )
        return
    out.print(Text(f"new authority: {done.authority}"))
    for folder, files in done.changed:
        out.print(Text(f"to its machine: {' '.join(str(folder / name) for name in files)}"))
    for folder in done.left_out:
        out.print(Text(f"left out, since its certificate is no longer of use: {folder}"))
    if stage == "finish" and done.changed:
        out.print(Text("the rotation is complete once every machine has the new ca.pem"))
    else:
        out.print(Text(_say_next(directory, None if stage == "finish" else stage)))


def _say_next(directory: Path, begun: str | None) -> str:
    rotate = f"remus-ckpt keys rotate {shlex.quote(str(directory))}"
    if begun is None:
        return f"no rotation is under way; `{rotate} begin` starts one"
    if begun == "begin":
        return f"next, once every machine has the new ca.pem: {rotate} reissue"
    return f"next, once every machine has its new certificate: {rotate} finish"


def _say_limits(certificate: Certificate) -> str:
    from remus_ckpt.link.rights import EVERYTHING

    limits = "" if certificate.rights == EVERYTHING else f"; allows {certificate.rights}"
    return f"{limits}; REVOKED" if certificate.is_revoked else limits


def _say_left(days: float) -> str:
    if days >= 0:
        return f"expires in {_count(days)}"
    return f"expired {_count(-days)} ago"


def _count(days: float) -> str:
    whole = int(days)
    return "less than a day" if not whole else f"{whole:,} day{'s' if whole > 1 else ''}"


def _advice(directory: Path, certificate: Certificate) -> str:
    from remus_ckpt.link.tls import RENEW, RENEW_CA

    if not certificate.in_use:
        return "remove it from the file once no certificate that it signed is in use"
    if certificate.is_ca:
        return RENEW_CA
    if not (directory / "ca-key.pem").is_file():
        return RENEW
    folder = certificate.path.parent
    where = "" if folder == directory / certificate.name else f" --out {shlex.quote(str(folder))}"
    return f"renew it with `remus-ckpt keys issue {shlex.quote(str(directory))} {certificate.name}{where} --renew`"


def _row(certificate: Certificate) -> dict[str, Any]:
    rights = certificate.rights
    return asdict(certificate) | {
        "path": str(certificate.path),
        "starts": certificate.starts.isoformat(),
        "expires": certificate.expires.isoformat(),
        "serial": f"{certificate.serial:x}",
        "rights": {
            "may": None if rights.actions is None else sorted(rights.actions),
            "names": None if rights.names is None else sorted(rights.names),
            "unknown": rights.unknown,
        },
    }


def _report(certificate: Certificate, as_json: bool) -> None:
    if as_json:
        print_json(_row(certificate) | {"directory": str(certificate.path.parent)})
        return
    hosts = f" for {', '.join(certificate.hosts)}" if certificate.hosts else ""
    until = f"expires {certificate.expires:%Y-%m-%d}{_say_limits(certificate)}"
    out.print(Text(f"{certificate.path.parent}: {certificate.name}{hosts}, {until}"))
