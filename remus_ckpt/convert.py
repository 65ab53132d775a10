"""Memory from any file that is read here, written in another format (specs/formats.md §6)."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.cli.convert import Target, Wanted
from remus_ckpt.cli.machines import (
    ChosenBlock,
    exit_code_of,
    open_machine,
    read_machine,
    say_how_it_ended,
)
from remus_ckpt.cli.options import MachineOptions
from remus_ckpt.cli.streams import seek
from remus_ckpt.cli.terminal import complain
from remus_ckpt.disk import sync_directory, sync_file
from remus_ckpt.errors import NoCheckpoint, RemusError
from remus_ckpt.files import StreamFile
from remus_ckpt.image import Image, ImageReference, differences, full_batches, read_pages
from remus_ckpt.image import elf as elf_files
from remus_ckpt.image import lime as lime_files
from remus_ckpt.image.dump import DumpReader
from remus_ckpt.image.ranges import X86_64, Range, layout_of, placed, present
from remus_ckpt.image_file import ImageFile
from remus_ckpt.limits import MAX_BATCH_ENTRIES
from remus_ckpt.machines import Machine
from remus_ckpt.pages import PAGE_SIZE, Buffer, PageBatch, Pages, PageType, pages_for
from remus_ckpt.plural import counted
from remus_ckpt.qemu_sender import Part, QemuSender
from remus_ckpt.relay.guest import END_WITHIN_A_PAGE, Head, Moment, Piece
from remus_ckpt.relay.output import naming_folder, output_to
from remus_ckpt.sender import Sender
from remus_ckpt.walk import walk_stream
from remus_ckpt.wire.qemu import events as qemu
from remus_ckpt.wire.qemu.writer import Memory, Saved, mapped_file, stream
from remus_ckpt.wire.xen import events as xen

QEMU_TARGETS = ("qemu", "mapped-ram")


class _Staged(ImageFile):
    """Memory in a temporary file, which knows the pages that came, zeros too."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.came: NDArray[np.bool_] = np.empty(0, dtype=bool)

    def open(self, pages: int) -> Pages:
        memory = super().open(pages)
        self.came = np.zeros(pages, dtype=bool)
        return memory

    def image(self) -> Image:
        """The file, to be read."""
        assert self.path is not None
        return Image(self.path)

    def write(self, memory: Pages, pfns: NDArray[np.int64], data: Pages) -> None:
        super().write(memory, pfns, data)
        self.came[pfns] = True

    def reserve(self, pfns: NDArray[np.int64]) -> None:
        super().reserve(pfns)
        self.came[pfns] = True


@dataclass(slots=True)
class _Held:
    """What a file holds.

    image: the memory: the input itself, or a temporary file (`is_staged`)
    size: of memory in bytes
    came: bool[pages of `page_size`]
    filled: bool[n], which pages of 4,096 bytes may hold something other than zeros; None: any of them
    others: further blocks of a machine, which only its own formats hold
    extras: what else there is, which no format here can hold
    saved: for the formats of QEMU
    leave: the exit code of a fault that the file has nevertheless
    """

    format: str
    image: Image
    size: int
    came: NDArray[np.bool_]
    filled: NDArray[np.bool_] | None = None
    page_size: int = PAGE_SIZE
    machine: str | None = None
    processor: int | None = None
    is_alone: bool = True
    device_state: bytes = b""
    time_ns: int | None = None
    others: list[str] = field(default_factory=list)
    extras: list[str] = field(default_factory=list)
    saved: Saved | None = None
    images: dict[str, Image] = field(default_factory=dict)
    """Of the blocks in `saved`, by name."""
    leave: int | None = None
    is_staged: bool = True

    @property
    def pages(self) -> int:
        """Of 4,096 bytes, of memory."""
        return pages_for(self.size)

    def check(self) -> None:
        """Raise RemusError if the input has changed while it was read."""
        if not self.is_staged:
            self.image.check(self.size)


def convert_file(wanted: Wanted, quiet: bool, file: StreamFile | None) -> tuple[dict[str, Any], int | None]:
    """Do what `convert` does with memory alone. Returns its report, and the exit code of a fault that the input has
    nevertheless.

    file: the input as opened, which is closed here; None: a memory image
    """
    path, output, to = wanted.path, wanted.output, wanted.to
    with _held(wanted, quiet, file) as held:
        lost = _lost(held, to)
        if lost and wanted.strict:
            raise RemusError(f"{to} cannot hold all of {path}: {', '.join(lost)}")
        if lost:
            complain(f"{output}: left out, since {to} cannot hold it: {', '.join(lost)}")
        began = time.monotonic()
        runs, size = _write(held, to, output)
        seconds = time.monotonic() - began
    report = {"input": path, "format": held.format, "output": output, "to": to, "bytes": size, "runs": runs}
    report |= {"memory_bytes": held.size, "lost": lost, "write_seconds": round(seconds, 3)}
    return report, held.leave


