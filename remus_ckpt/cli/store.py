"""The commands for stores, and what stream commands do with `store:DIR/NAME` and with a backup's ADDRESS/NAME."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.text import Text

from remus_ckpt.cli.convert import write_for_xen
from remus_ckpt.cli.options import (
    AsJson,
    DryRun,
    ForXen,
    HvmContext,
    Insecure,
    KeepAge,
    KeepCount,
    KeepFree,
    KeepSize,
    KeepTiers,
    Overwrite,
    TlsDir,
    address_of,
    app,
    keep_what_is_there,
    print_json,
    retention_of,
    usage,
    write_out,
)
from remus_ckpt.cli.terminal import complain, out, progress
from remus_ckpt.errors import BadCheckpoint, StoreError
from remus_ckpt.limits import GIB, Limits
from remus_ckpt.plural import counted

if TYPE_CHECKING:
    from remus_ckpt.restorer import Checkpoint
    from remus_ckpt.store import Entry, History, HistoryWriter, Removal, Report
    from remus_ckpt.store.history import Progress
    from remus_ckpt.store.remote import Remote
    from remus_ckpt.store.segments import Contents
    from remus_ckpt.walk import Pairs

T = TypeVar("T")
PREFIX = "store:"
_LISTED = 1_000

_HELP = "store:DIR/NAME on this machine, or tls://HOST:PORT/NAME (unix:PATH/NAME, tcp://…) on a backup."
HistoryName = Annotated[str, typer.Argument(metavar="store:DIR/NAME", help="One name in a store.")]
At = Annotated[
    str | None,
    typer.Option(
        "--at",
        metavar="EPOCH|TIME",
        help="Number of a checkpoint, or a time: the last one taken by then. Local time unless it names a zone.",
    ),
]


def is_address(text: str) -> bool:
    """Whether a command's argument is an address of a backup, with a name or without."""
    return text.startswith(("tls://", "tcp://", "unix:"))


def is_store(stream: str) -> bool:
    """Whether a command's argument names checkpoints in a store, here or on a backup, instead of a stream."""
    return stream.startswith(PREFIX) or is_address(stream)


def open_history(text: str, tls_dir: Path | None, insecure: bool, max_memory: int = 64) -> History:
    """`store:DIR/NAME`, or ADDRESS/NAME of a backup, to be read. Raises StoreError, LinkError."""
    limits = Limits(memory_bytes=max_memory * GIB)
    if is_address(text):
        return open_remote(text, tls_dir, insecure, limits)
    return _history(path_of(text), limits=limits)


def open_remote(text: str, tls_dir: Path | None, insecure: bool, limits: Limits | None = None) -> Remote:
    """ADDRESS[/NAME]. Raises typer.BadParameter, LinkError."""
    from remus_ckpt.link.address import split_name
    from remus_ckpt.store.remote import Remote

    address_of(split_name(text)[0], tls_dir, insecure)
    with usage():
        return Remote(text, tls_dir=tls_dir, insecure=insecure, limits=limits)


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
    text: str,
    history: History,
    output: str,
    at: int | datetime | None,
    device_state: Path | None,
    verify: bool,
    as_json: bool,
) -> None:
    """The command `restore`. If the newest checkpoint is bad, restores the last good one before it; exit code 20."""

    def read(entry: Entry, advance: Progress) -> Checkpoint:
        if output == "-" or (Path(output).exists() and not Path(output).is_file()):
            return history.restore(entry.epoch, progress=advance, verify=verify)
        return history.restore_image(output, entry.epoch, progress=advance, verify=verify)

    entry, found, fault = _read_good(text, history, at, as_json, read)
    if output == "-":
        write_out(output, found.image.data)
    elif Path(output).exists() and not Path(output).is_file():
        from remus_ckpt.memory import save_image

        save_image(found.memory, output, found.memory_bytes)
    if device_state is not None:
        write_out(str(device_state), found.device_state)
    if as_json and output != "-":
        print_json({"store": text, "restored": found.epoch, "time_ns": entry.time_ns, "image": output})
    elif output != "-":
        out.print(Text(f"{output}: checkpoint {found.epoch}, {counted(len(found.memory), 'page')}"))
    if fault is not None:
        raise typer.Exit(fault.exit_code)


def restore_image_of(
    text: str, history: History, path: Path, at: int | datetime | None, as_json: bool
) -> tuple[Entry, Checkpoint, BadCheckpoint | None]:
    """A checkpoint as an image file; if the newest is asked for and bad: the newest good one, and what is wrong."""
    return _read_good(
        text,
        history,
        at,
        as_json,
        lambda entry, advance: history.restore_image(path, entry.epoch, progress=advance, sync=False),
    )


