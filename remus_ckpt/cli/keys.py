"""The commands for keys: a small CA for mutual TLS."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from remus_ckpt.cli.options import AsJson, app, print_json
from remus_ckpt.cli.terminal import complain, out

if TYPE_CHECKING:
    from remus_ckpt.service.keys import Certificate

keys_app = typer.Typer(no_args_is_help=True, help="Make and show TLS keys.", rich_markup_mode=None)
app.add_typer(keys_app, name="keys")

MAX_DAYS = 36_500


@keys_app.command(short_help="Make a certificate authority.")
def init(
    directory: Annotated[Path, typer.Argument(help="Folder for the authority. Keep it to yourself.")],
    days: Annotated[
        int | None, typer.Option(min=1, max=MAX_DAYS, help="Days until it expires. [default: 3650]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a certificate authority: ca.pem, and ca-key.pem, which signs certificates and must never leave this folder.

    Example: remus-ckpt keys init keys/
    """
    from remus_ckpt.service import keys

    _report(keys.init(directory, days=days or keys.CA_DAYS), as_json)


@keys_app.command(short_help="Issue a certificate for one machine.")
def issue(
    directory: Annotated[Path, typer.Argument(help="Folder of the authority.")],
    name: Annotated[str, typer.Argument(help="Name of the machine or service.")],
    hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            metavar="HOST",
            help="Host name or address of the machine. Repeatable. [default: NAME, or the old hosts with --renew]",
        ),
    ] = None,
    days: Annotated[int | None, typer.Option(min=1, max=MAX_DAYS, help="Days until it expires. [default: 825]")] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for the certificate. [default: DIRECTORY/NAME]")
    ] = None,
    renew: Annotated[
        bool, typer.Option("--renew", help="Replace the existing certificate and key; services may keep running.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Issue a certificate for one machine. Copy its folder there and pass it to --tls-dir.

    A running backup or primary uses a renewed certificate from its next connection on, without a restart.

    Example: remus-ckpt keys issue keys/ backup --host backup.example.net --host 10.0.0.7
    """
    from remus_ckpt.service import keys

    days = days or keys.CERTIFICATE_DAYS
    _report(keys.issue(directory, name, hosts=hosts or (), days=days, out=folder, renew=renew), as_json)


@keys_app.command(short_help="List certificates and when they expire.")
def show(
    directory: Annotated[Path, typer.Argument(help="Folder of an authority, or of one machine.")],
    as_json: AsJson = False,
) -> None:
    """List the certificates in a folder and when they expire. Exits with 1 if one in use has expired.

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
        for certificate in found:
            hosts = f" ({' '.join(certificate.hosts)})" if certificate.hosts else ""
            until = f"{_say_left(certificate.days_left(now))} ({certificate.expires:%Y-%m-%d})"
            out.print(Text(f"{certificate.path}: {certificate.name}{hosts}, {until}"))
    for certificate in found:
        left = certificate.days_left(now)
        if left < keys.SOON_DAYS:
            what = certificate.path if certificate.in_use else f"{certificate.path}: {certificate.name}"
            complain(f"{what} {_say_left(left)}: {_advice(directory, certificate)}")
    if any(certificate.in_use and certificate.days_left(now) < 0 for certificate in found):
        raise typer.Exit(1)


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
    return asdict(certificate) | {
        "path": str(certificate.path),
        "starts": certificate.starts.isoformat(),
        "expires": certificate.expires.isoformat(),
        "serial": f"{certificate.serial:x}",
    }


def _report(certificate: Certificate, as_json: bool) -> None:
    if as_json:
        print_json(_row(certificate) | {"directory": str(certificate.path.parent)})
        return
    hosts = f" for {', '.join(certificate.hosts)}" if certificate.hosts else ""
    out.print(Text(f"{certificate.path.parent}: {certificate.name}{hosts}, expires {certificate.expires:%Y-%m-%d}"))
