"""The commands for stores, and what `restore` and `verify` do with `store:DIR/NAME`."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.text import Text

from remus_ckpt.cli.options import (
    AsJson,
    KeepFree,
    KeepTiers,
    Overwrite,
    app,
    keep_what_is_there,
    print_json,
    retention_of,
    write_out,
)
from remus_ckpt.cli.terminal import complain, out, progress
from remus_ckpt.errors import BadCheckpoint, StoreError
from remus_ckpt.limits import GIB, Limits

if TYPE_CHECKING:
    from remus_ckpt.restorer import Checkpoint
    from remus_ckpt.store import Entry, History, HistoryWriter, Removal, Report, State, Survey
    from remus_ckpt.store.history import Progress
    from remus_ckpt.store.segments import Contents

T = TypeVar("T")
PREFIX = "store:"
_TABLE_ROWS = _LISTED = 1_000

HistoryName = Annotated[str, typer.Argument(metavar="store:DIR/NAME", help="One name in a store.")]
At = Annotated[
    str | None,
    typer.Option(
        "--at",
        metavar="EPOCH|TIME",
        help="Number of a checkpoint, or a time: the last one taken by then. Local time unless it names a zone.",
    ),
]


def is_store(stream: str) -> bool:
    """Whether a command's argument names a store instead of a stream."""
    return stream.startswith(PREFIX)


def open_history(text: str, max_memory: int = 64) -> History:
    """`store:DIR/NAME` to be read. Raises StoreError."""
    return _history(_path(text), limits=Limits(memory_bytes=max_memory * GIB))


def _history(path: Path, limits: Limits | None = None) -> History:
    """Raises StoreError; if the path is that of a whole store, the error lists its names."""
    from remus_ckpt.store import History, Store
    from remus_ckpt.store.history import nothing_in
    from remus_ckpt.store.state import is_history

    if path.is_dir() and not is_history(path):
        if names := Store(path).names():
            raise StoreError(
                f"{path} is a store; choose one of its names: {', '.join(f'{PREFIX}{path / n}' for n in names)}"
            )
        if not any(path.iterdir()):
            raise nothing_in(path, "the directory is empty")
    return History(path, limits=limits)


def parse_at(text: str | None) -> int | datetime | None:
    """An epoch, or a time in ISO 8601; a time without a zone is local."""
    if text is None:
        return None
    if text.isdecimal():
        return int(text)
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError, OSError):
        raise typer.BadParameter(
            f"--at {text!r} is neither a checkpoint number nor a time such as 2026-01-31T12:00:05"
        ) from None


def restore_from_store(
    text: str, output: str, at: int | datetime | None, device_state: Path | None, max_memory: int, as_json: bool
) -> None:
    """The command `restore`. If the newest checkpoint is bad, restores the last good one before it; exit code 20."""
    history = open_history(text, max_memory)

    def read(entry: Entry, advance: Progress) -> Checkpoint:
        if output == "-" or (Path(output).exists() and not Path(output).is_file()):
            return history.restore(entry.epoch, progress=advance)
        return history.restore_image(output, entry.epoch, progress=advance)

    entry, found, fault = _read_good(text, history, at, as_json, read)
    if output == "-":
        sys.stdout.buffer.write(found.image.data)
        sys.stdout.buffer.flush()
    elif Path(output).exists() and not Path(output).is_file():
        from remus_ckpt.memory import save_image

        save_image(found.memory, output, found.memory_bytes)
    if device_state is not None:
        write_out(str(device_state), found.device_state)
    if as_json and output != "-":
        print_json({"store": text, "restored": found.epoch, "time_ns": entry.time_ns, "image": output})
    elif output != "-":
        out.print(Text(f"{output}: checkpoint {found.epoch}, {len(found.memory):,} pages"))
    if fault is not None:
        raise typer.Exit(fault.exit_code)


