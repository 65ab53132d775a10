"""The commands for files: streams and images."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from remus_ckpt.cli.options import (
    AsJson,
    CodecOption,
    GuestOption,
    Insecure,
    MaxMemory,
    Overwrite,
    Stream,
    Strict,
    TlsDir,
    WordOption,
    app,
    dialect_of,
    keep_apart,
    keep_what_is_there,
    print_json,
    write_out,
)
from remus_ckpt.cli.store import (
    At,
    is_store,
    open_history,
    parse_at,
    read_checkpoint,
    restore_from_store,
    verify_store,
)
from remus_ckpt.cli.terminal import complain, out, progress
from remus_ckpt.errors import LimitExceeded, NoCheckpoint, RemusError, UnknownFormat
from remus_ckpt.limits import MAX_BUFFER_PAGES
from remus_ckpt.wire.xen.chunks import MAX_P2M_SIZE
from remus_ckpt.wire.xen.dialect import Guest, StreamCodec

if TYPE_CHECKING:
    from remus_ckpt.codec.reference import Reference
    from remus_ckpt.restorer import Checkpoint
    from remus_ckpt.walk import Pairs, Walk


@app.command(short_help="Make a stream from memory images.")
def encode(
    images: Annotated[list[Path], typer.Argument(help="Memory images, one per checkpoint.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Where to write the stream; - for standard output.")],
    codec: Annotated[StreamCodec, typer.Option(help="How to encode changed pages.")] = "delta",
    buffer_pages: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_BUFFER_PAGES, help="Pages to compress at a time. [default: 8196; 8192 for rle]"),
    ] = None,
    reference_pages: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_P2M_SIZE, help="Keep only the N most recently used pages as reference. [default: all]"
        ),
    ] = None,
    word: Annotated[int, typer.Option(help="Word size of the toolstack: 8 or 4 bytes.")] = 8,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make a stream from a series of memory images. Each image is compared with the one before to find dirty pages.

    The images are read piece by piece and their holes are skipped: about 150 MB of memory suffice for images of any
    size. The images must not change meanwhile.

    Example: remus-ckpt encode monday.img tuesday.img -o week.remus
    """
    from remus_ckpt.codec.reference import Lru
    from remus_ckpt.files import StreamWriter
    from remus_ckpt.image import Image, ImageReference, differences, full_batches
    from remus_ckpt.pages import PAGE_SIZE, pages_for
    from remus_ckpt.sender import Sender
    from remus_ckpt.walk import print_checkpoints

    dialect_of(word, None, None)
    keep_apart(output, *images)
    keep_what_is_there(overwrite, output)
    sizes = [path.stat().st_size for path in images]
    pages = max(pages_for(size) for size in sizes)
    if not pages:
        raise typer.BadParameter("the images are empty")
    padded = [size if pages_for(size) == pages else max(sizes) for size in sizes]
    for path, size, whole in zip(images, sizes, padded, strict=True):
        if whole != size:
            complain(f"{path}: {size} bytes; padded with zeros to {whole}")
    held = ImageReference()
    reference: Reference = Lru(reference_pages) if reference_pages else held
    sender = Sender(pages, codec=codec, word=word, buffer_pages=buffer_pages, reference=reference)  # type: ignore[arg-type]
    listed = []
    with ExitStack() as stack:
        stream = StreamWriter(output)
        stack.callback(stream.close)
        advance = stack.enter_context(progress(stream.name, pages * PAGE_SIZE * len(images), as_json))
        for number, path in enumerate(images):
            image = Image(path)
            stack.callback(image.close)
            start = stream.written

            def done(page: int, base: int = number * pages) -> None:
                advance((base + page) * PAGE_SIZE)

            scan = full_batches(differences(image, held.before, pages, done))
            for group in sender.checkpoint(scan, memory_bytes=padded[number]):
                sender.carried.clear()  # nothing is sent again here, and the list would grow with the image
                stream.write(group)
            sent = sender.sent
            assert sent is not None
            image.check(sizes[number])
            if held.before is not None:
                held.before.check()
                held.before.close()
            held.before = image
            stream.commit(sent)
            listed.append(
                {"image": str(path), "epoch": sent.epoch, "start": start, "end": stream.written}
                | {"pages": sent.pages, "entries": sent.entries, "batches": sent.batches}
                | {"compressed_chunks": sent.compressed_chunks, "compressed_bytes": sent.compressed_bytes}
            )
            done(pages)
    report = {"stream": output, "codec": codec, "p2m_size": pages, "checkpoints": listed}
    if output == "-":
        return
    if as_json:
        print_json(report)
    else:
        print_checkpoints(listed, False)


