"""The commands for files: streams and images."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from remus_ckpt.cli.options import (
    AsJson,
    BlockOption,
    CodecOption,
    GuestOption,
    Insecure,
    MachineOptions,
    MaxMemory,
    More,
    Overwrite,
    PageSize,
    SnapshotOption,
    Stream,
    Strict,
    TlsDir,
    WordOption,
    app,
    dialect_of,
    keep_apart,
    keep_what_is_there,
    naming_stream,
    print_json,
    tidying_up,
    write_out,
)
from remus_ckpt.cli.store import (
    At,
    differing_in_store,
    is_store,
    open_history,
    pages_in_store,
    parse_at,
    restore_from_store,
    verify_store,
)
from remus_ckpt.cli.terminal import out
from remus_ckpt.errors import NoCheckpoint
from remus_ckpt.limits import GIB, Limits
from remus_ckpt.plural import counted
from remus_ckpt.wire.xen.dialect import Dialect, Guest, StreamCodec

if TYPE_CHECKING:
    from remus_ckpt.files import StreamFile
    from remus_ckpt.image_file import ImageFile, SparseDiff
    from remus_ckpt.restorer import Checkpoint
    from remus_ckpt.walk import Pairs, Walk


@app.command(short_help="Restore a checkpoint's memory to an image.")
def restore(
    stream: Stream,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Where to write the image; - for standard output.")
    ],
    more: More = None,
    checkpoint: Annotated[
        int | None, typer.Option(metavar="K", min=0, help="Number of the checkpoint. [default: the last complete one]")
    ] = None,
    at: At = None,
    device_state: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the checkpoint's device state to this file.")
    ] = None,
    sparse_diff_from: Annotated[
        int | None,
        typer.Option(
            "--sparse-diff-from",
            metavar="K",
            min=0,
            help="Write only the pages that came after checkpoint K of a stream; leave holes for the others.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check all bytes up to the checkpoint, not only those that are needed.")
    ] = False,
    overwrite: Overwrite = False,
    strict: Strict = False,
    word: WordOption = None,
    guest: GuestOption = None,
    codec: CodecOption = None,
    block: BlockOption = None,
    snapshot: SnapshotOption = None,
    page_size: PageSize = None,
    max_memory: MaxMemory = 64,
    tls_dir: TlsDir = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Restore the memory of a checkpoint, by default the last complete one, to a sparse image of mode 0600.

    The image file is filled as the stream is read, so the memory restored may be larger than this machine's.

    A truncated or corrupt stream yields its last good checkpoint; if it is corrupt, the exit code is still 20. Any
    checkpoint that a store (`store:DIR/NAME`) keeps can be restored, even while a backup writes to it. Through the
    backup (`tls://HOST:PORT/NAME`), that works from another machine: everything is checked here, and a broken
    connection is resumed.

    With --sparse-diff-from K, the image is a diff over checkpoint K: it has data for the pages that came since, and
    holes elsewhere. `encode --sparse-diffs` reads such files.

    Examples: remus-ckpt restore orders.remus -o orders.img;
    remus-ckpt restore store:/var/lib/remus/orders --at 2026-01-31T12:00 -o orders.img;
    remus-ckpt restore tls://backup:7411/orders --tls-dir keys/me -o orders.img
    """
    keep_apart(output, stream)
    if device_state is not None:
        keep_apart(str(device_state), stream, output)
    options = MachineOptions(more or (), snapshot, page_size, block)
    if is_store(stream):
        _refuse_for_stores(strict, word, guest, codec)
        options.refuse(stream)
    which = _which(stream, checkpoint, at)
    if sparse_diff_from is not None:
        if is_store(stream):
            raise typer.BadParameter("--sparse-diff-from is for streams; `export` turns a store into one")
        if output == "-" or (os.path.exists(output) and not os.path.isfile(output)):
            raise typer.BadParameter("--sparse-diff-from needs a file: only a file has holes")
    keep_what_is_there(overwrite, output, *([] if device_state is None else [device_state]))
    if is_store(stream):
        history = open_history(stream, tls_dir, insecure, max_memory)
        with tidying_up():
            restore_from_store(stream, history, output, which, device_state, verify, as_json)
        return
    file, is_machine = _open(stream, options, checkpoint, strict=strict, word=word, guest=guest, codec=codec)
    if is_machine:
        from remus_ckpt.cli.machines import restore_machine

        if sparse_diff_from is not None:
            file.close()
            raise NoCheckpoint(f"{stream}: it has one checkpoint, and no pages that came after it")

        with tidying_up():
            restore_machine(
                file, options, output=output, device_state=device_state, max_memory=max_memory, as_json=as_json
            )
        return
    from remus_ckpt.image_file import image_appearing, sparse_diff
    from remus_ckpt.memory import save_image
    from remus_ckpt.walk import list_checkpoint, walk_stream

    is_file = output != "-" and (not Path(output).exists() or Path(output).is_file())
    with ExitStack() as stack:
        stack.enter_context(tidying_up())
        stack.callback(file.close)
        diff: SparseDiff | None = None
        home: ImageFile | None = None
        if sparse_diff_from is not None:
            diff = home = stack.enter_context(sparse_diff(output, sparse_diff_from))
        elif is_file:
            home = stack.enter_context(image_appearing(output))
        dialect = dialect_of(word, guest, codec)
        walk = walk_stream(file, dialect, max_memory, strict=strict, quiet=as_json, home=home)
        found = seek(walk, checkpoint, None if diff is None else diff.note)
        if diff is not None:
            diff.write_diff(output, found)
        elif home is not None:
            home.cut(found.memory_bytes)
        elif output == "-":
            write_out(output, found.image.data)
        else:
            save_image(found.memory, output, found.memory_bytes)
    if device_state is not None:
        write_out(str(device_state), found.device_state)
    if as_json and output != "-":
        print_json(walk.summary([list_checkpoint(found)]) | {"restored": found.epoch, "image": output})
    elif output != "-":
        out.print(f"{output}: checkpoint {found.epoch}, {counted(len(walk.restorer.memory), 'page')}")
    walk.fail_unless_good()


