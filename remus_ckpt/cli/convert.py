"""The command `convert`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from remus_ckpt.cli.options import (
    AsJson,
    BlockOption,
    CodecOption,
    ForXen,
    GuestOption,
    HvmContext,
    MachineOptions,
    MaxMemory,
    Overwrite,
    PageSize,
    SnapshotOption,
    WordOption,
    app,
    dialect_of,
    keep_apart,
    keep_what_is_there,
    print_json,
    read_hvm_context,
    tidying_up,
)
from remus_ckpt.cli.terminal import complain, out
from remus_ckpt.errors import NoCheckpoint, RemusError
from remus_ckpt.limits import GIB, Limits
from remus_ckpt.plural import counted

if TYPE_CHECKING:
    from remus_ckpt.files import StreamFile
    from remus_ckpt.relay import XenOptions
    from remus_ckpt.relay.guest import Moment, Piece
    from remus_ckpt.relay.home import LateHome
    from remus_ckpt.relay.output import Output
    from remus_ckpt.wire.xen.dialect import Dialect

Target = Literal["raw", "elf", "lime", "remus", "qemu", "mapped-ram", "xen", "xen-v2"]
Source = Literal[Target, "virsh-save", "qcow2"]
PageCodec = Literal["rle", "delta", "none"]
_XENS = ("xen", "xen-v2")


@dataclass(frozen=True, slots=True)
class Wanted:
    """The options of the command line, under their own names."""

    path: str
    output: str
    to: Target
    source: Source | None
    checkpoint: int | None
    options: MachineOptions
    strict: bool
    max_memory: int
    dialect: Dialect
    xen: XenOptions
    live: bool = False


@app.command("convert", short_help="Write memory in another format.")
def convert(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="IN [CONNECTION]... OUT",
            help="What to read, and where to write it; - for standard input or output.",
        ),
    ],
    to: Annotated[Target, typer.Option("--to", help="The format to write.")],
    source: Annotated[
        Source | None,
        typer.Option("--from", help="What the input must be; raw for a memory image. [default: detected]"),
    ] = None,
    checkpoint: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=0,
            help="Number of the only checkpoint. [default: all that the format holds, or the last complete one]",
        ),
    ] = None,
    libxl: Annotated[
        bool, typer.Option("--libxl", help="xen-v2: with libxl's layer: one checkpoint, with its device state.")
    ] = False,
    live: Annotated[
        bool,
        typer.Option("--live", help="qemu: every checkpoint, as rounds of a live migration with XBZRLE pages."),
    ] = False,
    for_: ForXen = None,
    hvm_context: HvmContext = None,
    page_codec: Annotated[
        PageCodec | None,
        typer.Option("--page-codec", help="How to encode later checkpoints. [default: rle for xen, delta for remus]"),
    ] = None,
    block: BlockOption = None,
    snapshot: SnapshotOption = None,
    page_size: PageSize = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse if the format cannot hold everything.")] = False,
    word: WordOption = None,
    guest: GuestOption = None,
    codec: CodecOption = None,
    max_memory: MaxMemory = 64,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the memory of a stream, a QEMU virtual machine, a dump or an image in another format.

    raw is an image; elf is a core file for gdb, with a segment for each run of pages; lime is for forensic tools; remus
    is our save stream; qemu and mapped-ram hold a whole QEMU virtual machine; xen is Xen's legacy save stream, and
    xen-v2 that of Xen since 4.6. elf and lime have guest-physical addresses. The command names whatever a format cannot
    hold. Memory passes through temporary files beside the output, so it may be larger than this machine's. A truncated
    or corrupt stream gives its last good checkpoint; if it is corrupt, the exit code is 20.

    Examples: remus-ckpt convert guest.save guest.core --to elf;
    remus-ckpt convert disk.qcow2 --snapshot monday memory.lime --to lime;
    remus-ckpt convert old.save new.save --to xen-v2 --libxl;
    remus-ckpt export store:/var/lib/remus/web -o - | remus-ckpt convert - incoming.fifo --to qemu --live
    """
    if len(files) < 2:
        raise typer.BadParameter("name what to read and where to write it")
    path, *more, output = files
    options = MachineOptions(more, snapshot, page_size, block)
    keep_apart(output, path, *more)
    keep_what_is_there(overwrite, output)
    _refuse_what_means_nothing(to, libxl, for_, hvm_context, page_codec)
    if live and (to != "qemu" or checkpoint is not None):
        raise typer.BadParameter("--live is for --to qemu, and for all checkpoints")
    from remus_ckpt.convert import convert_file, held_for_xen
    from remus_ckpt.files import StreamFile
    from remus_ckpt.relay import XenOptions

    default = {"xen": "rle", "remus": "delta"}.get(to)
    xen = XenOptions(
        libxl=libxl,
        for_xen=for_ is not None,
        hvm_context=read_hvm_context(hvm_context),
        codec=None if page_codec == "none" else page_codec or default,  # type: ignore[arg-type]
    )
    dialect = dialect_of(word, guest, codec)
    wanted = Wanted(path, output, to, source, checkpoint, options, strict, max_memory, dialect, xen, live)
    with tidying_up(), ExitStack() as stack:
        file = None if source == "raw" else stack.enter_context(StreamFile(path))
        if file is not None:
            _refuse_another_format(file, source)
        if live and (file is None or file.holds_machine):
            raise RemusError(f"{path} has one checkpoint: --live is for Xen's streams and ours, which have several")
        if file is not None and not file.holds_machine and (live or to in (*_XENS, "remus")):
            options.refuse(path)
            write_stream(wanted, file, as_json)
            return
        if to in _XENS:
            form, leave, pieces = stack.enter_context(held_for_xen(wanted, as_json, file))
            write_pieces(wanted, form, pieces, as_json)
        else:
            report, leave = convert_file(wanted, as_json, file)
            if as_json and output != "-":
                print_json(report)
            elif output != "-":
                out.print(Text(f"{output}: {to}, {report['bytes']:,} bytes, {counted(report['runs'], 'run')} of pages"))
    if leave is not None:
        raise typer.Exit(leave)


