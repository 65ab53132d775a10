"""Memory from any file that is read here, written in another format (specs/formats.md §6)."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
from remus_ckpt.image import Image, ImageReference, differences, full_batches
from remus_ckpt.image import elf as elf_files
from remus_ckpt.image import lime as lime_files
from remus_ckpt.image.dump import DumpReader
from remus_ckpt.image.ranges import X86_64, Range, layout_of, placed, present
from remus_ckpt.image_file import ImageFile
from remus_ckpt.machines import Machine
from remus_ckpt.pages import PAGE_SIZE, Buffer, Pages, PageType, pages_for
from remus_ckpt.relay.guest import Head, Moment, Piece, stored_pages
from remus_ckpt.relay.output import naming_folder, output_to
from remus_ckpt.sender import Sender
from remus_ckpt.walk import walk_stream
from remus_ckpt.wire.qemu import events as qemu
from remus_ckpt.wire.qemu.writer import Memory, Saved, mapped_file, stream
from remus_ckpt.wire.xen import events as xen

QEMU_TARGETS = ("qemu", "mapped-ram")
_FROM_FILE = ("raw", "elf", "lime", "remus")
"""Formats for which memory is read piece by piece: an image stays where it is."""


class _Staged(ImageFile):
    """Memory in a temporary file, which knows the pages that came, zeros too."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.came: NDArray[np.bool_] = np.empty(0, dtype=bool)

    def open(self, pages: int) -> Pages:
        memory = super().open(pages)
        self.came = np.zeros(pages, dtype=bool)
        return memory

    def write(self, memory: Pages, pfns: NDArray[np.int64], data: Pages) -> None:
        super().write(memory, pfns, data)
        self.came[pfns] = True

    def reserve(self, pfns: NDArray[np.int64]) -> None:
        super().reserve(pfns)
        self.came[pfns] = True