def _open(
    stream: str,
    options: MachineOptions,
    checkpoint: int | None = None,
    *,
    strict: bool = False,
    word: int | None = None,
    guest: Guest | None = None,
    codec: StreamCodec | None = None,
) -> tuple[StreamFile, bool]:
    """Open a file, and say whether it is one state of a machine. Options that it has no use for are refused."""
    from remus_ckpt.files import StreamFile

    file = StreamFile(stream)
    try:
        is_machine = file.holds_machine
        if not is_machine:
            options.refuse(file.name)
        if is_machine and checkpoint:
            raise NoCheckpoint(f"{file.name}: no checkpoint {checkpoint}; it holds one state, number 0")
        given = {"--strict": strict, "--word": word, "--guest": guest, "--codec": codec}
        for name, value in given.items():
            if is_machine and value:
                raise typer.BadParameter(f"{name} is for Xen save streams, and {file.name} is not one")
    except BaseException:
        file.close()
        raise
    return file, is_machine


def _which(stream: str, checkpoint: int | None, at: str | None) -> int | datetime | None:
    """The checkpoint that --checkpoint or --at names. Raises typer.BadParameter."""
    if at is not None and checkpoint is not None:
        raise typer.BadParameter("give --at or --checkpoint, not both")
    if at is not None and not is_store(stream):
        raise typer.BadParameter("--at is for stores; use --checkpoint with a stream")
    return checkpoint if at is None else parse_at(at)


def _refuse_for_stores(
    strict: bool, word: int | None, guest: Guest | None, codec: StreamCodec | None, hashes: bool = False
) -> None:
    """Refuse options that apply to streams only and would be ignored for a store. Raises typer.BadParameter."""
    given = {"--strict": strict, "--word": word, "--guest": guest, "--codec": codec, "--hash": hashes}
    for name, value in given.items():
        if value:
            raise typer.BadParameter(f"{name} is for streams, not stores; `export` turns a store into a stream")


def seek(walk: Walk, epoch: int | None, note: Callable[[Checkpoint], None] | None = None) -> Checkpoint:
    """Put a checkpoint in force (None: the last good one), and report what is wrong with the stream on the way.

    note: called with every checkpoint up to it
    """
    epochs = []
    for checkpoint in walk.checkpoints():
        epochs.append(checkpoint.epoch)
        if note is not None:
            note(checkpoint)
        if checkpoint.epoch == epoch:
            return checkpoint
    walk.say_how_it_ended()
    found = walk.restorer.in_force
    if found is None or epoch is not None:
        walk.fail_unless_good()
        raise NoCheckpoint(f"{walk.name}: no checkpoint {epoch}; the stream holds {epochs[0]} to {epochs[-1]}")
    return found