@contextmanager
def held_for_xen(
    wanted: Wanted, quiet: bool, file: StreamFile | None
) -> Iterator[tuple[str, int | None, Iterator[Piece]]]:
    """A machine of QEMU or an image for one of Xen's streams: its format, the exit code of a fault, and its pieces."""
    with _held(wanted, quiet, file) as held:
        yield held.format, held.leave, _pieces(held)


def _pieces(held: _Held) -> Iterator[Piece]:
    """PFNs are those of offsets in the block of memory."""
    came = _in_pages(held.came, held.page_size, PAGE_SIZE, held.pages)
    moment = Moment(
        epoch=0,
        memory=np.empty((0, PAGE_SIZE), dtype=np.uint8),
        memory_bytes=held.size,
        types=np.where(came, np.uint8(PageType.NOTAB), np.uint8(PageType.XTAB)),
        is_last=True,
        device_state=held.device_state,
        notes=tuple((extra.removeprefix("the "), "") for extra in held.extras),
    )
    yield Head(format=held.format, pages=held.pages, guest="hvm", magic_pfns=moment.magic_pfns)
    pfns = np.flatnonzero(came)
    room = np.empty((MAX_BATCH_ENTRIES, PAGE_SIZE), dtype=np.uint8)  # a first checkpoint is written page by page
    for start in range(0, len(pfns), MAX_BATCH_ENTRIES):
        part = pfns[start : start + MAX_BATCH_ENTRIES]
        read_pages(held.image, part, room)
        yield PageBatch(part.astype(np.uint64), np.zeros(len(part), dtype=np.uint8), room[: len(part)])
    held.check()
    yield moment


