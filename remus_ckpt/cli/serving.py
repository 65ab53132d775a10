"""What backups and primaries share as services: metrics, the live page, realtime threads, and messages to systemd."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from remus_ckpt.cli.options import usage
from remus_ckpt.observe.systemd import notify, watchdog_interval_s

if TYPE_CHECKING:
    from remus_ckpt.dashboard.board import Watched
    from remus_ckpt.dashboard.server import Dashboard
    from remus_ckpt.link.tls import TlsFiles
    from remus_ckpt.observe.metrics import Metrics
    from remus_ckpt.service.realtime import Realtime


def check_metrics(where: str | None) -> None:
    if where:
        from remus_ckpt.observe.http import http_address

        with usage():
            http_address(where, "metrics")


def serve_metrics(stack: ExitStack, counted: Metrics, where: str | None, tls: TlsFiles | None) -> None:
    if tls:
        counted.watch_certificate(tls.expires)
    if where:
        stack.enter_context(counted.serve(where))


def check_dashboard(where: str | None, token_file: Path | None, may_fail_over: bool = False) -> str | None:
    """The token of a page that may be served like that. Raises typer.BadParameter."""
    if where is None:
        if token_file is not None or may_fail_over:
            raise typer.BadParameter("--dashboard-token and --allow-failover need --dashboard")
        return None
    from remus_ckpt.dashboard.server import check_access, read_token

    with usage():
        token = None if token_file is None else read_token(token_file)
        check_access(where, token, may_fail_over)
    return token


def serve_dashboard(
    stack: ExitStack, sources: Sequence[Watched], where: str, token: str | None, may_fail_over: bool = False
) -> Dashboard:
    """Serve the page until the stack is left. Raises LinkError."""
    from remus_ckpt.dashboard.board import Board
    from remus_ckpt.dashboard.server import Dashboard

    board = Board(sources)
    stack.callback(board.close)
    return stack.enter_context(Dashboard(where, board, token=token, may_fail_over=may_fail_over))


def realtime_threads(is_wanted: bool) -> Realtime | None:
    """What gives threads the realtime class, if requested. Raises RemusError if it is not permitted."""
    if not is_wanted:
        return None
    from remus_ckpt.service.realtime import Realtime

    return Realtime()


def watchdog() -> Callable[[], None] | None:
    """A function that tells systemd at intervals that the service is alive; None if systemd does not ask for it."""
    interval_s = watchdog_interval_s()
    if interval_s is None:
        return None
    due = 0.0

    def beat() -> None:
        nonlocal due
        if (now := time.monotonic()) >= due:
            due = now + interval_s / 2
            notify("WATCHDOG=1")

    return beat