@app.command(short_help="Restore a checkpoint's memory to an image.")
def restore(
    stream: Stream,
    output: Annotated[str, typer.Option("--output", "-o", help="Where to write the image; - for standard output.")],
    checkpoint: Annotated[
        int | None, typer.Option(min=0, help="Number of the checkpoint. [default: the last complete one]")
    ] = None,
    at: At = None,
    device_state: Annotated[
        Path | None, typer.Option(help="Also write the checkpoint's device state to this file.")
    ] = None,
    overwrite: Overwrite = False,
    strict: Strict = False,
    word: WordOption = None,
    guest: GuestOption = None,
    codec: CodecOption = None,
    max_memory: MaxMemory = 64,
    tls_dir: TlsDir = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Restore the memory of a checkpoint, by default the last complete one, to a sparse image of mode 0600.

    The image file is filled as the stream is read, so the memory restored may be larger than this machine's.

    A truncated or corrupt stream yields its last good checkpoint; if it is corrupt, the exit code is still 20.
    From a store, `store:DIR/NAME`, any checkpoint it keeps can be restored, even while a backup writes to it; and from
    another machine through its backup, `tls://HOST:PORT/NAME`: all is checked here, and a broken connection is resumed.

    Examples: remus-ckpt restore orders.remus -o orders.img;
    remus-ckpt restore store:/var/lib/remus/orders --at 2026-01-31T12:00 -o orders.img;
    remus-ckpt restore tls://backup:7411/orders --tls-dir keys/me -o orders.img
    """
    keep_apart(output, stream)
    if device_state is not None:
        keep_apart(str(device_state), stream, output)
    if is_store(stream):
        _refuse_for_stores(strict, word, guest, codec)
    which = _which(stream, checkpoint, at)
    keep_what_is_there(overwrite, output, *([] if device_state is None else [device_state]))
    if is_store(stream):
        history = open_history(stream, tls_dir, insecure, max_memory)
        with _tidying_up():
            restore_from_store(stream, history, output, which, device_state, as_json)
        return
    from remus_ckpt.image_file import image_appearing
    from remus_ckpt.memory import save_image
    from remus_ckpt.walk import list_checkpoint, walk_stream

    is_file = output != "-" and (not Path(output).exists() or Path(output).is_file())
    with ExitStack() as stack:
        stack.enter_context(_tidying_up())
        home = stack.enter_context(image_appearing(output)) if is_file else None
        dialect = dialect_of(word, guest, codec)
        walk = walk_stream(stream, dialect, max_memory, strict=strict, quiet=as_json, home=home)
        found = _seek(walk, checkpoint)
        if home is not None:
            home.cut(found.memory_bytes)
        elif output == "-":
            sys.stdout.buffer.write(found.image.data)
            sys.stdout.buffer.flush()
        else:
            save_image(found.memory, output, found.memory_bytes)
    if device_state is not None:
        write_out(str(device_state), found.device_state)
    if as_json and output != "-":
        print_json(walk.summary([list_checkpoint(found)]) | {"restored": found.epoch, "image": output})
    elif output != "-":
        out.print(f"{output}: checkpoint {found.epoch}, {len(walk.restorer.memory):,} pages")
    walk.fail_unless_good()


@contextmanager
def _tidying_up() -> Iterator[None]:
    """After SIGTERM and SIGHUP too, an unfinished image is removed, as after Ctrl-C."""
    with ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                stack.callback(signal.signal, number, signal.signal(number, lambda got, _: sys.exit(128 + got)))
        yield


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


def _seek(walk: Walk, epoch: int | None) -> Checkpoint:
    """Put a checkpoint in force (None: the last good one), and report what is wrong with the stream on the way."""
    epochs = []
    for checkpoint in walk.checkpoints():
        epochs.append(checkpoint.epoch)
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
    chunks: Annotated[bool, typer.Option("--chunks", help="Also print every chunk and its offset.")] = False,
    strict: Strict = False,
    word: WordOption = None,
    guest: GuestOption = None,
    codec: CodecOption = None,
    max_memory: MaxMemory = 64,
    as_json: AsJson = False,
) -> None:
    """Print a stream's dialect and, for each checkpoint, its offsets, counts, ratio, parameters and tail.

    Example: remus-ckpt inspect guest.save.xz --chunks
    """
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

    walk = walk_stream(stream, dialect_of(word, guest, codec), max_memory, strict=strict, quiet=as_json, is_read=False)
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


@app.command("events", short_help="Print a stream's events as JSON lines.")
def print_events(
    stream: Stream,
    strict: Annotated[bool, typer.Option("--strict", envvar="REMUS_STRICT", help="As in verify.")] = False,
    word: Annotated[int | None, typer.Option("--word", envvar="REMUS_WORD", help="As in verify.")] = None,
    guest: Annotated[Guest | None, typer.Option("--guest", envvar="REMUS_GUEST", help="As in verify.")] = None,
    codec: Annotated[StreamCodec | None, typer.Option("--codec", envvar="REMUS_CODEC", help="As in verify.")] = None,
    max_memory: MaxMemory = 64,
) -> None:
    """Print one JSON line per event, and the SHA-256 of memory after each checkpoint.

    This is the decoder output that the conformance suite expects (specs/conformance.md).

    Example: remus-ckpt events guest.save.xz | jq .event
    """
    from remus_ckpt.memory import memory_sha256
    from remus_ckpt.walk import walk_stream
    from remus_ckpt.wire.xen import events
    from remus_ckpt.wire.xen.describe import describe

    walk = walk_stream(stream, dialect_of(word, guest, codec), max_memory, strict=strict, quiet=True)

    def held() -> str | None:
        return None if walk.restorer.in_force is None else memory_sha256(walk.restorer.in_force.image)

    for event in walk.events():
        line = describe(event)
        if isinstance(event, events.EndOfStream):
            line["memory_sha256"] = held()
        print(json.dumps(line))
        if walk.restorer.staged is not None:
            done = walk.restorer.commit()
            line = {"offset": done.end, "event": "checkpoint", "epoch": done.epoch}
            print(json.dumps(line | {"memory_sha256": memory_sha256(done.image)}))
    if walk.error is not None:
        kind = {UnknownFormat: "unknown-format", LimitExceeded: "limit"}.get(type(walk.error), "malformed")
        where = {"offset": walk.error.offset, "event": "error", "kind": kind, "section": walk.error.section}
        print(json.dumps(where | {"message": str(walk.error), "memory_sha256": held()}))
    sys.stdout.flush()
    walk.say_how_it_ended()
    walk.fail_unless_good()


@app.command(
    "conformance",
    short_help="Test an implementation of the format.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def run_conformance(context: typer.Context) -> None:
    """Test your decoder or encoder, of streams or of a page codec alone, against the vectors (specs/conformance.md)."""
    from remus_ckpt import conformance

    raise typer.Exit(conformance.main(context.args))


@app.command(short_help="Read and check an entire stream or store.")
def verify(
    stream: Stream,
    hashes: Annotated[bool, typer.Option("--hash", help="Print the SHA-256 of memory after each checkpoint.")] = False,
    strict: Strict = False,
    word: WordOption = None,
    guest: GuestOption = None,
    codec: CodecOption = None,
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
    if is_store(stream):
        _refuse_for_stores(strict, word, guest, codec, hashes)
        verify_store(stream, open_history(stream, tls_dir, insecure, max_memory), as_json)
        return
    from remus_ckpt.memory import memory_sha256
    from remus_ckpt.walk import list_checkpoint, print_checkpoints, print_deviations, print_head, walk_stream

    dialect = dialect_of(word, guest, codec)
    walk = walk_stream(stream, dialect, max_memory, strict=strict, quiet=as_json, is_read=hashes)
    listed = []
    for checkpoint in walk.checkpoints():
        row = list_checkpoint(checkpoint)
        if hashes:
            row["memory_sha256"] = memory_sha256(checkpoint.image)
        listed.append(row)
    summary = walk.summary(listed)
    if as_json:
        print_json(summary)
    elif walk.restorer.dialect.word is not None:
        print_head(walk)
        print_checkpoints(listed, hashes)
        print_deviations(walk)
        if walk.error is None:
            out.print(f"{len(listed)} checkpoints, {'complete' if summary['complete'] else 'incomplete'}")
    walk.say_how_it_ended()
    walk.fail_unless_good()


@app.command(short_help="Show where two checkpoints differ.")
def diff(
    first: Annotated[
        str, typer.Argument(metavar="STREAM|IMAGE", help="A stream or store:DIR/NAME, or the first of two images.")
    ],
    second: Annotated[str, typer.Argument(metavar="K1|IMAGE", help="Number of a checkpoint, or the second image.")],
    third: Annotated[int | None, typer.Argument(metavar="K2", help="Number of the other checkpoint.", min=0)] = None,
    word: WordOption = None,
    guest: GuestOption = None,
    codec: CodecOption = None,
    max_memory: MaxMemory = 64,
    tls_dir: TlsDir = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Print the pages and byte ranges that differ between two checkpoints of a stream or store, or between two images.

    Examples: remus-ckpt diff orders.remus 3 7;  remus-ckpt diff monday.img tuesday.img;
    remus-ckpt diff tls://backup:7411/orders 4710 4711 --tls-dir keys/me
    """
    if third is not None and not second.isdecimal():
        raise typer.BadParameter(f"{second!r} is not a checkpoint number")
    import numpy as np

    from remus_ckpt.image import Image, differences
    from remus_ckpt.memory import differing_ranges, joined
    from remus_ckpt.pages import PAGE_SIZE, pages_for
    from remus_ckpt.walk import differing, differing_pages, walk_stream

    pages = count = 0

    def ranges() -> Iterator[tuple[int, int]]:
        nonlocal pages, count
        for numbers, before, after in pairs:
            pages += len(numbers)
            count += int(np.count_nonzero(before != after))
            yield from differing_ranges(numbers, before, after)

    with ExitStack() as stack:
        pairs: Iterable[Pairs]
        if third is None:
            one, other = (stack.enter_context(Image(path)) for path in (first, second))
            sizes = [one.size, other.size]
            found = differences(other, one, pages_for(max(sizes)))
            pairs = ((at + differ, then[differ], now[differ]) for at, differ, then, now in found)
        elif is_store(first):
            _refuse_for_stores(False, word, guest, codec)
            history = open_history(first, tls_dir, insecure, max_memory)
            with history.reading():
                both = [read_checkpoint(first, history, epoch, as_json)[0] for epoch in (int(second), third)]
            pairs, sizes = differing(*both), [checkpoint.memory_bytes for checkpoint in both]
        else:
            walk = walk_stream(first, dialect_of(word, guest, codec), max_memory, quiet=as_json)
            pairs, sizes = differing_pages(walk, int(second), third)
        if as_json:
            listed = list(joined(ranges()))
            print_json({"pages": pages, "bytes": count, "ranges": listed, "memory_bytes": sizes})
            return
        lines = 0
        for start, stop in joined(ranges()):
            lines += 1
            print(f"{start:#012x}-{stop:#012x}  {stop - start:>8} bytes  pfn {start // PAGE_SIZE:#x}")
    out.print(f"{pages:,} pages differ: {count:,} bytes in {lines:,} ranges")
    if sizes[0] != sizes[1]:
        out.print(f"the first is {sizes[0]:,} bytes long, the second {sizes[1]:,}")


@app.command(short_help="Print pages from a checkpoint.")
def extract(
    stream: Stream,
    pfn: Annotated[str, typer.Option(help="Pages to print: 5, 0x10-0x1f (inclusive), or a comma-separated list.")],
    checkpoint: Annotated[
        int | None, typer.Option(min=0, help="Number of the checkpoint. [default: the last complete one]")
    ] = None,
    at: At = None,
    output: Annotated[str, typer.Option("--output", "-o", help="Where to write them; - for standard output.")] = "-",
    hexdump: Annotated[bool, typer.Option("--hex", help="Print a hexdump; the default on a terminal.")] = False,
    overwrite: Overwrite = False,
    word: WordOption = None,
    guest: GuestOption = None,
    codec: CodecOption = None,
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
    from remus_ckpt.pages import PAGE_SIZE
    from remus_ckpt.walk import walk_stream

    walk = fault = None
    if is_store(stream):
        _refuse_for_stores(False, word, guest, codec)
        found, fault = read_checkpoint(stream, open_history(stream, tls_dir, insecure, max_memory), which, as_json)
    else:
        walk = walk_stream(stream, dialect_of(word, guest, codec), max_memory, quiet=as_json)
        found = _seek(walk, checkpoint)
    numbers = _page_range(pfn, len(found.memory))
    # The last page may be shorter than 4,096 bytes.
    pieces = [found.image[number * PAGE_SIZE : (number + 1) * PAGE_SIZE].tobytes() for number in numbers]
    if as_json:
        pages = [{"pfn": number, "hex": piece.hex()} for number, piece in zip(numbers, pieces, strict=True)]
        print_json({"epoch": found.epoch, "pages": pages})
    elif hexdump or (output == "-" and sys.stdout.isatty()):
        lines = (line for number, piece in zip(numbers, pieces, strict=True) for line in _hexdump(number, piece))
        write_out(output, ("\n".join(lines) + "\n").encode())
    else:
        write_out(output, b"".join(pieces))
    if walk is not None:
        walk.fail_unless_good()
    elif fault is not None:
        raise typer.Exit(fault.exit_code)


def _page_range(text: str, pages: int) -> list[int]:
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(0x[0-9a-fA-F]+|\d+)(?:-(0x[0-9a-fA-F]+|\d+))?\s*", part)
        if not match:
            raise typer.BadParameter(f"--pfn {part!r}: write 5, 0x10-0x1f, or a comma-separated list")
        first = int(match[1], 0)
        last = int(match[2], 0) if match[2] else first
        if not first <= last < pages:
            raise typer.BadParameter(f"--pfn {part}: memory has pages 0x0-{pages - 1:#x}")
        numbers += range(first, last + 1)
    return numbers


def _hexdump(number: int, page: bytes) -> Iterator[str]:
    from remus_ckpt.pages import PAGE_SIZE

    repeated = False
    for start in range(0, len(page), 16):
        row = page[start : start + 16]
        if start and row == page[start - 16 : start] and start < len(page) - 16:
            if not repeated:
                yield "*"
            repeated = True
            continue
        repeated = False
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        yield f"{number * PAGE_SIZE + start:012x}  {row[:8].hex(' '):23}  {row[8:].hex(' '):23}  |{text}|"


@app.command(short_help="Show which codec kernel is in use and why.")
def check(
    require_native: Annotated[
        bool, typer.Option("--require-native", help="Fail if the C extension is missing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show which kernel runs the codecs and why, which others are available, and which CPU features were found.

    Set REMUS_CKPT_KERNEL to require one. Example: REMUS_CKPT_KERNEL=avx2 remus-ckpt check
    """
    from remus_ckpt.codec import kernels
    from remus_ckpt.source.track.written import why_not

    no_tracking = why_not()
    report = kernels.report() | {"tracking": "compare" if no_tracking else "kernel", "no_tracking": no_tracking}
    if as_json:
        print_json(report)
    else:
        out.print(Text(f"kernel: {report['kernel']} ({report['why']})"))
        out.print(Text(f"available: {', '.join(report['available'])}"))
        for name, reason in report["missing"].items():
            out.print(Text(f"missing: {name}: {reason}"))
        seen = [name for name, is_seen in report["features"].items() if is_seen]
        out.print(Text(f"changed pages: found by {f'comparison ({no_tracking})' if no_tracking else 'the kernel'}"))
        out.print(Text(f"machine: {report['machine']}, CPU features {', '.join(seen) or 'not checked'}"))
    if report["kernel"] is None:
        raise RemusError(report["why"])
    if require_native and not report["built"]:
        raise RemusError(report["not_built"])