def _read_good(
    text: str,
    history: History,
    at: int | datetime | None,
    as_json: bool,
    read: Callable[[Entry, Progress], T],
) -> tuple[Entry, T, BadCheckpoint | None]:
    """A checkpoint. If the newest is asked for and bad: the newest good one, and what is wrong."""
    fault: BadCheckpoint | None = None
    with history.reading():
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


def pages_in_store(
    text: str, history: History, at: int | datetime | None, numbers_of: Callable[[int], list[int]], as_json: bool
) -> tuple[int, list[int], list[bytes], BadCheckpoint | None]:
    """Some pages of a checkpoint: its epoch, their numbers and bytes; if the newest is asked for and bad: those of the
    newest good one, and what is wrong.

    numbers_of: which pages of so many
    """
    from remus_ckpt.pages import PAGE_SIZE

    def read(entry: Entry, advance: Progress) -> tuple[int, list[int], list[bytes]]:
        if is_address(text):
            found = history.restore(entry.epoch, progress=advance)
            numbers, image = numbers_of(len(found.memory)), found.image
            return found.epoch, numbers, [image[at * PAGE_SIZE : (at + 1) * PAGE_SIZE].tobytes() for at in numbers]
        with history.moment(entry.epoch) as moment:
            numbers = numbers_of(moment.pages)
            return entry.epoch, numbers, [moment.read_bytes(at * PAGE_SIZE, PAGE_SIZE) for at in numbers]

    _, found, fault = _read_good(text, history, at, as_json, read)
    return *found, fault


def differing_in_store(
    text: str, history: History, one: int, other: int, stack: ExitStack
) -> tuple[Iterator[Pairs], list[int]]:
    """The pages that differ between two checkpoints, ascending, and the sizes of both in bytes.

    stack: closes what is read from
    """
    from remus_ckpt.walk import differing

    if is_address(text):
        with history.reading():
            both = [history.restore(epoch) for epoch in (one, other)]
        return differing(*both), [checkpoint.memory_bytes for checkpoint in both]
    moments = [stack.enter_context(history.moment(epoch)) for epoch in (one, other)]
    return moments[0].differing(moments[1]), [moment.memory_bytes for moment in moments]


def verify_store(text: str, history: History, as_json: bool) -> None:
    """The command `verify`: exit code 20 if anything is bad."""
    with history.reading(), progress(text, history.size(), as_json) as advance:
        report = history.verify(progress=advance)
    if as_json:
        print_json(_report(text, report))
    else:
        held = (
            "no checkpoint is good" if report.newest is None else f"the newest good checkpoint is {report.newest.epoch}"
        )
        read = f"{counted(report.checkpoints, 'checkpoint')} in {counted(report.segments, 'segment')}"
        out.print(f"read {read}, {report.bytes:,} bytes; {held}")
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
        lost = f"; unreachable: {numbers(bad.unreachable)}" if bad.unreachable else ""
        complain(f"{where}{section}; {good}{lost}")
    if report.bad:
        raise typer.Exit(BadCheckpoint.exit_code)
    if report.newest is None:
        from remus_ckpt.store.history import nothing_in

        raise nothing_in(history.where)


