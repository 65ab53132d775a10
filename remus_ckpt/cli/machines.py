"""What `inspect`, `verify`, `restore`, `extract` and `diff` do with one state of a machine (specs/formats.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.text import Text

from remus_ckpt.blocks import Block, is_device
from remus_ckpt.cli.options import MachineOptions, print_json, write_out
from remus_ckpt.cli.terminal import complain, out, progress
from remus_ckpt.errors import LimitExceeded, NoCheckpoint, NothingToRestore, RemusError, StreamError
from remus_ckpt.files import StreamFile
from remus_ckpt.image import Image
from remus_ckpt.image.dump import Bytes, DumpReader
from remus_ckpt.image.qcow2 import Qcow2, Snapshot
from remus_ckpt.image.ranges import PROCESSORS
from remus_ckpt.limits import GIB, MAX_BATCH_ENTRIES, MIB, Limits
from remus_ckpt.machines import Machine
from remus_ckpt.memory import save_image, zeros
from remus_ckpt.pages import Pages, pages_for
from remus_ckpt.plural import counted
from remus_ckpt.restorer import Anonymous, Home
from remus_ckpt.wire.qemu import events

HomeOf = Callable[[events.RamBlock], Home | None]
Pairs = Iterator[tuple[NDArray[np.int64], Pages, Pages]]
_TITLES = {
    "qemu": "QEMU migration stream",
    "virsh-save": "virsh save image",
    "qcow2": "qcow2 image",
    "multifd": "connection of a QEMU multifd migration",
    "elf": "ELF core",
    "lime": "LiME dump",
}
_SHOWN_BYTES = 32
"""Bytes of a value that are printed."""


class ChosenBlock:
    """Provides a home for the requested memory: the block of that name, or the guest's memory if it is one block."""

    def __init__(self, wanted: str | None, home: Home) -> None:
        self.name = wanted
        self._home = home
        self._is_told = wanted is not None
        self._seen: list[str] = []
        self._others: list[str] = []

    def __call__(self, stated: events.RamBlock) -> Home | None:
        name = stated.name
        self._seen.append(name)
        if not self._is_told and not is_device(name):
            if self.name is None:
                self.name = name
            else:
                self._others.append(name)
        return self._home if name == self.name else None

    def block(self, machine: Machine) -> Block:
        """The block. Raises RemusError if memory is several blocks, or no such block is there."""
        if self._others:
            listed = ", ".join([self.name or "", *self._others])
            raise RemusError(f"{machine.name}: the guest's memory is several blocks: choose one with --block: {listed}")
        if self.name not in machine.blocks.named:
            machine_fault(machine)
            what = f"no block {self.name!r}" if self._is_told else "no block that is the guest's memory"
            raise NoCheckpoint(f"{machine.name}: {what}; there are: {', '.join(self._seen) or 'none'}")
        return machine.blocks.named[self.name or ""]


def open_machine(file: StreamFile, options: MachineOptions, max_memory: int, home: HomeOf) -> Machine:
    """The machine in a file. max_memory: in GiB"""
    return Machine(
        file,
        options.more,
        home=home,
        snapshot=options.snapshot,
        page_size=options.page_size,
        limits=Limits(memory_bytes=max_memory * GIB),
    )


def read_machine(machine: Machine, quiet: bool, note: Callable[[events.Event], None] | None = None) -> None:
    with progress(machine.name, machine.file.size, quiet) as advance:
        for event in machine.read_events():
            advance(machine.file.position())
            if note is not None:
                note(event)


def verify_machine(file: StreamFile, options: MachineOptions, *, hashes: bool, max_memory: int, as_json: bool) -> None:
    """`verify`"""
    with open_machine(file, options, max_memory, lambda _: Anonymous() if hashes else None) as machine:
        read_machine(machine, as_json)
        summary = _summary(machine, hashes)
    if as_json:
        print_json(summary)
    else:
        _print_head(machine)
        _print_blocks(machine, summary)
        if machine.error is None:
            out.print("complete" if summary["complete"] else "incomplete")
    say_how_it_ended(machine)
    machine_fault(machine)