@dataclass(slots=True)
class _Held:
    """What a file holds.

    path: of a file with memory in it: the input, or a temporary one (`is_staged`)
    pages: uint8[n, 4096], memory in the temporary file, the last page padded with zeros
    size: of memory in bytes
    came: bool[pages of `page_size`]
    others: further blocks of a machine, which only its own formats hold
    extras: what else there is, which no format here can hold
    saved: for the formats of QEMU
    leave: the exit code of a fault that the file has nevertheless
    """

    format: str
    path: Path
    pages: Pages
    size: int
    came: NDArray[np.bool_]
    page_size: int = PAGE_SIZE
    machine: str | None = None
    processor: int | None = None
    is_alone: bool = True
    device_state: bytes = b""
    time_ns: int | None = None
    others: list[str] = field(default_factory=list)
    extras: list[str] = field(default_factory=list)
    saved: Saved | None = None
    leave: int | None = None
    is_staged: bool = True


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
            complain(f"{output}: not in it, since {to} cannot hold it: {', '.join(lost)}")
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
    came: NDArray[np.bool_] = np.repeat(held.came, max(held.page_size // PAGE_SIZE, 1))
    if held.page_size < PAGE_SIZE:
        each = PAGE_SIZE // held.page_size
        came = np.logical_or.reduce(np.pad(came, (0, -len(came) % each)).reshape(-1, each), axis=1)
    types = np.where(came[: len(held.pages)], np.uint8(PageType.NOTAB), np.uint8(PageType.XTAB))
    moment = Moment(
        epoch=0,
        memory=held.pages,
        memory_bytes=held.size,
        types=types,
        is_last=True,
        device_state=held.device_state,
        notes=tuple((extra.removeprefix("the "), "") for extra in held.extras),
    )
    yield Head(format=held.format, pages=len(held.pages), guest="hvm")
    yield from stored_pages(moment)
    yield moment


# Reading


@contextmanager
def _held(wanted: Wanted, quiet: bool, file: StreamFile | None) -> Iterator[_Held]:
    output = wanted.output
    folder = None if output == "-" or Path(output).is_char_device() else Path(output).absolute().parent
    if folder is not None and not folder.is_dir():
        raise RemusError(f"there is no directory {folder}")
    with tempfile.TemporaryDirectory(prefix=".remus-ckpt-", dir=folder) as temporary, naming_folder(folder):
        yield _read(wanted, Path(temporary) / "memory", quiet, file)


def _read(wanted: Wanted, staged: Path, quiet: bool, opened: StreamFile | None) -> _Held:
    path, options, checkpoint = wanted.path, wanted.options, wanted.checkpoint
    home = _Staged(staged)
    try:
        if opened is None:
            options.refuse(path)
            return _read_raw(path, home, staged, wanted.to)
        with opened as file:
            if file.holds_machine:
                if checkpoint:
                    raise NoCheckpoint(f"{path}: it holds one state, number 0")
                if wanted.to in QEMU_TARGETS and not file.holds_dump:
                    held = _read_whole_machine(file, options, staged, wanted.max_memory, quiet)
                else:
                    held = _read_machine(file, options, home, staged, wanted.max_memory, quiet)
            else:
                options.refuse(path)
                held = _read_stream(file, checkpoint, home, staged, wanted, quiet)
    finally:
        home.close()
    if wanted.source not in (None, held.format):
        raise RemusError(f"{path} is {held.format}, not {wanted.source}")
    return held


def _read_raw(path: str, home: _Staged, staged: Path, to: Target) -> _Held:
    with Image(path) as image:
        pages = pages_for(image.size)
        if not pages:
            raise RemusError(f"{path}: the image is empty")
        came = np.ones(pages, dtype=bool)
        if to in _FROM_FILE:
            nothing = np.empty((0, PAGE_SIZE), dtype=np.uint8)
            return _Held("raw", Path(path), nothing, image.size, came, is_staged=False)
        memory = home.open(pages)
        for first, differ, _, now in differences(image, None, pages):
            home.write(memory, first + differ, now[differ])
        image.check()
        return _Held("raw", staged, memory, image.size, came)


def _read_machine(
    file: StreamFile, options: MachineOptions, home: _Staged, staged: Path, max_memory: int, quiet: bool
) -> _Held:
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
        staged,
        block.memory,
        block.size,
        block.came,
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
        extras.append("the device state, which is not whole in the input")
    return extras


def _read_whole_machine(file: StreamFile, options: MachineOptions, staged: Path, max_memory: int, quiet: bool) -> _Held:
    """All blocks, each in a file of its own, and what is needed to write the machine anew."""
    if options.block is not None:
        raise RemusError("--block is for formats that hold one block; those of QEMU hold all")
    homes: dict[str, _Staged] = {}
    number, says_switchover = 2, False

    def home(block: qemu.RamBlock) -> _Staged:
        homes[block.name] = _Staged(staged.with_name(f"{staged.name}-{len(homes)}"))
        return homes[block.name]

    def note(event: qemu.Event) -> None:
        nonlocal number, says_switchover
        match event:
            case qemu.Section(kind="START", name="ram"):
                number = event.id
            case qemu.Command(name="SWITCHOVER_START"):
                says_switchover = True

    try:
        with open_machine(file, options, max_memory, home) as machine:
            read_machine(machine, quiet, note)
    finally:
        for one in homes.values():
            one.close()
    say_how_it_ended(machine)
    leave = exit_code_of(machine)
    blocks = list(machine.blocks.named.values())
    if not any(block.came.any() for block in blocks):
        raise NoCheckpoint(f"{machine.name}: no memory came")
    page_size = blocks[0].page_size
    memories = [
        Memory(
            qemu.RamBlock(name=block.name, size=block.size, page_size=page_size, address=block.address),
            block.image.reshape(-1, page_size),
            block.came,
        )
        for block in blocks
    ]
    main = machine.blocks.main or blocks[0]
    return _Held(
        machine.format,
        staged,
        main.memory,
        main.size,
        main.came,
        page_size=page_size,
        extras=_around(machine),
        saved=Saved(machine.configuration, memories, machine.devices, page_size, number, says_switchover),
        leave=leave,
    )


def _read_stream(
    file: StreamFile, checkpoint: int | None, home: _Staged, staged: Path, wanted: Wanted, quiet: bool
) -> _Held:
    walk = walk_stream(file, wanted.dialect, wanted.max_memory, quiet=quiet, home=home)
    found = seek(walk, checkpoint)
    extras = []
    tail = found.tail
    if isinstance(tail, xen.TailHvm) and tail.context:
        extras.append(f"the HVM context ({len(tail.context):,} bytes)")
    elif isinstance(tail, xen.TailPv):
        extras.append(f"{len(tail.vcpus)} virtual CPUs, the shared info and the page types of a PV guest")
    if found.parameters:
        extras.append(f"the parameters {', '.join(found.parameters)}")
    return _Held(
        walk.format,
        staged,
        found.memory,
        found.memory_bytes,
        home.came[: len(found.memory)],
        device_state=found.device_state,
        time_ns=None if found.record is None else found.record.time_ns,
        extras=extras,
        leave=walk.exit_code,
    )


def _lost(held: _Held, to: Target) -> list[str]:
    state = [f"the device state ({len(held.device_state):,} bytes)"] if held.device_state and to != "remus" else []
    if to == "mapped-ram" and held.saved is not None:
        missing = {one.block.name: int(np.count_nonzero(~one.came)) for one in held.saved.memories}
        state += [f"that {count:,} pages of {name} never came" for name, count in missing.items() if count]
    return held.others + held.extras + state


def _saved_of(held: _Held) -> Saved:
    """What QEMU's formats need of memory that is no machine of QEMU: one block, and no devices."""
    block = qemu.RamBlock(name="pc.ram", size=held.pages.size, page_size=PAGE_SIZE)
    configuration = qemu.Configuration(machine="none")
    return Saved(configuration, [Memory(block, held.pages, held.came)], None, PAGE_SIZE)


# Writing


def _hand_over(held: _Held, output: str) -> int:
    """Memory as it has been read becomes the output. Returns its bytes."""
    os.truncate(held.path, held.size)
    sync_file(held.path)
    os.replace(held.path, output)
    sync_directory(Path(output).absolute().parent)
    return held.size


def _write(held: _Held, to: Target, output: str) -> tuple[int, int]:
    """Returns how many runs of pages there are, and the bytes of the file."""
    layout = layout_of(held.machine) if held.is_alone else None
    runs = list(present(held.came, held.page_size, placed(held.size, layout)))
    machine = held.processor or (X86_64 if layout is None else layout.elf_machine)
    parts: Iterable[Buffer | list[Buffer] | Range]
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
            saved = held.saved or _saved_of(held)
            if to == "mapped-ram" and saved.configuration is None:
                raise RemusError("a mapped-ram file states it in its configuration, and this stream has none")
            runs = [
                run
                for one in saved.memories
                for run in present(one.came, saved.page_size, placed(one.block.size, None))
            ]
            parts = stream(saved) if to == "qemu" else mapped_file(saved)
    with output_to(output) as out, Image(held.path) as image:
        for part in parts:
            if isinstance(part, Range):
                out.copy_sparse(image, part.start, part.stop)
            elif isinstance(part, list):
                out.write(part)
            else:
                out.write_sparse(part)
        if not held.is_staged:
            image.check(held.size)
        out.finish()
    return len(runs), out.written


def _stream(held: _Held) -> Iterator[list[Buffer]]:
    """A save stream of one checkpoint."""
    pages = pages_for(held.size)
    sender = Sender(pages, reference=ImageReference())
    with Image(held.path) as image:
        scan = full_batches(differences(image, None, pages))
        for group in sender.checkpoint(
            scan, device_state=held.device_state, memory_bytes=held.size, time_ns=held.time_ns
        ):
            sender.carried.clear()
            yield group