def _refuse_another_format(file: StreamFile, source: Source | None) -> None:
    """Refuse, by its first bytes, a file that is not what --from says. Raises RemusError."""
    from remus_ckpt.wire.formats import MACHINE_WORDS

    wanted = "qemu" if source == "mapped-ram" else source  # they begin alike
    found = file.format.word if file.format is not None and file.holds_machine else None
    if source is not None and (wanted if wanted in MACHINE_WORDS else None) != found:
        is_what = "it does not begin like one" if found is None else f"it is {found}"
        raise RemusError(f"{file.name} is not {source}: {is_what}; leave out --from to detect its format")


def _refuse_what_means_nothing(
    to: Target, libxl: bool, for_: str | None, hvm_context: Path | None, page_codec: PageCodec | None
) -> None:
    if libxl and to != "xen-v2":
        raise typer.BadParameter("--libxl is for --to xen-v2")
    if for_ is not None and to not in _XENS:
        raise typer.BadParameter("--for xen is for --to xen and --to xen-v2")
    if hvm_context is not None and to not in _XENS:
        raise typer.BadParameter(f"{to} holds no HVM context: --hvm-context is for --to xen and --to xen-v2")
    if page_codec is not None and (to not in ("xen", "remus") or (to == "remus" and page_codec == "none")):
        raise typer.BadParameter("--page-codec is for --to xen and --to remus, which always has one")


def write_stream(wanted: Wanted, file: StreamFile, as_json: bool, *, is_single: bool = False) -> None:
    """Turn a stream of Xen's or ours into another, and report; exits with the code of a fault in it.

    is_single: write the last checkpoint only
    """
    from remus_ckpt.relay.home import LateHome, reading_again
    from remus_ckpt.relay.output import output_to, scratch_beside
    from remus_ckpt.relay.sources import xen_pieces
    from remus_ckpt.walk import walk_stream

    with ExitStack() as stack:
        out_file = stack.enter_context(output_to(wanted.output))
        refill = None
        if wanted.to in _XENS and file.size is not None:
            refill = reading_again(wanted.path, wanted.dialect, Limits(memory_bytes=wanted.max_memory * GIB))
        home = LateHome(stack.enter_context(scratch_beside(wanted.output)), refill)
        stack.callback(home.close)
        walk = walk_stream(file, wanted.dialect, wanted.max_memory, quiet=as_json, home=home)
        done, report = _relay(wanted, xen_pieces(walk), home, out_file, is_single)
        if not done:
            walk.say_how_it_ended()
            walk.fail_unless_good()
            raise NoCheckpoint(f"{walk.name}: no checkpoint {wanted.checkpoint}")
        if wanted.source not in (None, walk.format):
            raise RemusError(f"{wanted.path} is {walk.format}, not {wanted.source}")
    _report(wanted, done, {"format": walk.format} | report, as_json)
    walk.say_how_it_ended()
    walk.fail_unless_good()