def inspect_machine(file: StreamFile, options: MachineOptions, *, chunks: bool, max_memory: int, as_json: bool) -> None:
    """`inspect`"""
    limits = Limits(memory_bytes=max_memory * GIB)
    if file.format is not None and file.format.word == "qcow2" and options.snapshot is None and file.can_seek:
        with suppress(StreamError), Qcow2(f"/proc/self/fd/{file.fileno()}", limits) as image:
            listed = [_snapshot_row(one) for one in image.snapshots]
            file.close()
            if as_json:
                print_json({"format": "qcow2", "snapshots": listed})
            else:
                _print_snapshots(listed)
            return
    seen: list[dict[str, Any]] = []

    def note(event: events.Event) -> None:
        row = _describe(event)
        if as_json:
            seen.append(row)
        else:
            rest = " ".join(f"{name}={row[name]}" for name in row if name not in ("offset", "event"))
            out.print(Text(f"{row['offset']:>12}  {row['event']} {rest}".rstrip()))

    with open_machine(file, options, max_memory, lambda _: None) as machine:
        read_machine(machine, as_json, note if chunks else None)
    summary = _summary(machine, False)
    devices = machine.devices
    sections_found = None if devices is None or devices.devices is None else [asdict(one) for one in devices.devices]
    if as_json:
        virsh = machine.around.virsh
        more: dict[str, Any] = {"devices": sections_found}
        more["device_state_bytes"] = None if devices is None else len(devices.data)
        if virsh is not None:
            more["xml"] = virsh.xml
        print_json(summary | more | ({"chunks": seen} if chunks else {}))
    else:
        _print_head(machine)
        _print_blocks(machine, summary)
        _print_devices(devices, sections_found)
        if machine.around.virsh is not None:
            out.print(Text(machine.around.virsh.xml.rstrip()))
    say_how_it_ended(machine)
    machine_fault(machine)


def restore_machine(
    file: StreamFile, options: MachineOptions, *, output: str, device_state: Path | None, max_memory: int, as_json: bool
) -> None:
    """`restore`: one block of memory to an image."""
    from remus_ckpt.image_file import image_appearing

    is_file = output != "-" and (not Path(output).exists() or Path(output).is_file())
    with ExitStack() as stack:
        stack.callback(file.close)
        home = stack.enter_context(image_appearing(output)) if is_file else Anonymous()
        chosen = ChosenBlock(options.block, home)
        machine = stack.enter_context(open_machine(file, options, max_memory, chosen))
        read_machine(machine, as_json)
        block = chosen.block(machine)
        if not block.came.any():
            machine_fault(machine)
            raise NothingToRestore(
                f"{machine.name}: the block {block.name!r} is not in the stream"
                + ("; it was shared with the destination (x-ignore-shared)" if block.address is not None else "")
            )
        if is_file:
            home.cut(block.size)  # type: ignore[union-attr]
        elif output == "-":
            write_out(output, block.image.data)
        else:
            save_image(block.memory, output, block.size)
    if device_state is not None:
        if machine.devices is None:
            complain(f"{machine.name}: it holds no complete device state; {device_state} is not written")
        else:
            write_out(str(device_state), machine.devices.data)
    if as_json and output != "-":
        print_json(_summary(machine, False) | {"restored": 0, "block": block.name, "image": output})
    elif output != "-":
        out.print(f"{output}: block {block.name}, {counted(len(block.memory), 'page')}")
    say_how_it_ended(machine)
    machine_fault(machine)


def machine_pages(file: StreamFile, options: MachineOptions, max_memory: int, quiet: bool) -> tuple[Machine, Block]:
    """One block of a machine's memory in this process, for `extract` and `diff`."""
    chosen = ChosenBlock(options.block, Anonymous())
    with open_machine(file, options, max_memory, chosen) as machine:
        read_machine(machine, quiet)
        block = chosen.block(machine)
    say_how_it_ended(machine)
    if not block.came.any():
        machine_fault(machine)
        raise NothingToRestore(f"{machine.name}: the block {block.name!r} is not in the stream")
    return machine, block


def differing_machines(
    paths: tuple[str, str],
    snapshots: tuple[str | None, str | None],
    options: MachineOptions,
    max_memory: int,
    quiet: bool,
) -> tuple[Pairs, list[int]]:
    """The pages that differ between the memories of two machines, or of a machine and an image, and the sizes."""
    both: list[tuple[Pages, int]] = []
    for path, snapshot in zip(paths, snapshots, strict=True):
        file = StreamFile(path)
        if not file.holds_machine:
            file.close()
            with Image(path) as image:
                memory = zeros(pages_for(image.size))
                image.read(0, memory)
                both.append((memory, image.size))
            continue
        machine, block = machine_pages(
            file, MachineOptions((), snapshot, options.page_size, options.block), max_memory, quiet
        )
        machine_fault(machine)
        both.append((block.memory, block.size))
    (one, _), (other, _) = both

    def part(memory: Pages, at: int, size: int) -> Pages:
        pages = memory[at : at + size]
        return np.pad(pages, ((0, size - len(pages)), (0, 0))) if len(pages) < size else pages

    def pairs() -> Pairs:
        count = max(len(one), len(other))
        for at in range(0, count, MAX_BATCH_ENTRIES):
            size = min(MAX_BATCH_ENTRIES, count - at)
            before, now = part(one, at, size), part(other, at, size)
            differ = np.flatnonzero((before != now).any(axis=1))
            yield at + differ, before[differ], now[differ]

    return pairs(), [size for _, size in both]