@app.command(short_help="Describe a stream and its checkpoints.")
def inspect(
    stream: Stream,
    more: More = None,
    chunks: Annotated[bool, typer.Option("--chunks", help="Also print every chunk and its offset.")] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Write a report as one HTML file instead: time lines, ratio, where memory changes, and how "
            "small each page codec would have made it.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    strict: Strict = False,
    word: WordOption = None,
    guest: GuestOption = None,
    codec: CodecOption = None,
    snapshot: SnapshotOption = None,
    page_size: PageSize = None,
    max_memory: MaxMemory = 64,
    as_json: AsJson = False,
) -> None:
    """Print a stream's dialect and, for each checkpoint, its offsets, counts, ratio, parameters and tail.

    Example: remus-ckpt inspect guest.save.xz --chunks

    Example: remus-ckpt inspect orders.remus --html orders.html
    """
    options = MachineOptions(more or (), snapshot, page_size)
    dialect = dialect_of(word, guest, codec)
    if html is not None:
        _write_report(stream, html, dialect, max_memory, overwrite)
        return
    file, is_machine = _open(stream, options, strict=strict, word=word, guest=guest, codec=codec)
    if is_machine:
        from remus_ckpt.cli.machines import inspect_machine

        inspect_machine(file, options, chunks=chunks, max_memory=max_memory, as_json=as_json)
        return
    from remus_ckpt.walk import (
        detail_checkpoint,
        list_checkpoint,
        print_checkpoints,
        print_details,
        print_deviations,
        print_head,
        shorten,
        walk_stream,
    )
    from remus_ckpt.wire.xen.describe import describe

    walk = walk_stream(file, dialect, max_memory, strict=strict, quiet=as_json, is_read=False)
    listed, seen = [], []
    for event in walk.events():
        if chunks:
            row = describe(event)
            seen.append(row)
            if not as_json:
                rest = " ".join(f"{name}={shorten(row[name])}" for name in row if name not in ("offset", "event"))
                out.print(Text(f"{row['offset']:>12}  {row['event']} {rest}".rstrip()))
        if walk.restorer.staged is not None:
            listed.append(list_checkpoint(walk.restorer.staged) | detail_checkpoint(walk.restorer.staged))
    if as_json:
        print_json(walk.summary(listed) | ({"chunks": seen} if chunks else {}))
    elif walk.restorer.dialect.word is not None:
        print_head(walk)
        print_checkpoints(listed, False)
        print_details(listed)
        print_deviations(walk)
    walk.say_how_it_ended()
    walk.fail_unless_good()


def _write_report(stream: str, path: Path, dialect: Dialect, max_memory: int, overwrite: bool) -> None:
    from remus_ckpt.recording import read_recording
    from remus_ckpt.report import report

    keep_apart(str(path), stream)
    keep_what_is_there(overwrite, path)
    with naming_stream(stream):
        found = read_recording(stream, dialect=dialect, limits=Limits(memory_bytes=max_memory * GIB))
    if not found.checkpoints:
        raise NoCheckpoint(f"{stream}: no checkpoint is complete")
    write_out(str(path), report(stream, found).encode())
    out.print(Text(f"{path}: a report of {counted(found.checkpoints, 'checkpoint')}"))