def write_pieces(wanted: Wanted, form: str, pieces: Iterator[Piece], as_json: bool) -> None:
    """Write memory that is held already as a stream of Xen's, and report."""
    from remus_ckpt.relay.home import LateHome
    from remus_ckpt.relay.output import output_to, scratch_beside

    with ExitStack() as stack:
        out_file = stack.enter_context(output_to(wanted.output))
        home = LateHome(stack.enter_context(scratch_beside(wanted.output)), None)
        stack.callback(home.close)
        done, report = _relay(wanted, pieces, home, out_file, True)
    _report(wanted, done, {"format": form} | report, as_json)


def _relay(
    wanted: Wanted, pieces: Iterator[Piece], home: LateHome, file: Output, is_single: bool
) -> tuple[list[Moment], dict[str, Any]]:
    """Returns the last moment written, if any, and what there is to report."""
    from remus_ckpt.relay import FORMATS, relay
    from remus_ckpt.relay.guest import Losses
    from remus_ckpt.relay.qemu import QemuTarget

    what = "a migration of QEMU" if wanted.live else FORMATS[wanted.to].what
    losses = Losses(what, lambda text: complain(f"{wanted.output}: {text}"), wanted.strict)
    target = QemuTarget(file.write, home, losses, is_link=file.file is None) if wanted.live else None
    moments = (
        target.run(pieces)
        if target is not None
        else relay(
            pieces,
            file,
            wanted.to,
            home,
            losses=losses,
            options=wanted.xen,
            epoch=wanted.checkpoint,
            is_single=is_single,
        )
    )
    last: list[Moment] = []
    listed = []
    for moment in moments:
        last = [moment]
        listed.append({"epoch": moment.epoch, "end": file.written})
    report = {"bytes": file.written, "checkpoints": listed, "lost": losses.listed()}
    return last, report if target is None else report | {"migration": target.statistics}


def _report(wanted: Wanted, done: list[Moment], report: dict[str, Any], as_json: bool) -> None:
    if wanted.output == "-":
        return
    (last,) = done
    if as_json:
        fields = {"input": wanted.path, "output": wanted.output, "to": wanted.to, "memory_bytes": last.memory_bytes}
        print_json(fields | report)
        return
    first, end = report["checkpoints"][0]["epoch"], report["checkpoints"][-1]["epoch"]
    numbers = f"checkpoint {first}" + (f" to {end}" if end != first else "")
    text = f"{wanted.output}: {wanted.to}, {numbers}, {counted(last.pages, 'page')}, {report['bytes']:,} bytes"
    out.print(Text(text))
    if (migration := report.get("migration")) is not None:
        cache = migration["xbzrle-cache"]
        out.print(
            Text(
                f"xbzrle: {counted(cache['pages'], 'page')} in {cache['bytes']:,} bytes, "
                f"{counted(cache['overflow'], 'overflow')}; "
                f"{counted(cache['cache-miss'], 'page')} not in the cache; {'; '.join(migration['reasons'])}"
            )
        )


def write_for_xen(source: str, output: str, hvm_context: Path | None, max_memory: int, as_json: bool) -> None:
    """The last checkpoint of a stream of ours as one that a real Xen starts."""
    from remus_ckpt.files import StreamFile
    from remus_ckpt.relay import XenOptions
    from remus_ckpt.wire.xen.dialect import Dialect

    xen = XenOptions(for_xen=True, hvm_context=read_hvm_context(hvm_context), codec="rle")
    options = MachineOptions([], None, None, None)
    wanted = Wanted(source, output, "xen", None, None, options, False, max_memory, Dialect(), xen)
    write_stream(wanted, StreamFile(source), as_json, is_single=True)