def _in_pages(marks: NDArray[np.bool_], size: int, other: int, count: int) -> NDArray[np.bool_]:
    """Marks of pages of one size for pages of the other, bool[count]: those any part of which has the mark."""
    parts = np.repeat(marks, max(size // other, 1))
    each = max(other // size, 1)
    found: NDArray[np.bool_] = np.logical_or.reduce(np.pad(parts, (0, -len(parts) % each)).reshape(-1, each), axis=1)
    return found[:count]


# Reading


@contextmanager
def _held(wanted: Wanted, quiet: bool, file: StreamFile | None) -> Iterator[_Held]:
    output = wanted.output
    folder = None if output == "-" or Path(output).is_char_device() else Path(output).absolute().parent
    if folder is not None and not folder.is_dir():
        raise RemusError(f"there is no directory {folder}")
    with (
        tempfile.TemporaryDirectory(prefix=".remus-ckpt-", dir=folder) as temporary,
        naming_folder(folder),
        ExitStack() as stack,
    ):
        yield _read(wanted, Path(temporary) / "memory", quiet, file, stack)


def _read(wanted: Wanted, staged: Path, quiet: bool, opened: StreamFile | None, stack: ExitStack) -> _Held:
    path, options, checkpoint = wanted.path, wanted.options, wanted.checkpoint
    if opened is None:
        options.refuse(path)
        return _read_raw(stack.enter_context(Image(path)))
    with opened as file:
        if file.holds_machine:
            if checkpoint:
                raise NoCheckpoint(f"{path}: it holds one state, number 0")
            if wanted.to in QEMU_TARGETS and not file.holds_dump:
                held = _read_whole_machine(file, options, staged, wanted.max_memory, quiet, stack)
            else:
                held = _read_machine(file, options, _Staged(staged), wanted.max_memory, quiet, stack)
        else:
            options.refuse(path)
            held = _read_stream(file, checkpoint, _Staged(staged), wanted, quiet, stack)
    if wanted.source not in (None, held.format):
        raise RemusError(f"{path} is {held.format}, not {wanted.source}")
    return held


def _read_raw(image: Image) -> _Held:
    pages = pages_for(image.size)
    if not pages:
        raise RemusError(f"{image.path}: the image is empty")
    return _Held("raw", image, image.size, np.ones(pages, dtype=bool), is_staged=False)


def _read_machine(
    file: StreamFile, options: MachineOptions, home: _Staged, max_memory: int, quiet: bool, stack: ExitStack
) -> _Held:
    stack.callback(home.close)
    chosen = ChosenBlock(options.block, home)
    with open_machine(file, options, max_memory, chosen) as machine:
        read_machine(machine, quiet)
        block = chosen.block(machine)
    say_how_it_ended(machine)
    leave = exit_code_of(machine)
    if not block.came.any():
        raise NoCheckpoint(f"{machine.name}: the block {block.name!r} is not in the stream")
    others = [one for one in machine.blocks.named.values() if one is not block and one.came.any()]
    return _Held(
        machine.format,
        stack.enter_context(home.image()),
        block.size,
        block.came,
        home.has_room,
        page_size=block.page_size,
        machine=machine.reader.machine,
        processor=machine.reader.processor if isinstance(machine.reader, DumpReader) else None,
        is_alone=machine.blocks.main is block,
        device_state=b"" if machine.devices is None else machine.devices.data,
        others=[f"the block {one.name} ({one.size:,} bytes)" for one in others],
        extras=_around(machine),
        leave=leave,
    )


def _around(machine: Machine) -> list[str]:
    """What stands around the stream or is missing in it, and is in no other format."""
    if isinstance(machine.reader, DumpReader):
        return [f"the notes ({machine.reader.notes_bytes:,} bytes)"] if machine.reader.notes_bytes else []
    extras = [] if machine.around.virsh is None else ["the domain's XML"]
    if machine.devices is None:
        extras.append("the device state, which is incomplete in the input")
    return extras


def _read_whole_machine(
    file: StreamFile, options: MachineOptions, staged: Path, max_memory: int, quiet: bool, stack: ExitStack
) -> _Held:
    """All blocks, each in a file of its own, and what is needed to write the machine anew."""
    if options.block is not None:
        raise RemusError("--block is for formats that hold one block; QEMU's hold all")
    homes: dict[str, _Staged] = {}
    number, says_switchover = 2, False

    def home(block: qemu.RamBlock) -> _Staged:
        found = homes[block.name] = _Staged(staged.with_name(f"{staged.name}-{len(homes)}"))
        stack.callback(found.close)
        return found

    def note(event: qemu.Event) -> None:
        nonlocal number, says_switchover
        match event:
            case qemu.Section(kind="START", name="ram"):
                number = event.id
            case qemu.Command(name="SWITCHOVER_START"):
                says_switchover = True

    with open_machine(file, options, max_memory, home) as machine:
        read_machine(machine, quiet, note)
    say_how_it_ended(machine)
    leave = exit_code_of(machine)
    blocks = list(machine.blocks.named.values())
    if not any(block.came.any() for block in blocks):
        raise NoCheckpoint(f"{machine.name}: no memory came")
    page_size = blocks[0].page_size
    images = {block.name: stack.enter_context(homes[block.name].image()) for block in blocks}
    memories = [
        Memory(
            qemu.RamBlock(name=block.name, size=block.size, page_size=page_size, address=block.address),
            images[block.name].read_at,
            block.came,
            _in_pages(homes[block.name].has_room, PAGE_SIZE, page_size, len(block.came)),
        )
        for block in blocks
    ]
    main = machine.blocks.main or blocks[0]
    return _Held(
        machine.format,
        images[main.name],
        main.size,
        main.came,
        page_size=page_size,
        extras=_around(machine),
        saved=Saved(machine.configuration, memories, machine.devices, page_size, number, says_switchover),
        images=images,
        leave=leave,
    )


def _read_stream(
    file: StreamFile, checkpoint: int | None, home: _Staged, wanted: Wanted, quiet: bool, stack: ExitStack
) -> _Held:
    stack.callback(home.close)
    walk = walk_stream(file, wanted.dialect, wanted.max_memory, quiet=quiet, home=home)
    found = seek(walk, checkpoint)
    extras = []
    tail = found.tail
    if isinstance(tail, xen.TailHvm) and tail.context:
        extras.append(f"the HVM context ({len(tail.context):,} bytes)")
    elif isinstance(tail, xen.TailPv):
        extras.append(f"{counted(len(tail.vcpus), 'virtual CPU')}, the shared info and the page types of a PV guest")
    if found.parameters:
        extras.append(f"the parameters {', '.join(found.parameters)}")
    return _Held(
        walk.format,
        stack.enter_context(home.image()),
        found.memory_bytes,
        home.came[: len(found.memory)],
        home.has_room,
        device_state=found.device_state,
        time_ns=None if found.record is None else found.record.time_ns,
        extras=extras,
        leave=walk.exit_code,
    )


def _lost(held: _Held, to: Target) -> list[str]:
    lost = held.others + held.extras
    if held.device_state and to != "remus":
        lost.append(f"the device state ({len(held.device_state):,} bytes)")
    end = int(np.flatnonzero(held.came)[-1] + 1) * held.page_size if held.came.any() else 0
    if to in ("elf", "lime") and end < held.size:
        lost.append(f"the memory's size ({held.size:,} bytes, of which the last {held.size - end:,} never came)")
    if to in QEMU_TARGETS and held.saved is None and held.size % PAGE_SIZE:
        lost.append(f"the {END_WITHIN_A_PAGE} ({held.size:,} bytes)")
    # In our streams, pages that do not come are zeros.
    if to in ("raw", "remus", "mapped-ram") and held.format != "remus":
        blocks = {"memory": held.came}
        if to == "mapped-ram" and held.saved is not None:
            blocks = {one.block.name: one.came for one in held.saved.memories}
        missing = {name: int(np.count_nonzero(~marks)) for name, marks in blocks.items()}
        lost += [f"that {counted(count, 'page')} of {name} never came" for name, count in missing.items() if count]
    return lost


def _saved_of(held: _Held, to: Target) -> Saved:
    """What QEMU's formats need of memory that is no machine of QEMU: one block, and no devices."""
    block = qemu.RamBlock(name="pc.ram", size=held.pages * PAGE_SIZE, page_size=PAGE_SIZE)
    filled = None if held.filled is None else held.filled[: held.pages]
    if filled is None and to == "mapped-ram":
        filled = np.zeros(held.pages, dtype=bool)
        for first, differ, _, _ in differences(held.image, None, held.pages):
            filled[first + differ] = True
    came = _in_pages(held.came, held.page_size, PAGE_SIZE, held.pages)
    configuration = qemu.Configuration(machine="none")
    held.images = {block.name: held.image}
    return Saved(configuration, [Memory(block, held.image.read_at, came, filled)], None, PAGE_SIZE)


# Writing


def _hand_over(held: _Held, output: str) -> int:
    """Memory as it has been read becomes the output. Returns its bytes."""
    path = Path(held.image.path)
    os.truncate(path, held.size)
    sync_file(path)
    os.replace(path, output)
    sync_directory(Path(output).absolute().parent)
    return held.size


def _write(held: _Held, to: Target, output: str) -> tuple[int, int]:
    """Returns how many runs of pages there are, and the bytes of the file."""
    layout = layout_of(held.machine) if held.is_alone else None
    runs = list(present(held.came, held.page_size, placed(held.size, layout)))
    machine = held.processor or (X86_64 if layout is None else layout.elf_machine)
    parts: Iterable[Buffer | list[Buffer] | Range | Memory]
    match to:
        case "raw":
            parts = runs = [Range(0, 0, held.size)]
            if held.is_staged and output != "-" and (not Path(output).exists() or Path(output).is_file()):
                return 1, _hand_over(held, output)
        case "elf":
            parts = elf_files.core(runs, machine)
        case "lime":
            parts = lime_files.ranges(runs)
        case "remus":
            parts = _stream(held)
        case "qemu" | "mapped-ram":
            saved = held.saved or _saved_of(held, to)
            if to == "mapped-ram" and saved.configuration is None:
                raise RemusError("a mapped-ram file states it in its configuration, and this stream has none")
            runs = [
                run
                for one in saved.memories
                for run in present(one.came, saved.page_size, placed(one.block.size, None))
            ]
            parts = _migration(saved) if to == "qemu" else mapped_file(saved)
    with output_to(output) as out:
        for part in parts:
            match part:
                case Range():
                    out.copy_sparse(held.image, part.start, part.stop)
                case Memory():
                    out.copy_sparse(held.images[part.block.name], 0, part.block.size)
                case list():
                    out.write(part)
                case _:
                    out.write_sparse(part)
        held.check()
        out.finish()
    return len(runs), out.written


def _migration(saved: Saved) -> Iterator[list[Buffer]]:
    """A migration stream of a stopped guest."""
    if saved.page_size != PAGE_SIZE:
        yield from stream(saved)
        return
    sender = QemuSender(
        [memory.block for memory in saved.memories],
        configuration=saved.configuration,
        number=saved.number,
        says_switchover=saved.says_switchover,
        cache_bytes=0,
    )
    parts = (
        Part(memory.block.name, np.arange(first, first + len(pages)), pages)
        for memory in saved.memories
        for first, pages in memory.windows()
    )
    yield [sender.begin()]
    for buffer in sender.end(saved.devices, parts):
        yield [buffer]


def _stream(held: _Held) -> Iterator[list[Buffer]]:
    """A save stream of one checkpoint."""
    sender = Sender(held.pages, reference=ImageReference())
    scan = full_batches(differences(held.image, None, held.pages))
    for group in sender.checkpoint(scan, device_state=held.device_state, memory_bytes=held.size, time_ns=held.time_ns):
        sender.carried.clear()
        yield group
