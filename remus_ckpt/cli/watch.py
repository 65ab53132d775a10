"""`status --watch`: a backup's names as a table that is redrawn at an interval."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from remus_ckpt.cli.terminal import errors, out
from remus_ckpt.errors import RemusError
from remus_ckpt.loop import StopSignal
from remus_ckpt.observe.log import on_one_line

_STYLES = ("green", "yellow", "bold red")
_COLUMNS = ("name", "state", "epoch", "committed", "lag", "dirty pages", "pause", "commit", "ratio")
_SLEEP_S = 0.1


def watch(
    ask: Callable[[], dict[str, Any]],
    every_s: float,
    stop: StopSignal,
    *,
    as_json: bool,
    draw: Callable[[dict[str, Any], float], Group] | None = None,
) -> None:
    """Show a backup's status until `stop` is set; while it does not answer, say so and keep asking.

    ask: returns the report of `status`; raises RemusError
    draw: what to show of a report at a Unix time; None: a backup's names
    as_json: print each report as one line instead. A backup that does not answer is {"error": …} there
    """
    # Where the output is no terminal there is nothing to draw over: each report is printed once.
    with (
        Live(console=out, auto_refresh=False, transient=False) if out.is_terminal and not as_json else _Once() as shown
    ):
        while not stop.is_set:
            began = time.monotonic()
            try:
                report: dict[str, Any] = ask()
                drawn = (draw or _draw)(report, time.time())
            except RemusError as error:
                report = {"error": str(error)}
                drawn = Group(
                    Text(time.strftime("%H:%M:%S")), Text(on_one_line(f"no answer: {error}"), style=_STYLES[2])
                )
            if as_json:
                print(json.dumps(report), flush=True)
            else:
                shown.update(drawn, refresh=True)
            while not stop.is_set and (left := began + every_s - time.monotonic()) > 0:
                time.sleep(min(left, _SLEEP_S))
    if out.is_terminal and not as_json:
        errors.print()


class _Once:
    """In place of Live: prints whatever it is given."""

    def __enter__(self) -> _Once:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, renderable: Group, *, refresh: bool) -> None:
        out.print(renderable)
        out.file.flush()


def _draw(report: dict[str, Any], now: float) -> Group:
    health = report["health"]
    head = Text.assemble(
        time.strftime("%H:%M:%S  ", time.localtime(now)), (on_one_line(health["words"]), _STYLES[health["level"]])
    )
    table = Table(*_COLUMNS, box=None, pad_edge=False, header_style="bold")
    for column in table.columns[2:]:
        column.justify = "right"
    advice = []
    for name, found in report["names"].items():
        table.add_row(*_row(name, found, now))
        if found["health"]["level"]:
            text = f"{name}: {found['health']['words']}" + (
                f"; {found['health']['next']}" if found["health"]["next"] else ""
            )
            advice.append(Text(on_one_line(text), style=_STYLES[found["health"]["level"]]))
    return Group(head, table, *advice)


def _row(name: str, found: dict[str, Any], now: float) -> list[Text]:
    """One name. What the primary says of itself may be anything, and is shown only if it makes sense."""
    primary = found["primary"]
    health = found["health"]
    committed = found.get("last_commit_at")
    cells = [
        "-" if found["epoch"] is None else f"{found['epoch']:,}",
        "-" if committed is None else f"{max(now - committed, 0.0):.1f} s ago",
        _number(primary.get("lag_checkpoints"), "{:,}"),
        _number(primary.get("dirty_pages"), "{:,}"),
        _number(_median(primary, "pause_ms"), "{:.2f} ms"),
        _number(_median(primary, "commit_latency_ms"), "{:.2f} ms"),
        _number(primary.get("ratio"), "{:.1%}"),
    ]
    return [Text(name), Text(health["state"], style=_STYLES[health["level"]]), *map(Text, cells)]


def _median(primary: dict[str, Any], key: str) -> Any:
    times = primary.get(key)
    return times.get("p50") if isinstance(times, dict) else None


def _number(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) and not isinstance(value, bool) else "-"