@app.command(short_help="Remove old checkpoints from a store.")
def prune(
    store: HistoryName,
    keep: KeepTiers = None,
    keep_count: KeepCount = None,
    keep_age: KeepAge = None,
    keep_size: KeepSize = None,
    keep_free: KeepFree = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Remove old checkpoints, in whole segments. The segment with the newest checkpoint always stays.

    A segment goes as soon as --keep-count or --keep-age no longer covers it, unless --keep wants it. With --keep alone,
    a segment goes unless --keep wants it. Of those left, the oldest go until --keep-size and --keep-free are met. A
    running backup prunes by itself; --dry-run works beside it.

    Examples: remus-ckpt prune store:/var/lib/remus/orders --keep-age 7d --keep-size 20G;
    remus-ckpt prune store:/var/lib/remus/orders --keep hourly=48,daily=30 --keep-age 6h --dry-run
    """
    if all(one is None for one in (keep, keep_count, keep_age, keep_size, keep_free)):
        raise typer.BadParameter("say what to keep: --keep, --keep-count, --keep-age, --keep-size or --keep-free")
    retention = retention_of(keep, count=keep_count, age=keep_age, size=keep_size, free=keep_free)
    if dry_run:
        history = _history(path_of(store))
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
        removed = [segment_row(one.contents) | {"bytes": one.bytes, "rule": _OPTIONS[one.rule]} for one in removals]
        print_json({"store": store, "dry_run": dry_run, "removed": removed, "bytes": size, "checkpoints": left})
        return
    would = "would be " if dry_run else ""
    for one in removals:
        out.print(Text(f"{would}removed by {_OPTIONS[one.rule]}: {_words_for(one)}"))
    out.print(
        f"{counted(len(removals), 'segment')}, {size:,} bytes {would}removed; {counted(left, 'checkpoint')} {would}left"
    )


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
    taken = f"taken {time_text(one.first.time_ns)} to {time_text(one.last.time_ns)}"
    return f"{one.name}, {epochs}, {taken}, {removal.bytes:,} bytes"


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
        print_json({"store": store} | row_of(entry))
    else:
        out.print(Text(f"{entry.segment}: checkpoint {entry.epoch}, {entry.end:,} bytes"))


@app.command(short_help="Export a checkpoint from a store as a stream.")
def export(
    store: Annotated[str, typer.Argument(metavar="store:DIR/NAME", help=_HELP)],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Where to write the stream; - for standard output.")
    ],
    at: At = None,
    for_: ForXen = None,
    hvm_context: HvmContext = None,
    overwrite: Overwrite = False,
    max_memory: Annotated[int, typer.Option("--max-memory", metavar="GIB", min=1, help="As in restore.")] = 64,
    tls_dir: TlsDir = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Write a save stream that ends with the newest checkpoint, or with the one that --at names.

    The stream is the checkpoint's segment up to that point, checked on the way. If the newest checkpoint is bad or
    lost, the stream ends with the newest good one before it, and the exit code is 20. From a backup to standard output,
    the stream passes through a temporary file until it is checked. With --for xen, the stream holds that checkpoint
    alone, in a form from which a real Xen can start the guest.

    Examples: remus-ckpt export store:/var/lib/remus/orders -o orders.remus --at 4711;
    remus-ckpt export tls://backup:7411/orders -o orders.remus --tls-dir keys/me
    """
    keep_what_is_there(overwrite, output)
    history = open_history(store, tls_dir, insecure, max_memory)

    with ExitStack() as stack:
        target = output
        if for_ is not None:
            folder = None if output == "-" else Path(output).absolute().parent
            target = str(Path(stack.enter_context(TemporaryDirectory(dir=folder, prefix=".remus-export."))) / "stream")
        elif hvm_context is not None:
            raise typer.BadParameter("--hvm-context is for --for xen: our own streams hold no HVM context")

        def read(entry: Entry, advance: Progress) -> Entry:
            return history.export(target, entry.epoch, progress=advance)

        _, entry, fault = _read_good(store, history, parse_at(at), as_json, read)
        if for_ is not None:
            write_for_xen(target, output, hvm_context, max_memory, as_json)
            as_json, output = False, "-"  # it has reported
    if as_json and output != "-":
        print_json({"store": store, "stream": output} | row_of(entry))
    elif output != "-":
        out.print(Text(f"{output}: up to checkpoint {entry.epoch}, {entry.end:,} bytes"))
    if fault is not None:
        raise typer.Exit(fault.exit_code)


def path_of(text: str) -> Path:
    """The path in `store:DIR[/NAME]`. Raises typer.BadParameter."""
    if not text.startswith(PREFIX) or text == PREFIX:
        raise typer.BadParameter(f"{text!r} is not a store: write store:DIR or store:DIR/NAME")
    return Path(text.removeprefix(PREFIX))


def _writer(text: str) -> HistoryWriter:
    path = path_of(text)
    name = _history(path).name  # refuses a name that does not exist
    from remus_ckpt.store import HistoryWriter

    return HistoryWriter(path, name, compact_bytes=None)


def _say_warnings(text: str, writer: HistoryWriter) -> None:
    for warning in writer.warnings:
        complain(f"{text}: {warning}")


def segment_row(one: Contents) -> dict[str, Any]:
    """What a segment holds, for JSON."""
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


def row_of(entry: Entry) -> dict[str, Any]:
    """A checkpoint, for JSON."""
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


def numbers(epochs: range) -> str:
    """Epochs, for people: "", "7" or "7-9"."""
    return "" if not epochs else str(epochs[0]) if len(epochs) == 1 else f"{epochs[0]}-{epochs[-1]}"


def time_text(time_ns: int | None) -> str:
    if time_ns is None:
        return "-"
    try:
        return datetime.fromtimestamp(time_ns / 1e9).astimezone().isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return str(time_ns)
