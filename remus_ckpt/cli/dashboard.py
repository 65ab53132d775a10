"""The command `dashboard`: one page for several backups, from a separate process."""

from __future__ import annotations

import select
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remus_ckpt.cli.options import (
    AllowFailover,
    DashboardToken,
    Insecure,
    Logs,
    TlsDir,
    address_of,
    app,
    stop_on_signals,
)
from remus_ckpt.cli.serving import check_dashboard, serve_dashboard
from remus_ckpt.cli.store import open_remote
from remus_ckpt.observe.log import configure_logs
from remus_ckpt.observe.systemd import notify

if TYPE_CHECKING:
    from remus_ckpt.store import History


@app.command(short_help="Serve a live page about several backups.")
def dashboard(
    source: Annotated[
        list[str],
        typer.Option(
            "--from",
            metavar="ADDRESS",
            help="A backup: tls://HOST:PORT, unix:PATH, tcp://HOST:PORT on this machine. Repeatable.",
        ),
    ],
    listen: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT", help="Where to serve the page; a port alone is reachable from this machine only."
        ),
    ] = "127.0.0.1:7412",
    token: DashboardToken = None,
    allow_failover: AllowFailover = False,
    tls_dir: TlsDir = None,
    log_format: Logs = "text",
    insecure: Insecure = False,
) -> None:
    """Show each name of these backups on a page for a browser, until Ctrl-C.

    The certificate in --tls-dir decides what the page may see and do: `read` for what can be restored and for
    events, `failover` for the button. From another machine, `ssh -L 7412:localhost:7412 HOST` needs no token.

    Example: remus-ckpt dashboard --from tls://backup1:7411 --from tls://backup2:7411 --tls-dir keys/me

    Example: remus-ckpt dashboard --from tls://backup:7411 --tls-dir keys/me --dashboard-token token --allow-failover
    """
    word = check_dashboard(listen, token, allow_failover)
    addresses = [address_of(text, tls_dir, insecure) for text in source]
    from remus_ckpt.dashboard.sources import OfAddress
    from remus_ckpt.link.dial import connect

    configure_logs(log_format)
    with ExitStack() as stack:
        stop = stop_on_signals(stack)
        sources = [
            OfAddress(
                str(address),
                partial(connect, address, tls=tls, insecure=insecure),
                partial(_history, str(address), tls_dir, insecure),
            )
            for address, tls in addresses
        ]
        served = serve_dashboard(stack, sources, listen, word, allow_failover)
        print(f"listening on {served.url}", flush=True)
        notify("READY=1")
        select.select([stop], [], [])
        notify("STOPPING=1")


def _history(address: str, tls_dir: Path | None, insecure: bool, name: str) -> History:
    return open_remote(f"{address}/{name}", tls_dir, insecure)
