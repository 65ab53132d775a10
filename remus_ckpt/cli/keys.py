"""The commands on keys: a small CA for mutual TLS."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from remus_ckpt.cli.options import AsJson, app, print_json
from remus_ckpt.service import keys
from remus_ckpt.walk import complain, out

keys_app = typer.Typer(no_args_is_help=True, help="Make and show the keys for tls://.", rich_markup_mode=None)
app.add_typer(keys_app, name="keys")

Days = Annotated[int, typer.Option(min=1, max=36_500, help="How long it is valid.")]


@keys_app.command(short_help="Make a certificate authority.")
def init(
    directory: Annotated[Path, typer.Argument(help="A folder for it; it stays with you.")],
    days: Days = keys.CA_DAYS,
    as_json: AsJson = False,
) -> None:
    """Make a certificate authority: ca.pem, and ca-key.pem, which issues certificates and leaves this folder never.

    Example: remus-ckpt keys init keys/
    """
    _report(keys.init(directory, days=days), as_json)


@keys_app.command(short_help="Issue a certificate for one machine.")
def issue(
    directory: Annotated[Path, typer.Argument(help="The folder of the authority.")],
    name: Annotated[str, typer.Argument(help="Of the machine or the service.")],
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", help="A name or address by which it is reached; may be repeated. [default: NAME]"),
    ] = None,
    days: Days = keys.CERTIFICATE_DAYS,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Where to put it. [default: the folder NAME in DIRECTORY]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Issue a certificate into a folder that goes to one machine, and is what --tls-dir takes there.

    Example: remus-ckpt keys issue keys/ backup --host backup.example.net --host 10.0.0.7
    """
    _report(keys.issue(directory, name, hosts=hosts or (), days=days, out=folder), as_json)


@keys_app.command(short_help="List certificates and when they expire.")
def show(
    directory: Annotated[Path, typer.Argument(help="The folder of an authority, or one that was issued.")],
    as_json: AsJson = False,
) -> None:
    """List the certificates in a folder and when they expire.

    Example: remus-ckpt keys show keys/
    """
    found = keys.show(directory)
    now = datetime.now(UTC)
    if as_json:
        print_json([_row(certificate) | {"days_left": round(certificate.days_left(now), 2)} for certificate in found])
    else:
        for certificate in found:
            hosts = f" ({' '.join(certificate.hosts)})" if certificate.hosts else ""
            until = f"until {certificate.expires:%Y-%m-%d}, {certificate.days_left(now):.0f} days"
            out.print(Text(f"{certificate.path}: {certificate.name}{hosts}, {until}"))
    for certificate in found:
        left = certificate.days_left(now)
        if left < 0:
            complain(f"{certificate.path} has expired: issue a new one")
        elif left < keys.SOON_DAYS:
            complain(f"{certificate.path} expires in {left:.0f} days: issue a new one")


def _row(certificate: keys.Certificate) -> dict[str, Any]:
    return asdict(certificate) | {
        "path": str(certificate.path),
        "starts": certificate.starts.isoformat(),
        "expires": certificate.expires.isoformat(),
        "serial": f"{certificate.serial:x}",
    }


def _report(certificate: keys.Certificate, as_json: bool) -> None:
    if as_json:
        print_json(_row(certificate) | {"directory": str(certificate.path.parent)})
        return
    hosts = f" for {', '.join(certificate.hosts)}" if certificate.hosts else ""
    out.print(Text(f"{certificate.path.parent}: {certificate.name}{hosts}, expires {certificate.expires:%Y-%m-%d}"))