def _read_good(
    text: str,
    history: History,
    at: int | datetime | None,
    as_json: bool,
    read: Callable[[Entry, Progress], T],
) -> tuple[Entry, T, BadCheckpoint | None]:
    """A checkpoint. If the newest is asked for and bad: the newest good one, and what is wrong."""
    fault: BadCheckpoint | None = None
    while True:
        try:
            entry = history.find(at)
            with progress(text, entry.end, as_json) as advance:
                return entry, read(entry, advance), fault
        except BadCheckpoint as error:
            if at is not None and fault is None:
                raise
            complain(f"{text}: {error}")
            fault, at = error, error.good
            if at is None:
                raise typer.Exit(error.exit_code) from None


def verify_store(text: str, max_memory: int, as_json: bool) -> None:
    """The command `verify`: exit code 20 if anything is bad."""
    history = open_history(text, max_memory)
    size = sum(path.stat().st_size for path in (history.directory / "segments").glob("*.remus"))
    with progress(text, size, as_json) as advance:
        report = history.verify(progress=advance)
    if as_json:
        print_json(_report(text, report))
    else:
        held = (
            "no checkpoint is good" if report.newest is None else f"the newest good checkpoint is {report.newest.epoch}"
        )
        read = f"{report.checkpoints:,} checkpoints in {report.segments} segments, {report.bytes:,} bytes"
        out.print(f"read {read}; {held}")
        if report.unfinished_bytes:
            out.print(f"{report.unfinished_bytes:,} bytes belong to a checkpoint that is unfinished or still arriving")
    for bad in report.bad:
        where = f"{bad.segment}: checkpoint {bad.epoch}, at byte {bad.byte}: {bad.reason}"
        section = f" ({bad.section})" if bad.section else ""
        good = (
            "no good checkpoint before it"
            if bad.good is None
            else f"the newest good checkpoint before it is {bad.good}"
        )
        lost = f"; unreachable: {_numbers(bad.unreachable)}" if bad.unreachable else ""
        complain(f"{where}{section}; {good}{lost}")
    if report.bad:
        raise typer.Exit(BadCheckpoint.exit_code)
    if report.newest is None:
        from remus_ckpt.store.history import nothing_in

        raise nothing_in(history.directory)