@app.command(short_help="Read and check an entire stream or store.")
def verify(
    stream: Stream,
    more: More = None,
    hashes: Annotated[bool, typer.Option("--hash", help="Print the SHA-256 of memory after each checkpoint.")] = False,
    strict: Strict = False,
    word: WordOption = None,
    guest: GuestOption = None,
    codec: CodecOption = None,
    snapshot: SnapshotOption = None,
    page_size: PageSize = None,
    max_memory: MaxMemory = 64,
    tls_dir: TlsDir = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Read and decode an entire stream, or every segment of a store (`store:DIR/NAME`, or `tls://HOST:PORT/NAME`).

    A stream that ends in the middle of a checkpoint is reported as incomplete, but what comes before is good: exit
    code 0. If no checkpoint is complete, there is nothing to restore: exit code 20.

    Example: remus-ckpt verify orders.remus --hash --json
    """
    options = MachineOptions(more or (), snapshot, page_size)
    if is_store(stream):
        _refuse_for_stores(strict, word, guest, codec, hashes)
        options.refuse(stream)
        verify_store(stream, open_history(stream, tls_dir, insecure, max_memory), as_json)
        return
    dialect = dialect_of(word, guest, codec)
    file, is_machine = _open(stream, options, strict=strict, word=word, guest=guest, codec=codec)
    if is_machine:
        from remus_ckpt.cli.machines import verify_machine

        verify_machine(file, options, hashes=hashes, max_memory=max_memory, as_json=as_json)
        return
    from remus_ckpt.memory import memory_sha256
    from remus_ckpt.walk import list_checkpoint, print_checkpoints, print_deviations, print_head, walk_stream

    walk = walk_stream(file, dialect, max_memory, strict=strict, quiet=as_json, is_read=hashes)
    listed = []
    for checkpoint in walk.checkpoints():
        row = list_checkpoint(checkpoint)
        if hashes:
            row["memory_sha256"] = memory_sha256(checkpoint.image)
            row["blocks"] = {"memory": {"bytes": checkpoint.memory_bytes, "sha256": row["memory_sha256"]}}
        listed.append(row)
    summary = walk.summary(listed)
    if as_json:
        print_json(summary)
    elif walk.restorer.dialect.word is not None:
        print_head(walk)
        print_checkpoints(listed, hashes)
        print_deviations(walk)
        if walk.error is None:
            out.print(f"{counted(len(listed), 'checkpoint')}, {'complete' if summary['complete'] else 'incomplete'}")
    walk.say_how_it_ended()
    walk.fail_unless_good()


@app.command(short_help="Show where two checkpoints differ.")
def diff(
    first: Annotated[
        str,
        typer.Argument(
            metavar="STREAM|IMAGE", help="A stream or store:DIR/NAME, or the first of two images or machines."
        ),
    ],
    second: Annotated[
        str, typer.Argument(metavar="K1|IMAGE", help="Number of a checkpoint, or the second image or machine.")
    ],
    third: Annotated[
        str | None,
        typer.Argument(
            metavar="K2", help="Number of the other checkpoint. In a qcow2 image, K1 and K2 name snapshots."
        ),
    ] = None,
    word: WordOption = None,
    guest: GuestOption = None,
    codec: CodecOption = None,
    block: BlockOption = None,
    page_size: PageSize = None,
    max_memory: MaxMemory = 64,
    tls_dir: TlsDir = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Print the pages and byte ranges that differ between two checkpoints of a stream or store, or between two images.

    A QEMU virtual machine, an ELF core or a LiME file can take the place of an image. Two snapshots of a qcow2 image
    can be compared too.

    Examples: remus-ckpt diff orders.remus 3 7;  remus-ckpt diff monday.img tuesday.img;
    remus-ckpt diff tls://backup:7411/orders 4710 4711 --tls-dir keys/me
    """
    import numpy as np

    from remus_ckpt.image import Image, differences
    from remus_ckpt.memory import differing_ranges, joined
    from remus_ckpt.pages import PAGE_SIZE, pages_for
    from remus_ckpt.walk import differing_pages, walk_stream

    options = MachineOptions((), None, page_size, block)
    if third is None and (is_store(first) or (second.isdecimal() and not os.path.exists(second))):
        raise typer.BadParameter(f"say which two checkpoints of {first}: {second} and another one")
    machines = None if is_store(first) else _machines_of(first, second if third is None else None)
    if third is not None and not machines:
        for number in (second, third):
            if not number.isdecimal():
                raise typer.BadParameter(f"{number!r} is not a checkpoint number")
    if not machines:
        options.refuse(first)
    pages = count = 0

    def ranges() -> Iterator[tuple[int, int]]:
        nonlocal pages, count
        for numbers, before, after in pairs:
            pages += len(numbers)
            count += int(np.count_nonzero(before != after))
            yield from differing_ranges(numbers, before, after)

    with ExitStack() as stack:
        pairs: Iterable[Pairs]
        if machines:
            from remus_ckpt.cli.machines import differing_machines

            snapshots = (None, None) if third is None else (second, third)
            pairs, sizes = differing_machines(machines, snapshots, options, max_memory, as_json)
        elif third is None:
            one, other = (stack.enter_context(Image(path)) for path in (first, second))
            sizes = [one.size, other.size]
            found = differences(other, one, pages_for(max(sizes)))
            pairs = ((at + differ, then[differ], now[differ]) for at, differ, then, now in found)
        elif is_store(first):
            _refuse_for_stores(False, word, guest, codec)
            history = open_history(first, tls_dir, insecure, max_memory)
            pairs, sizes = differing_in_store(first, history, int(second), int(third), stack)
        else:
            walk = walk_stream(first, dialect_of(word, guest, codec), max_memory, quiet=as_json)
            pairs, sizes = differing_pages(walk, int(second), int(third))
        if as_json:
            listed = list(joined(ranges()))
            print_json({"pages": pages, "bytes": count, "ranges": listed, "memory_bytes": sizes})
            return
        lines = 0
        for start, stop in joined(ranges()):
            lines += 1
            print(f"{start:#012x}-{stop:#012x}  {stop - start:>8} bytes  pfn {start // PAGE_SIZE:#x}")
    out.print(f"{counted(pages, 'page', 'differ')}: {counted(count, 'byte')} in {counted(lines, 'range')}")
    if sizes[0] != sizes[1]:
        out.print(f"the first is {sizes[0]:,} bytes long, the second {sizes[1]:,}")


def _machines_of(first: str, second: str | None) -> tuple[str, str] | None:
    """Both files if one of them is one state of a machine, the first twice if there is but one; else None."""
    from remus_ckpt.files import StreamFile

    names = (first, first if second is None else second)
    for name in dict.fromkeys(names):
        if name == "-" or not os.path.isfile(name):
            continue
        with StreamFile(name) as file:
            if file.holds_machine:
                return names
    return None


@app.command(short_help="Print pages from a checkpoint.")
def extract(
    stream: Stream,
    pfn: Annotated[
        str, typer.Option(metavar="PAGES", help="Pages to print: 5, 0x10-0x1f (inclusive), or a comma-separated list.")
    ],
    more: More = None,
    checkpoint: Annotated[
        int | None, typer.Option(metavar="K", min=0, help="Number of the checkpoint. [default: the last complete one]")
    ] = None,
    at: At = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Where to write them; - for standard output.")
    ] = "-",
    hexdump_wanted: Annotated[bool, typer.Option("--hex", help="Print a hexdump; the default on a terminal.")] = False,
    overwrite: Overwrite = False,
    word: WordOption = None,
    guest: GuestOption = None,
    codec: CodecOption = None,
    block: BlockOption = None,
    snapshot: SnapshotOption = None,
    page_size: PageSize = None,
    max_memory: MaxMemory = 64,
    tls_dir: TlsDir = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Print pages from a checkpoint of a stream or store as raw bytes or as a hexdump.

    Examples: remus-ckpt extract orders.remus --pfn 0x10-0x1f --checkpoint 3 --hex;
    remus-ckpt extract tls://backup:7411/orders --pfn 5 --at 4711 --tls-dir keys/me
    """
    keep_apart(output, stream)
    which = _which(stream, checkpoint, at)
    keep_what_is_there(overwrite, output)
    from remus_ckpt.cli.pages import hexdump, page_range
    from remus_ckpt.pages import PAGE_SIZE
    from remus_ckpt.walk import walk_stream

    options = MachineOptions(more or (), snapshot, page_size, block)
    epoch, leave = 0, None
    if is_store(stream):
        _refuse_for_stores(False, word, guest, codec)
        options.refuse(stream)
        history = open_history(stream, tls_dir, insecure, max_memory)
        epoch, numbers, pieces, fault = pages_in_store(
            stream, history, which, lambda pages: page_range(pfn, pages), as_json
        )
        leave = None if fault is None else fault.exit_code
    else:
        dialect = dialect_of(word, guest, codec)
        file, is_machine = _open(stream, options, checkpoint, word=word, guest=guest, codec=codec)
        if is_machine:
            from remus_ckpt.cli.machines import exit_code_of, machine_pages

            machine, memory = machine_pages(file, options, max_memory, as_json)
            image, pages, leave = memory.image, len(memory.memory), exit_code_of(machine)
        else:
            walk = walk_stream(file, dialect, max_memory, quiet=as_json)
            found = seek(walk, checkpoint)
            epoch, image, pages, leave = found.epoch, found.image, len(found.memory), walk.exit_code
        numbers = page_range(pfn, pages)
        # The last page may be shorter than 4,096 bytes.
        pieces = [image[number * PAGE_SIZE : (number + 1) * PAGE_SIZE].tobytes() for number in numbers]
    if as_json:
        listed = [{"pfn": number, "hex": piece.hex()} for number, piece in zip(numbers, pieces, strict=True)]
        print_json({"epoch": epoch, "pages": listed})
    elif hexdump_wanted or (output == "-" and sys.stdout.isatty()):
        lines = (line for number, piece in zip(numbers, pieces, strict=True) for line in hexdump(number, piece))
        write_out(output, ("\n".join(lines) + "\n").encode())
    else:
        write_out(output, b"".join(pieces))
    if leave is not None:
        raise typer.Exit(leave)