# What is reported


def _summary(machine: Machine, hashes: bool) -> dict[str, Any]:
    around, reader, end = machine.around, machine.reader, machine.end
    stated = machine.configuration
    capabilities = () if stated is None else stated.capabilities or ()
    result: dict[str, Any] = {
        "format": machine.format,
        "stream": machine.format if machine.is_dump else "mapped-ram" if machine.is_mapped else "qemu",
        "machine": reader.machine,
        "page_size": reader.page_size,
        "capabilities": list(capabilities),
        "memory_bytes": sum(block.size for block in machine.blocks.named.values()) or None,
        "checkpoints": [_row(machine, hashes)] if machine.blocks.named else [],
        "complete": machine.is_complete,
        "trailing_bytes": None if end is None else end.trailing_bytes,
        "deviations": [],
    }
    if isinstance(reader, DumpReader):
        result |= {"processor": reader.processor, "notes_bytes": reader.notes_bytes}
    if machine.is_multifd:
        result["connections"] = machine.connections
    if around.virsh is not None:
        result["virsh"] = {
            name: getattr(around.virsh, name) for name in ("version", "compression", "was_running", "body")
        }
    if around.snapshot is not None:
        result["snapshot"] = around.snapshot.name
    if around.snapshots is not None:
        result["snapshots"] = [_snapshot_row(one) for one in around.snapshots]
    if machine.inflater is not None:
        result["compressed"] = {"format": machine.inflater.name, "cut": machine.inflater.is_cut}
    if machine.error is not None:
        result["error"] = {
            "kind": type(machine.error).__name__,
            "message": machine.error.message,
            "offset": machine.error.offset,
            "section": machine.error.section,
            "chunk": machine.error.chunk,
        }
    elif not machine.is_good:
        result["error"] = {
            "kind": NothingToRestore.__name__,
            "message": "the stream ends before memory is whole",
            "offset": None if end is None else end.offset,
            "section": reader.section if isinstance(reader, DumpReader) else "qemu-ram.md §2.3",
            "chunk": None,
        }
    return result


def _row(machine: Machine, hashes: bool) -> dict[str, Any]:
    """The one checkpoint of a machine."""
    blocks: dict[str, dict[str, Any]] = {}
    shared = []
    for name, block in machine.blocks.named.items():
        if block.address is not None and block.size and not block.came.any():
            shared.append(name)
            continue
        blocks[name] = {"bytes": block.size}
        if hashes:
            blocks[name]["sha256"] = block.sha256()
    row: dict[str, Any] = {
        "epoch": 0,
        "start": 0,
        "end": None if machine.end is None else machine.end.offset - machine.end.trailing_bytes,
        "whole": machine.is_good,
        "pages": dict(machine.blocks.counts),
        "blocks": blocks,
        "not_in_stream": shared,
        "missing_pages": {name: count for name, count in machine.blocks.missing.items() if name not in shared},
    }
    main = machine.blocks.main
    if main is not None and main.name in blocks and hashes:
        row["memory_sha256"] = blocks[main.name]["sha256"]
    return row


def _snapshot_row(snapshot: Snapshot) -> dict[str, Any]:
    taken = datetime.fromtimestamp(snapshot.time_s, UTC).isoformat(timespec="seconds")
    return {
        "id": snapshot.id,
        "name": snapshot.name,
        "time": taken,
        "clock_ns": snapshot.clock_ns,
        "state_bytes": snapshot.state_bytes,
        "disk_bytes": snapshot.disk_bytes,
    }


def _describe(event: events.Event) -> dict[str, Any]:
    """An event as JSON; of long values only the number of bytes."""
    row: dict[str, Any] = {"offset": event.offset, "event": type(event).__name__}
    if isinstance(event, events.Pages):
        row |= {"block": event.block, "full": len(event.full), "zero": len(event.zero), "encoded": len(event.encoded)}
        return row
    if isinstance(event, Bytes):
        return row | {"block": event.block, "at": event.at, "bytes": len(event.data)}
    if isinstance(event, events.DeviceState):
        return row | {"bytes": len(event.data), "devices": None if event.devices is None else len(event.devices)}
    for field in fields(event):
        value = getattr(event, field.name)
        if isinstance(value, bytes):
            value = value.hex() if len(value) <= _SHOWN_BYTES else f"{len(value)} bytes"
        if field.name != "offset":
            row[field.name] = list(value) if isinstance(value, tuple) else value
    return row