@app.command("list", short_help="List what a store holds.")
def list_store(
    store: Annotated[str, typer.Argument(metavar="store:DIR[/NAME]", help="A store, or one name in it.")],
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="Also list every checkpoint of NAME.")] = False,
    last: Annotated[
        int | None, typer.Option("--last", metavar="N", min=1, help="Also list the last N checkpoints of NAME.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the names in a store and their newest checkpoints, or the segments and checkpoints of one name.

    Examples: remus-ckpt list store:/var/lib/remus;  remus-ckpt list store:/var/lib/remus/orders --last 20
    """
    path = _path(store)
    from remus_ckpt.store import History, Store
    from remus_ckpt.store.history import nothing_in
    from remus_ckpt.store.state import FILE

    if (path / FILE).exists() or (path / "segments").exists():
        history = History(path)
        _list_history(history, None if checkpoints else last or 0, as_json)
        if history.newest() is None:
            raise nothing_in(path)
        return
    if checkpoints or last is not None:
        raise typer.BadParameter("--checkpoints and --last need a name: store:DIR/NAME")
    rows, faults = [], []
    for name in Store(path).names():
        try:
            history = Store(path).history(name)
            rows.append(_summary(history.state, history.survey()))
        except StoreError as error:
            faults.append({"name": name, "error": str(error)})
    if as_json:
        print_json({"store": str(path), "histories": rows, "unreadable": faults})
    else:
        table = [["name", "newest", "checkpoints", "bytes", "term", "role", "taken"]]
        for row in rows:
            cells = [row["name"], row["newest"], row["checkpoints"], row["bytes"], row["term"], row["role"]]
            table.append([*map(_cell, cells), _time(row["time_ns"])])
        _print_table(table)
        for row in rows:
            for lost in row["lost"]:
                complain(f"{row['name']}: {_loss(lost)}")
    for fault in faults:
        complain(fault["error"])
    if faults:
        raise typer.Exit(StoreError.exit_code)
    if not rows:
        raise nothing_in(path, "the store holds no name")
    if all(row["newest"] is None for row in rows):
        raise nothing_in(path)


def _list_history(history: History, last: int | None, as_json: bool) -> None:
    """last: how many checkpoints to list too; None: all."""
    state, survey = history.state, history.survey()
    summary = _summary(state, survey)
    segments = [_segment_row(one) | {"damaged": state.damaged.get(one.name)} for one in survey.contents]
    if as_json:
        if last == 0:
            print_json(summary | {"segments": segments})
        else:
            _print_json_list(summary | {"segments": segments}, "entries", map(_row, _listed(history, last)))
        return
    table = [["segment", "first", "last", "checkpoints", "bytes", "base", "taken from", "to"]]
    for row in segments:
        numbers = [row[key] for key in ("first", "last", "checkpoints", "bytes", "base_bytes")]
        table.append([row["segment"], *map(_cell, numbers), _time(row["first_time_ns"]), _time(row["last_time_ns"])])
    _print_table(table)
    if newest := survey.newest:
        out.print(Text(f"newest: {newest.epoch}, taken {_time(newest.time_ns)}, position {newest.position}"))
    for name, reason in state.damaged.items():
        if all(name != lost.segment for lost in survey.lost):
            complain(f"{name}: {reason}")
    for lost in summary["lost"]:
        complain(_loss(lost))
    if last == 0:
        return
    head = ["epoch", "taken", "pages", "bytes", "segment", "position"]
    # As wide as the first rows need: a table of all of them may not fit into memory.
    rows = (_cells(entry) for entry in _listed(history, last))
    widths: list[int] = []
    while block := [*([] if widths else [head]), *itertools.islice(rows, _TABLE_ROWS)]:
        widths = _print_table(block, widths)


def _listed(history: History, last: int | None) -> Iterator[Entry]:
    """Yield the last N checkpoints, or all, one at a time."""
    if last is None:
        return history.checkpoints()
    newest_first = itertools.islice(history.checkpoints(newest_first=True), last)
    return reversed(list(newest_first))


def _cells(entry: Entry) -> list[str]:
    sequence = entry.segment.partition("-")[2].partition(".")[0]
    size = _cell(entry.end - entry.start)
    return [_cell(entry.epoch), _time(entry.time_ns), _cell(entry.pages), size, sequence, str(entry.position)]


def _print_json_list(fields: dict[str, Any], name: str, rows: Iterator[dict[str, Any]]) -> None:
    """Print one JSON object with a list in it that is written as it is produced."""
    head = json.dumps(fields | {name: []})
    sys.stdout.write(head.removesuffix("]}"))
    for number, row in enumerate(rows):
        sys.stdout.write((", " if number else "") + json.dumps(row))
    sys.stdout.write("]}\n")
    sys.stdout.flush()


def _loss(lost: dict[str, Any]) -> str:
    epochs = f"; lost committed checkpoints: {lost['epochs']}" if lost["epochs"] else ""
    return f"{lost['segment']}, at byte {lost['byte']}: {lost['reason']}{epochs}"


@app.command(short_help="Remove old checkpoints from a store.")
def prune(
    store: HistoryName,
    keep: KeepTiers = None,
    keep_count: Annotated[int | None, typer.Option(min=1, help="Keep this many checkpoints.")] = None,
    keep_age: Annotated[
        str | None, typer.Option(help="Keep checkpoints up to this much older than the newest, such as 12h or 7d.")
    ] = None,
    keep_size: Annotated[str | None, typer.Option(help="Keep at most this many bytes, such as 500M or 20G.")] = None,
    keep_free: KeepFree = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed, and why.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove old checkpoints, in whole segments. The segment with the newest checkpoint always stays.

    A segment is removed as soon as --keep-count or --keep-age calls for it, unless --keep wants it; with --keep and
    neither of these, unless --keep wants it. Of those left, the oldest are removed until --keep-size and --keep-free
    are met. A running backup prunes by itself; --dry-run works beside it.

    Examples: remus-ckpt prune store:/var/lib/remus/orders --keep-age 7d --keep-size 20G;
    remus-ckpt prune store:/var/lib/remus/orders --keep hourly=48,daily=30 --keep-age 6h --dry-run
    """
    if all(one is None for one in (keep, keep_count, keep_age, keep_size, keep_free)):
        raise typer.BadParameter("say what to keep: --keep, --keep-count, --keep-age, --keep-size or --keep-free")
    retention = retention_of(keep, count=keep_count, age=keep_age, size=keep_size, free=keep_free)
    if dry_run:
        history = open_history(store)
        removals = history.prunable(retention)
        gone = {one.contents.name for one in removals}
        survey = history.survey()
        left = replace(survey, contents=tuple(one for one in survey.contents if one.name not in gone)).count
    else:
        with _writer(store) as writer:
            _say_warnings(store, writer)
            removals = writer.prune(retention)
            left = writer.history.survey().count
    size = sum(one.bytes for one in removals)
    if as_json:
        removed = [_segment_row(one.contents) | {"bytes": one.bytes, "rule": _OPTIONS[one.rule]} for one in removals]
        print_json({"store": store, "dry_run": dry_run, "removed": removed, "bytes": size, "checkpoints": left})
        return
    would = "would be " if dry_run else ""
    for one in removals:
        out.print(Text(f"{would}removed by {_OPTIONS[one.rule]}: {_words_for(one)}"))
    out.print(f"{len(removals):,} segments, {size:,} bytes {would}removed; {left:,} checkpoints {would}left")


_OPTIONS = {
    "count": "--keep-count",
    "age": "--keep-age",
    "tiers": "--keep",
    "size": "--keep-size",
    "free": "--keep-free",
}


def _words_for(removal: Removal) -> str:
    one = removal.contents
    if one.first is None or one.last is None:
        return f"{one.name}, no checkpoint, {removal.bytes:,} bytes"
    epochs = f"checkpoints {one.first.epoch} to {one.last.epoch}"
    return (
        f"{one.name}, {epochs}, taken {_time(one.first.time_ns)} to {_time(one.last.time_ns)}, {removal.bytes:,} bytes"
    )


@app.command(short_help="Start a new segment in a store with a full copy of memory.")
def compact(store: HistoryName, as_json: AsJson = False) -> None:
    """Start a new segment with a full copy of memory, so that restoring the newest checkpoint needs only that segment.

    Older segments stay until you `prune` them. A running backup compacts by itself.

    Example: remus-ckpt compact store:/var/lib/remus/orders
    """
    with _writer(store) as writer:
        _say_warnings(store, writer)
        known = len(writer.warnings)
        writer.compact(wait=True)
        if len(writer.warnings) > known:
            raise StoreError(writer.warnings[-1])
        entry = writer.history.newest()
        assert entry is not None
    if as_json:
        print_json({"store": store} | _row(entry))
    else:
        out.print(Text(f"{entry.segment}: checkpoint {entry.epoch}, {entry.end:,} bytes"))


@app.command(short_help="Export a checkpoint from a store as a stream.")
def export(
    store: HistoryName,
    output: Annotated[str, typer.Option("--output", "-o", help="Where to write the stream; - for standard output.")],
    at: At = None,
    overwrite: Overwrite = False,
    max_memory: Annotated[int, typer.Option("--max-memory", metavar="GIB", min=1, help="As in restore.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Write a save stream that ends with the newest checkpoint, or with the one that --at names.

    The stream is the checkpoint's segment up to that point, checked on the way. If the newest checkpoint is bad or
    lost, the stream ends with the newest good one before it, and the exit code is 20.

    Example: remus-ckpt export store:/var/lib/remus/orders -o orders.remus --at 4711
    """
    keep_what_is_there(overwrite, output)
    history = open_history(store, max_memory)

    def read(entry: Entry, advance: Progress) -> Entry:
        return history.export(output, entry.epoch, progress=advance)

    _, entry, fault = _read_good(store, history, parse_at(at), as_json, read)
    if as_json and output != "-":
        print_json({"store": store, "stream": output} | _row(entry))
    elif output != "-":
        out.print(Text(f"{output}: up to checkpoint {entry.epoch}, {entry.end:,} bytes"))
    if fault is not None:
        raise typer.Exit(fault.exit_code)


def _path(text: str) -> Path:
    if not is_store(text) or text == PREFIX:
        raise typer.BadParameter(f"{text!r} is not a store: write store:DIR or store:DIR/NAME")
    return Path(text.removeprefix(PREFIX))


def _writer(text: str) -> HistoryWriter:
    path = _path(text)
    name = _history(path).name  # refuses a name that does not exist
    from remus_ckpt.store import HistoryWriter

    return HistoryWriter(path, name, compact_bytes=None)


def _say_warnings(text: str, writer: HistoryWriter) -> None:
    for warning in writer.warnings:
        complain(f"{text}: {warning}")


def _summary(state: State, survey: Survey) -> dict[str, Any]:
    newest = survey.newest
    return {
        "name": state.name,
        "newest": None if newest is None else newest.epoch,
        "position": None if newest is None else str(newest.position),
        "time_ns": None if newest is None else newest.time_ns,
        "checkpoints": survey.count,
        "bytes": survey.bytes,
        "term": state.term,
        "role": state.role,
        "damaged": state.damaged,
        "lost": [
            {
                "segment": one.segment,
                "byte": one.byte,
                "reason": one.reason,
                "checkpoints": len(one.epochs),
                "epochs": _numbers(one.epochs),
            }
            for one in survey.lost
        ],
    }


def _segment_row(one: Contents) -> dict[str, Any]:
    return {
        "segment": one.name,
        "first": one.first.epoch if one.first else None,
        "last": one.last.epoch if one.last else None,
        "checkpoints": len(one.epochs),
        "bytes": one.end,
        "base_bytes": one.first.end if one.first else None,
        "first_time_ns": one.first.time_ns if one.first else None,
        "last_time_ns": one.last.time_ns if one.last else None,
    }


def _row(entry: Entry) -> dict[str, Any]:
    from remus_ckpt.pages import PAGE_SIZE

    return {
        "epoch": entry.epoch,
        "position": str(entry.position),
        "time_ns": entry.time_ns,
        "segment": entry.segment,
        "start": entry.start,
        "end": entry.end,
        "pages": entry.pages,
        "page_bytes": entry.pages * PAGE_SIZE,
        "is_base": entry.is_base,
    }


def _report(text: str, report: Report) -> dict[str, Any]:
    return {
        "store": text,
        "good": report.is_good and report.newest is not None,
        "checkpoints": report.checkpoints,
        "segments": report.segments,
        "bytes": report.bytes,
        "newest": None if report.newest is None else report.newest.epoch,
        "unfinished_bytes": report.unfinished_bytes,
        "bad": [
            {
                "segment": bad.segment,
                "epoch": bad.epoch,
                "byte": bad.byte,
                "reason": bad.reason,
                "section": bad.section,
                "good": bad.good,
                "unreachable": list(bad.unreachable[:_LISTED]),
                "unreachable_count": len(bad.unreachable),
            }
            for bad in report.bad
        ],
    }


def _print_table(rows: list[list[str]], widths: Sequence[int] = ()) -> list[int]:
    """Print a table. Returns the widths of its columns: at least those given."""
    columns = zip(*rows, strict=True)
    least = widths or [0] * len(rows[0])
    found = [max(width, *map(len, column)) for width, column in zip(least, columns, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, found, strict=True))
        ]
        out.print(Text("  ".join(cells).rstrip()))
    return found


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _time(time_ns: int | None) -> str:
    if time_ns is None:
        return "-"
    try:
        return datetime.fromtimestamp(time_ns / 1e9).astimezone().isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return str(time_ns)


def _numbers(epochs: range) -> str:
    return "" if not epochs else str(epochs[0]) if len(epochs) == 1 else f"{epochs[0]}-{epochs[-1]}"
