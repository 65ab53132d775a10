"""The command `plan`: how much link and disk a recorded memory needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from remus_ckpt.cli.options import (
    AsJson,
    CodecOption,
    MaxMemory,
    app,
    is_time,
    naming_stream,
    parse_duration,
    print_json,
)
from remus_ckpt.cli.terminal import out
from remus_ckpt.limits import GIB, Limits
from remus_ckpt.plural import counted

if TYPE_CHECKING:
    from remus_ckpt.plan import Need
    from remus_ckpt.recording import Recording

_BITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}


def _link(text: str) -> float:
    """Bytes per second, from a link speed in bits per second."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?)(?:bit(?:/s)?|bps)", text.strip())
    if not match or not float(match[1]):
        raise typer.BadParameter(
            f"{text!r} is not the speed of a link: write it in bits a second, such as 100Mbit or 1Gbit"
        )
    return float(match[1]) * _BITS[match[2]] / 8


@app.command("plan", short_help="Work out how much link and disk a recorded memory needs.")
def plan_command(
    recording: Annotated[
        Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="A stream that `record` made.")
    ],
    interval: Annotated[
        list[str] | None,
        typer.Option("--interval", metavar="TIME", callback=is_time, help="An interval to consider. Repeatable."),
    ] = None,
    link: Annotated[
        str | None, typer.Option("--link", metavar="SPEED", help="The link to the backup, such as 100Mbit or 1Gbit.")
    ] = None,
    keep_age: Annotated[
        str | None,
        typer.Option(
            "--keep-age", metavar="TIME", callback=is_time, help="How long the backup keeps checkpoints, such as 7d."
        ),
    ] = None,
    codec: CodecOption = None,
    max_memory: MaxMemory = 64,
    as_json: AsJson = False,
) -> None:
    """Work out from a recording how many bytes checkpoints take at several intervals, on the link and on the disk.

    At a longer interval, a page that changes often is sent less often. Each interval is actually encoded. Figures are
    before compression on the link; the first copy is listed separately.

    First record a typical minute of work, at the shortest interval that you would use:
    remus-ckpt record /dev/shm/orders --pid 4711 -o orders.remus --interval 25ms --duration 60s

    Example: remus-ckpt plan orders.remus --link 1Gbit --keep-age 12h
    """
    from remus_ckpt.plan import plan
    from remus_ckpt.service.words import say_bytes

    speed = None if link is None else _link(link)
    age_s = None if keep_age is None else parse_duration(keep_age)
    intervals = None if not interval else [parse_duration(one) for one in interval]
    if not recording.is_file():
        raise typer.BadParameter(
            f"{recording} is a pipe or a device, and a recording is read several times: save it to a file first"
        )
    with naming_stream(recording):
        found, needs = plan(recording, intervals, codec=codec, limits=Limits(memory_bytes=max_memory * GIB))
    rows = [_row(need, found, speed, age_s) for need in needs]
    if as_json:
        print_json({"recording": str(recording)} | _head(found, speed) | {"intervals": rows})
        return
    copied = "" if speed is None else f", {found.first_copy_bytes / speed:,.1f} s on the link"
    out.print(
        Text(
            f"recorded {counted(found.checkpoints, 'checkpoint')} in {found.seconds:,.1f} s, one every "
            f"{_time(found.interval_s)}; memory {say_bytes(found.memory_bytes)}; first copy "
            f"{say_bytes(found.first_copy_bytes)}{copied}"
        )
    )
    head = ["interval", "pages p50", "p99", "bytes p50", "p99", "a second", "a day"]
    head += ["on the link p99", "keeps up"] if speed is not None else []
    head += [f"kept {keep_age}"] if age_s is not None else []
    if found.changed_bytes:
        shares = ", ".join(f"{name} {size / found.changed_bytes:.1%}" for name, size in found.encoded.items())
        out.print(Text(f"pages behind the first copy, by page codec: {shares} of {say_bytes(found.changed_bytes)}"))
    table = [head]
    for row in rows:
        cells = [_time(row["interval_s"]), f"{row['pages']['p50']:,.0f}", f"{row['pages']['p99']:,.0f}"]
        cells += [
            say_bytes(row["bytes"]["p50"]),
            say_bytes(row["bytes"]["p99"]),
            say_bytes(row["bytes_s"]),
            say_bytes(row["bytes_day"]),
        ]
        if speed is not None:
            cells += [_time(row["sent_in_s"]), "yes" if row["keeps_up"] else "no"]
        if age_s is not None:
            cells.append(say_bytes(row["stored_bytes"]))
        table.append(cells)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        out.print(Text("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))))
    if speed is not None:
        fit = [row["interval_s"] for row in rows if row["keeps_up"]]
        if fit:
            out.print(Text(f"the shortest of these intervals that the link keeps up with is {_time(min(fit))}"))
        else:
            out.print(Text("the link keeps up with none of these: use a longer interval or a faster link"))


def _head(found: Recording, speed: float | None) -> dict[str, Any]:
    return {
        "checkpoints": found.checkpoints,
        "seconds": found.seconds,
        "interval_s": found.interval_s,
        "memory_bytes": found.memory_bytes,
        "first_copy_bytes": found.first_copy_bytes,
        "changed_bytes": found.changed_bytes,
        "encoded_bytes": found.encoded,
        "first_copy_s": None if speed is None else found.first_copy_bytes / speed,
        "link_bytes_s": speed,
    }


def _row(need: Need, found: Recording, speed: float | None, age_s: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "interval_s": need.interval_s,
        "checkpoints": len(need.sizes),
        "pages": _percentiles(need.pages),
        "bytes": _percentiles(need.sizes),
        "bytes_s": need.bytes_s,
        "bytes_day": need.bytes_s * 86400,
    }
    if speed is not None:
        row |= {"sent_in_s": need.sent_in_s(speed), "keeps_up": need.keeps_up(speed)}
    if age_s is not None:
        row["stored_bytes"] = need.stored_bytes(age_s, found.first_copy_bytes)
    return row


def _percentiles(values: Any) -> dict[str, float]:
    import numpy as np

    return {
        "p50": float(np.percentile(values, 50)),
        "p99": float(np.percentile(values, 99)),
        "max": float(np.max(values)),
    }


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