def _print_head(machine: Machine) -> None:
    reader, around = machine.reader, machine.around
    parts = [_TITLES[around.format]]
    if around.virsh is not None:
        parts.append(
            f"body {around.virsh.compression}, {'running' if around.virsh.was_running else 'paused'} when saved"
        )
    if around.snapshot is not None:
        parts.append(f"snapshot {around.snapshot.name}")
    if not isinstance(reader, DumpReader):
        parts.append(f"machine {reader.machine or 'not stated'}")
    elif reader.processor is not None:
        parts.append(f"processor {PROCESSORS.get(reader.processor, reader.processor)}")
    if reader.page_size is not None:
        parts.append(f"pages of {reader.page_size:,} bytes")
    if machine.configuration is not None and machine.configuration.capabilities:
        parts.append(", ".join(machine.configuration.capabilities))
    if machine.is_multifd:
        parts.append(f"multifd, {counted(machine.connections, 'connection')}")
    out.print(Text("; ".join(parts)))


def _print_blocks(machine: Machine, summary: dict[str, Any]) -> None:
    for row in summary["checkpoints"]:
        width = max([len(name) for name in (*row["blocks"], *row["not_in_stream"])], default=0)
        for name, block in row["blocks"].items():
            missing = row["missing_pages"].get(name)
            line = f"  {name:{width}}  {block['bytes']:>15,} bytes  {block.get('sha256', '')}".rstrip()
            out.print(Text(line + (f"  {counted(missing, 'page')} never came" if missing else "")))
        for name in row["not_in_stream"]:
            out.print(
                Text(f"  {name:{width}}  {machine.blocks.named[name].size:>15,} bytes  shared, not in the stream")
            )
        counts = row["pages"]
        total = sum(block["bytes"] for block in row["blocks"].values())
        out.print(
            f"memory {total / MIB:,.1f} MiB; pages: {counts['page']:,} full, {counts['zero']:,} zero, "
            f"{counts['xbzrle']:,} XBZRLE"
        )


def _print_devices(state: events.DeviceState | None, found: list[dict[str, Any]] | None) -> None:
    if state is None:
        return
    if found is None:
        out.print(f"device state: {len(state.data):,} bytes, not described")
        return
    out.print(f"device state: {len(state.data):,} bytes, {counted(len(found), 'section')}")
    width = max([len(one["name"]) for one in found], default=0)
    for one in found:
        where = f"{one['offset']:>12}  {one['name']:{width}}  instance {one['instance']}"
        out.print(Text(f"{where}, version {one['version']}, {one['size']:,} bytes"))


def _print_snapshots(listed: list[dict[str, Any]]) -> None:
    out.print(f"qcow2 image; {counted(len(listed), 'snapshot')}")
    for one in listed:
        state = f"machine state {one['state_bytes']:,} bytes" if one["state_bytes"] else "disk only"
        out.print(Text(f"  {one['id']:>4}  {one['name']}  {one['time']}  {state}"))
    if any(one["state_bytes"] for one in listed):
        out.print("read one with --snapshot NAME")


def say_how_it_ended(machine: Machine) -> None:
    """Report on standard error what is wrong or missing."""
    state = "memory is whole" if machine.is_good else "memory is not whole: it is a mixture of instants"
    if not any(block.came.any() for block in machine.blocks.named.values()):
        state = "there is nothing to restore"
    end = machine.end
    if machine.error is not None:
        hint = ""
        if isinstance(machine.error, LimitExceeded) and machine.error.limit == "memory_bytes":
            hint = "; raise it with --max-memory"
        complain(f"{machine.name}: {machine.error}{hint}; {state}")
    elif machine.cut is not None:
        complain(f"{machine.cut}: this connection ends too early; {state}")
    elif end is not None and not end.complete:
        complain(
            f"{machine.name}: cut off after {end.offset:,} bytes, {end.trailing_bytes:,} of them not whole; {state}"
        )
    elif end is not None and not machine.blocks.named:
        complain(f"{machine.name}: it holds device state, but no memory")
    elif end is not None and end.trailing_bytes:
        complain(f"{machine.name}: {counted(end.trailing_bytes, 'byte', 'follow')} the end of the stream; {state}")
    # A dump has no pages where the machine has no memory.
    for row in [_row(machine, False)] if machine.is_good and not machine.is_dump else []:
        for name, count in row["missing_pages"].items():
            complain(
                f"{machine.name}: {counted(count, 'page')} of {name} never came: the guest had given them back, or "
                "other connections (multifd) are missing"
            )


def exit_code_of(machine: Machine) -> int | None:
    """The code of the fault, or the one for memory that is not whole; None if all is well."""
    if machine.error is not None:
        return machine.error.exit_code
    has_memory = bool(machine.blocks.named)
    is_lost = not machine.is_good if has_memory else machine.end is not None and not machine.end.complete
    return NothingToRestore.exit_code if is_lost else None


def machine_fault(machine: Machine) -> None:
    """Exit with the code of the fault; return if all is well."""
    code = exit_code_of(machine)
    if code is not None:
        raise typer.Exit(code)
