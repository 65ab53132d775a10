#!/usr/bin/env python3
"""Makes the vectors of QEMU's migration stream in specs/vectors/qemu/, and writes such streams for tests.

    python tools/qemu_vectors.py            make them anew, and their manifest
    python tools/qemu_vectors.py --check    change nothing; exit code 1 if anything would change

It does not use remus_ckpt: `Guest` keeps what memory must be beside the bytes that say so. Every byte is made here, so
none is anybody's firmware.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import sys
import zlib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from qemu_containers import elf, lime, lzop, qcow2, u16, u32, u64, virsh

FOLDER = Path(__file__).resolve().parent.parent / "specs" / "vectors" / "qemu"

ZERO, MEM_SIZE, PAGE, EOS, CONTINUE, XBZRLE, HOOK, COMPRESS, FLUSH = (1 << bit for bit in range(1, 10))
START, PART, END, FULL = 1, 2, 3, 4
RAM_ID, DEVICE_ID = 2, 7


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return bytes([len(data)]) + data


def pattern(seed: int, size: int = 4096) -> bytes:
    """A page of which no byte is like its neighbour."""
    return bytes((seed * 37 + at * 11 + at // 256) & 0xFF for at in range(size))


class Stream:
    """A stream in the making. Each method appends, and returns the offset at which that began."""

    def __init__(self, *, machine: str | None = "pc-i440fx-10.0", header: bool = True, **configuration: Any) -> None:
        self.data = bytearray()
        self.footers = True
        self.description: list[dict[str, Any]] = []
        if header:
            self.put(b"QEVM", u32(3))
        if machine is not None:
            self.configuration(machine, **configuration)

    def put(self, *parts: bytes) -> int:
        at = len(self.data)
        for part in parts:
            self.data += part
        return at

    def configuration(
        self,
        machine: str,
        *,
        bits: int | None = None,
        capabilities: tuple[str, ...] | None = None,
        uuid: bytes | None = None,
        other: str | None = None,
    ) -> int:
        at = self.put(b"\x07", u32(len(machine)), machine.encode())
        if bits is not None:
            self.put(b"\x05", string("configuration/target-page-bits"), u32(1), u32(bits))
        if capabilities is not None:
            self.put(b"\x05", string("configuration/capabilities"), u32(1), u32(len(capabilities)))
            self.put(*map(string, capabilities))
        if uuid is not None:
            self.put(b"\x05", string("configuration/uuid"), u32(1), uuid)
        if other is not None:
            self.put(b"\x05", string(other), u32(1))
        return at

    def command(self, number: int, data: bytes = b"") -> int:
        return self.put(b"\x08", u16(number), u16(len(data)), data)

    def start(self, name: str = "ram", *, number: int = RAM_ID, version: int = 4) -> int:
        return self.put(b"\x01", u32(number), string(name), u32(0), u32(version))

    def part(self, kind: int = PART, *, number: int = RAM_ID) -> int:
        return self.put(bytes([kind]), u32(number))

    def footer(self, number: int = RAM_ID) -> int:
        return self.put(b"\x7e", u32(number)) if self.footers else self.put()

    def eos(self, number: int = RAM_ID) -> int:
        at = self.put(u64(EOS))
        self.footer(number)
        return at

    def blocks(self, sizes: dict[str, int], *, more: dict[str, bytes] | None = None, total: int | None = None) -> int:
        """MEM_SIZE and the list. more: what stands behind a block's size."""
        at = self.put(u64((sum(sizes.values()) if total is None else total) | MEM_SIZE))
        for name, size in sizes.items():
            self.put(string(name), u64(size), (more or {}).get(name, b""))
        return at

    def memory(self, sizes: dict[str, int], **more: Any) -> int:
        """The whole START of ram."""
        at = self.start()
        self.blocks(sizes, **more)
        self.eos()
        return at

    def page(self, address: int, body: bytes, kind: int = PAGE, block: str | None = None) -> int:
        if block is None:
            return self.put(u64(address | kind | CONTINUE), body)
        return self.put(u64(address | kind), string(block), body)

    def encoded(self, address: int, runs: bytes, block: str | None = None, *, flags: int = 1) -> int:
        return self.page(address, bytes([flags]) + u16(len(runs)) + runs, XBZRLE, block)

    def device(self, name: str, data: bytes, *, instance: int = 0, version: int = 1, number: int = DEVICE_ID) -> int:
        self.description.append({"name": name, "instance_id": instance, "version": version, "size": len(data)})
        at = self.put(b"\x04", u32(number), string(name), u32(instance), u32(version), data)
        self.footer(number)
        return at

    def devices(self) -> None:
        self.device("timer", bytes(24))
        self.device("cpu", b"\x7e\0\0\0\x07\x04" * 20, number=8)  # what looks like a footer is none
        self.device("cpu", pattern(3, 90), instance=1, number=9)

    def close(self, *, page_size: int | None = 4096) -> None:
        """The end of the stream; page_size None: no description."""
        self.put(b"\0")
        if page_size is not None:
            text = json.dumps({"configuration": {}, "page_size": page_size, "devices": self.description}).encode()
            self.put(b"\x06", u32(len(text)), text)


class Guest:
    """What the memory of a stream's guest must be."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.blocks = {name: bytearray(size) for name, size in sizes.items()}

    def write(self, block: str, at: int, data: bytes) -> bytes:
        self.blocks[block][at : at + len(data)] = data
        return data

    def expect(self) -> dict[str, Any]:
        return {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in self.blocks.items()
        }


def hello(channel: int) -> bytes:
    return u32(0x11223344) + u32(1) + bytes(16) + bytes([channel]) + bytes(39)


def packet(
    number: int,
    block: str = "",
    normal: tuple[int, ...] = (),
    data: bytes = b"",
    zero: tuple[int, ...] = (),
    *,
    flags: int = 0,
    size: int | None = None,
    magic: int = 0x11223344,
    room: int = 128,
) -> bytes:
    """size: what the packet says of its data, if that is not true"""
    head = u32(magic) + u32(1) + u32(flags) + u32(room) + u32(len(normal)) + u32(len(data) if size is None else size)
    head += u64(number) + u32(len(zero)) + bytes(28) + block.encode().ljust(256, b"\0")
    return head + b"".join(map(u64, (*normal, *zero))).ljust(8 * room, b"\0") + data


SYNC, ZLIB, ZSTD = 1, 2, 4


def mapped(
    stream: Stream,
    guest: Guest,
    present: dict[str, dict[int, bytes]],
    *,
    base: int = 0,
    version: int = 1,
    shift: int = 0,
    stale: bool = True,
) -> list[int]:
    """The list of blocks of a mapped-ram file, with their pages. Returns where each block's entry begins.

    base: where the stream begins in the file; shift: added to the second block's offsets; stale: absent pages hold
    something
    """
    sizes = {name: len(data) for name, data in guest.blocks.items()}
    stream.put(u64(sum(sizes.values()) | MEM_SIZE))
    starts = []
    for number, (name, size) in enumerate(sizes.items()):
        at = stream.put(string(name), u64(size))
        starts.append(at)
        bitmap_at = len(stream.data) + 28 + base
        bits = bytearray(-(-size // 4096 // 8))
        pages_at = -(-(bitmap_at + len(bits)) // 512) * 512
        off = shift if number else 0
        stream.put(u32(version), u64(4096), u64(bitmap_at + off), u64(pages_at + off))
        area = bytearray(b"\xee" * size if stale else bytes(size))
        for page, data in present[name].items():
            bits[page >> 3] |= 1 << (page & 7)
            area[page * 4096 : (page + 1) * 4096] = guest.write(name, page * 4096, data)
        stream.put(bits)
        stream.put(bytes(pages_at - base - len(stream.data)), area)
    return starts


class Vectors:
    """The files and the rows of the manifest."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, sections: str, *data: bytes, arguments: tuple[str, ...] = (), **expect: Any) -> None:
        parts = [""] if len(data) == 1 else [f".{number}" for number in range(len(data))]
        names = [f"{name}{part}.bin.xz" for part in parts]
        for file, content in zip(names, data, strict=True):
            self.files[file] = bytes(content)
        files = [
            {"file": file, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for file, content in zip(names, data, strict=True)
        ]
        row = {"id": name, "sections": sections.split(", "), "files": files}
        self.rows.append(row | ({"arguments": list(arguments)} if arguments else {}) | expect)

    def made(self) -> dict[str, bytes]:
        """Every file of the folder, by name."""
        rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in self.rows)
        manifest = f'{{"format": 1, "vectors": [\n{rows}\n]}}\n'
        return self.files | {"manifest.json": manifest.encode()}

    def good(
        self,
        name: str,
        sections: str,
        guest: Guest,
        pages: tuple[int, int, int],
        *data: bytes,
        arguments: tuple[str, ...] = (),
        format: str = "qemu",
        **more: Any,
    ) -> None:
        counts = dict(zip(("page", "zero", "xbzrle"), pages, strict=True))
        expect = {"format": format, "complete": True, "whole": True, "pages": counts, "blocks": guest.expect()} | more
        self.add(name, sections, *data, arguments=arguments, **expect)

    def bad(
        self,
        name: str,
        section: str,
        offset: int | None,
        *data: bytes,
        kind: str = "Malformed",
        arguments: tuple[str, ...] = (),
    ) -> None:
        error = {"kind": kind, "offset": offset, "section": section}
        self.add(f"bad-{name}", section, *data, arguments=arguments, error=error)


SIZES = {"ram": 4 * 4096, "vector.rom": 4096}


def simple(**configuration: Any) -> tuple[Stream, Guest]:
    """A stream up to the end of ram's START, and its guest."""
    stream = Stream(**configuration)
    stream.memory(SIZES)
    return stream, Guest(SIZES)


def filled(stream: Stream, guest: Guest) -> None:
    """A PART with every page of the simple guest."""
    stream.part()
    stream.page(0, guest.write("ram", 0, pattern(1)), block="ram")
    stream.page(4096, b"\0", ZERO)
    guest.write("ram", 8192, b"\xaa" * 4096)
    stream.page(8192, b"\xaa", ZERO)
    stream.page(12288, guest.write("ram", 12288, pattern(2)))
    stream.page(0, guest.write("vector.rom", 0, pattern(4)), block="vector.rom")
    stream.eos()


def finished(stream: Stream, *, page_size: int | None = 4096) -> bytes:
    """END of ram, devices and the end."""
    stream.part(END)
    stream.eos()
    stream.devices()
    stream.close(page_size=page_size)
    return bytes(stream.data)


def whole(**configuration: Any) -> tuple[bytes, Guest]:
    stream, guest = simple(**configuration)
    filled(stream, guest)
    return finished(stream), guest


def add_good(v: Vectors) -> None:
    data, guest = whole()
    v.good("plain", "qemu-ram.md §2.2, qemu-ram.md §4.2, qemu-ram.md §2.4", guest, (3, 2, 0), data, devices=3)
    v.good("trailing-bytes", "qemu-ram.md §2.4", guest, (3, 2, 0), data + b"\xff" * 9, trailing_bytes=9)
    v.good("uuid", "qemu-ram.md §3", guest, (3, 2, 0), whole(uuid=bytes(range(16)))[0])

    stream, guest = simple(machine=None)
    filled(stream, guest)
    v.good(
        "told-page-size", "qemu-ram.md §4.3", guest, (3, 2, 0), finished(stream, page_size=None),
        arguments=("--page-size", "4096"), devices=None,
    )  # fmt: skip
    stream, guest = simple()
    stream.footers = False
    stream.data[-5:] = b""
    filled(stream, guest)
    stream.part(END)
    stream.eos()
    stream.close()
    v.good("without-footers", "qemu-ram.md §2.2", guest, (3, 2, 0), bytes(stream.data), devices=0)

    stream, guest = simple()
    filled(stream, guest)
    stream.part()
    changed = bytearray(pattern(1))
    changed[5:8] = b"\1\2\3"
    changed[4095:] = b"\x77"
    stream.encoded(0, b"\5\3\1\2\3" + bytes([0xF7, 0x1F, 1, 0x77]), block="ram")
    guest.write("ram", 0, bytes(changed))
    stream.encoded(4096, b"\0\2\x10\x20")
    guest.write("ram", 4096, b"\x10\x20")
    stream.page(8192, b"\0", ZERO)
    guest.write("ram", 8192, bytes(4096))
    stream.eos()
    v.good("xbzrle", "qemu-ram.md §4.4, qemu-ram.md §4.2", guest, (3, 3, 2), finished(stream))

    stream, guest = simple()
    stream.part()
    for at in (8192, 0, 12288, 4096, 0):  # not in order, and one twice
        stream.page(at, guest.write("ram", at, pattern(at // 4096 + 20 + len(stream.data) % 7)), block="ram")
        stream.page(0, guest.write("vector.rom", 0, pattern(at // 4096)), block="vector.rom")
    stream.eos()
    v.good("blocks-change-places", "qemu-ram.md §4.2", guest, (10, 0, 0), finished(stream))

    sizes = {"ram": 1 << 20, "vector.rom": 4096}
    stream = Stream(capabilities=("x-ignore-shared",))
    stream.memory(sizes, more={"ram": u64(0), "vector.rom": u64(0xFFFC0000)})
    guest = Guest({"vector.rom": 4096})
    stream.part()
    stream.page(0, guest.write("vector.rom", 0, pattern(4)), block="vector.rom")
    stream.eos()
    v.good("ignore-shared", "qemu-ram.md §4.1", guest, (1, 0, 0), finished(stream), not_in_stream=["ram"])

    stream = Stream()
    stream.command(1)
    stream.command(2, u32(1))
    stream.command(3, u64(0x201000) + u64(4096))
    sizes = {"ram": 2 << 20, "vector.rom": 4096}
    stream.memory(sizes, more={"vector.rom": u64(4096)})
    guest = Guest(sizes)
    stream.part()
    stream.page(0, guest.write("ram", 0, pattern(9)), block="ram")
    stream.eos()
    stream.command(11)
    v.good(
        "commands", "qemu-ram.md §2.5, qemu-ram.md §4.1", guest, (1, 0, 0), finished(stream),
        missing={"ram": 511, "vector.rom": 1},
    )  # fmt: skip

    for name, machine, size, more, arguments in (
        ("pages-of-8-kib", "clipper", 8192, {}, ()),
        ("pages-of-64-kib-stated", "virt-10.0", 65536, {"bits": 16}, ()),
        ("pages-of-1-kib", "versatilepb", 1024, {}, ()),
        ("pages-of-1-kib-told", "versatilepb", 1024, {}, ("--page-size", "1024")),
    ):
        sizes = {"memory": 2 * size}
        stream = Stream(machine=machine, **more)
        stream.memory(sizes)
        guest = Guest(sizes)
        stream.part()
        stream.page(0, b"\0", ZERO, "memory")
        stream.page(size, guest.write("memory", size, pattern(5, size) if size < 65536 else pattern(5) * 16))
        stream.eos()
        stream.part()
        gap = min(size, 16384) - 8  # a length has 14 bits
        stream.encoded(size, b"\2\2\x55\x66" + bytes([0x80 | gap & 0x7F, gap >> 7, 1, 0x99]))
        guest.write("memory", size + 2, b"\x55\x66")
        guest.write("memory", size + 4 + gap, b"\x99")
        stream.eos()
        data = finished(stream, page_size=None if arguments or more else size)
        v.good(name, "qemu-ram.md §4.3, qemu-ram.md §4.4", guest, (1, 1, 1), data, arguments=arguments, page_size=size)

    sizes = {"ram": 10 * 4096, "vector.rom": 4096}
    for name, base in (("mapped-ram", 0), ("mapped-ram-at-an-offset", 4096)):
        stream, guest = Stream(capabilities=("mapped-ram",)), Guest(sizes)
        stream.start()
        mapped(
            stream,
            guest,
            {"ram": {0: pattern(1), 1: pattern(2), 9: pattern(3)}, "vector.rom": {0: pattern(4)}},
            base=base,
        )
        stream.eos()
        stream.part()
        stream.eos()
        v.good(name, "qemu-ram.md §5", guest, (4, 7, 0), finished(stream), format="mapped-ram")

    add_multifd(v)
    add_live(v)
    add_ends(v)
    add_containers(v)


class Sending:
    """The sender's side of XBZRLE, as plainly as qemu-ram.md §10 says it: one round after the other, into a stream."""

    def __init__(self, stream: Stream, guest: Guest, cache_pages: int) -> None:
        self.stream = stream
        self.guest = guest
        self.slots: list[tuple[int, int, bytes] | None] = [None] * cache_pages  # page, round, contents
        self.rounds: list[dict[str, Any]] = []
        self.sent = {"page": 0, "zero": 0, "xbzrle": 0, "same": 0, "miss": 0, "overflow": 0, "bytes": 0}

    def round(self, writes: list[tuple[str, int, str, int]], pages: dict[str, list[int]]) -> None:
        """writes: (block, offset, hex digits, how often they follow each other); pages: that are sent, by block"""
        for block, at, digits, times in writes:
            self.guest.write(block, at, bytes.fromhex(digits) * times)
        self.stream.part()
        named = None
        for block, numbers in pages.items():
            for number in numbers:
                if self._page(block, number, None if named == block else block):
                    named = block
        self.stream.eos()
        self.rounds.append({"writes": [list(one) for one in writes], "pages": pages})

    def _page(self, block: str, number: int, name: str | None) -> bool:
        """Returns whether anything was sent. name: None: the page before was of the same block"""
        first = sum(
            len(data) // 4096 for data in list(self.guest.blocks.values())[: list(self.guest.blocks).index(block)]
        )
        page, now = first + number, bytes(self.guest.blocks[block][number * 4096 : (number + 1) * 4096])
        slot, age = page % len(self.slots), len(self.rounds)
        held = self.slots[slot]
        hits = held is not None and held[0] == page
        if held is None or hits or held[1] + 2 <= age:
            self.slots[slot] = page, age, now
        if not any(now):
            self.sent["zero"] += 1
            self.stream.page(number * 4096, b"\0", ZERO, name)
            return True
        if not hits or not age:
            self.sent["page"] += 1
            self.sent["miss"] += age > 0
            self.stream.page(number * 4096, now, block=name)
            return True
        assert held is not None
        runs = self._encode(held[2], now)
        if runs == b"":
            self.sent["same"] += 1
            return False
        if runs is None:
            self.sent["page"] += 1
            self.sent["overflow"] += 1
            self.stream.page(number * 4096, now, block=name)
            return True
        self.sent["xbzrle"] += 1
        self.sent["bytes"] += 3 + len(runs)
        self.stream.encoded(number * 4096, runs, block=name)
        return True

    def _encode(self, old: bytes, new: bytes) -> bytes | None:
        """xbzrle.md §3; None: it overflows."""
        out, at = b"", 0
        while at < 4096:
            if len(out) + 2 > 4096:
                return None
            start = at
            while at < 4096 and old[at] == new[at]:
                at += 1
            if at == 4096:
                break
            out += self._length(at - start)
            if len(out) + 2 > 4096:
                return None
            start = at
            while at < 4096 and old[at] != new[at]:
                at += 1
            out += self._length(at - start) + new[start:at]
            if len(out) > 4096:
                return None
        return out

    @staticmethod
    def _length(value: int) -> bytes:
        return bytes([value]) if value < 128 else bytes([value & 127 | 128, value >> 7])

    def add(self, v: Vectors, name: str, sections: str) -> None:
        """The vector, with what its sender was told and has counted."""
        pages = self.sent["page"], self.sent["zero"], self.sent["xbzrle"]
        told = {"cache_pages": len(self.slots), "rounds": self.rounds, "counts": self.sent}
        v.good(name, sections, self.guest, pages, finished(self.stream), sending=told)


def add_sending(v: Vectors) -> None:
    """Streams of which it is said how they are written."""
    stream = Stream()
    sizes = {"ram": 8 * 4096, "vector.rom": 4096}
    stream.memory(sizes)
    sending = Sending(stream, Guest(sizes), 16)
    every = {"ram": list(range(8)), "vector.rom": [0]}
    first = [("ram", number * 4096, f"{number + 1:02x}{number * 9 + 5:02x}", 2048) for number in range(6)]
    sending.round([*first, ("vector.rom", 0, "a5", 4096)], every)
    changes = [
        ("ram", 100, "ff", 3), ("ram", 4095, "ee", 1), ("ram", 4096, "11", 2), ("ram", 4096 + 200, "22", 300),
        ("ram", 2 * 4096, "0317", 1365), ("ram", 3 * 4096, "00", 4096), ("ram", 6 * 4096 + 9, "31", 1),
    ]  # fmt: skip
    sending.round(changes, every)
    sending.round([("ram", 3 * 4096 + 5, "07", 5), ("vector.rom", 7, "06", 1)], {"ram": [3, 4], "vector.rom": [0]})
    # Every other byte: each run costs three bytes for two of the page.
    sending.round([("ram", 5 * 4096, "aa32", 2048)], {"ram": [5], "vector.rom": [0]})
    sending.add(v, "live-rounds", "qemu-ram.md §10.1, qemu-ram.md §10.3, qemu-ram.md §4.4")

    stream, sizes = Stream(), {"ram": 8 * 4096}
    stream.memory(sizes)
    sending = Sending(stream, Guest(sizes), 4)
    for count in range(5):
        sending.round(
            [("ram", number * 4096 + 16, f"{count + 1:02x}", 4) for number in range(8)], {"ram": list(range(8))}
        )
    for count in range(4):  # the upper half alone, so that the lower gives way
        sending.round(
            [("ram", number * 4096 + 99, f"{count + 9:02x}", 2) for number in range(4, 8)], {"ram": [4, 5, 6, 7]}
        )
    sending.round([("ram", 0, "cc", 1), ("ram", 5 * 4096, "cc", 1)], {"ram": [0, 5]})
    sending.add(v, "live-small-cache", "qemu-ram.md §10.2")


def add_multifd(v: Vectors) -> None:
    sizes = {"ram": 4 * 4096}
    for name, flags, compress in (("none", 0, bytes), ("zlib", ZLIB, None)):
        stream, guest = Stream(), Guest(sizes)
        stream.start()
        stream.blocks(sizes)
        stream.put(u64(FLUSH))
        stream.eos()
        stream.part()
        stream.put(u64(FLUSH))
        stream.eos()
        channels = [bytearray(hello(0)), bytearray(hello(1))]
        squeezers = [zlib.compressobj(0), zlib.compressobj(0)]

        def squeeze(number: int, data: bytes, keep: Any = compress, tools: Any = squeezers) -> bytes:
            if keep is not None:
                return data
            return tools[number].compress(data) + tools[number].flush(zlib.Z_SYNC_FLUSH)

        channels[0] += packet(1, flags=SYNC)
        channels[1] += packet(2, flags=SYNC)
        channels[1] += packet(3, "ram", (0, 4096), squeeze(1, pattern(1) + pattern(2)), (8192,), flags=flags)
        channels[0] += packet(4, "ram", (0,), squeeze(0, guest.write("ram", 0, pattern(3))), flags=flags)
        guest.write("ram", 4096, pattern(2))
        channels[1] += packet(5, "ram", (12288,), squeeze(1, guest.write("ram", 12288, pattern(4))), flags=flags)
        channels[0] += packet(6, flags=SYNC)
        channels[1] += packet(7, flags=SYNC)
        data = finished(stream)
        files = (data, bytes(channels[0]), bytes(channels[1]))
        v.good(f"multifd-{name}", "qemu-ram.md §7.2, qemu-ram.md §7.3", guest, (4, 1, 0), *files)
        if not flags:
            v.bad("multifd-alone", "qemu-ram.md §7", stream.data.index(u64(FLUSH)), data, kind="UnknownFormat")
            v.add(
                "multifd-cut", "qemu-ram.md §7.3", data, bytes(channels[0])[:-40], bytes(channels[1]),
                format="qemu", complete=False, whole=False,
            )  # fmt: skip

    # QEMU 7.2: every EOS is a mark, zero pages are in the main stream, SYNC packets carry pages, a size is stale.
    stream, guest = Stream(machine="pc-i440fx-7.2"), Guest(sizes)
    stream.start()
    stream.blocks(sizes)
    stream.eos()
    stream.part()
    stream.page(0, b"\0", ZERO, "ram")
    stream.page(4096, b"\0", ZERO)
    stream.eos()
    stream.part()
    stream.page(8192, b"\0", ZERO, "ram")
    stream.eos()
    channel = bytearray(hello(0))
    channel += packet(0, flags=SYNC)
    channel += packet(1, "ram", (8192,), pattern(1))
    channel += packet(2, "ram", (12288,), guest.write("ram", 12288, pattern(2)), flags=SYNC)
    channel += packet(2, "ram", size=4096)
    channel += packet(3, "ram", (4096,), guest.write("ram", 4096, pattern(3)))
    channel += packet(4, flags=SYNC, size=4096)
    channel += packet(5, flags=SYNC)
    v.good("multifd-7.2", "qemu-ram.md §7.2, qemu-ram.md §7.3", guest, (3, 3, 0), finished(stream), bytes(channel))


def add_live(v: Vectors) -> None:
    stream, guest = simple()
    stream.start("dirty-bitmap", number=30, version=1)
    stream.put(bytes([0x1C]), string("disk0"), string("backup"), u32(65536), b"\1", b"\1")
    stream.footer(30)
    stream.part(number=30)
    stream.put(b"\1")
    stream.footer(30)
    filled(stream, guest)
    stream.part(number=30)
    stream.put(bytes([0x40]), u64(0), u32(8), u64(5), b"\x08\x01\xff\0\x7e")
    stream.put(bytes([0x42]), u64(8), u32(8), bytes([0x80 | 0x20, 0x00]), b"\1")
    stream.footer(30)
    v.good("dirty-bitmap", "qemu-ram.md §6.1", guest, (3, 2, 0), finished(stream))

    stream, guest = simple(machine="s390-ccw-virtio-10.0")
    stream.start("s390-storage_attributes", number=31, version=0)
    stream.put(u64(1))
    stream.footer(31)
    filled(stream, guest)
    stream.part(END, number=31)
    stream.put(u64(0x5000 | 2), u64(3), b"\1\2\3", u64(8), u64(1))
    stream.footer(31)
    v.good("storage-attributes", "qemu-ram.md §6.2", guest, (3, 2, 0), finished(stream, page_size=None), devices=None)


def add_ends(v: Vectors) -> None:
    stream, guest = simple()
    filled(stream, guest)
    stream.devices()
    stream.close()
    v.good("without-end-of-ram", "qemu-ram.md §2.3", guest, (3, 2, 0), bytes(stream.data))

    data, guest = whole()
    cut = data.index(b"\x03\0\0\0\x02")
    v.add(
        "cut-within-devices", "qemu-ram.md §2.3", data[: cut + 60], format="qemu", complete=False, whole=True,
        pages={"page": 3, "zero": 2, "xbzrle": 0}, blocks=guest.expect(),
    )  # fmt: skip
    v.add(
        "cut-between-parts", "qemu-ram.md §2.3", data[:cut], format="qemu", complete=False, whole=False,
        pages={"page": 3, "zero": 2, "xbzrle": 0}, blocks=guest.expect(),
    )  # fmt: skip
    stream = Stream()
    stream.devices()
    stream.close()
    v.add("device-state-only", "qemu-ram.md §2.4", bytes(stream.data), format="qemu", complete=True, devices=3)


def add_containers(v: Vectors) -> None:
    data, guest = whole()
    counts = (3, 2, 0)
    virsh_of = {"format": "virsh-save"}
    v.good("virsh-raw", "formats.md §3", guest, counts, virsh(data), **virsh_of)
    v.good("virsh-version-1", "formats.md §3", guest, counts, virsh(data, version=1, compression=5), **virsh_of)
    v.good("virsh-big-endian", "formats.md §3", guest, counts, virsh(data, order=">"), **virsh_of)
    squeezed = gzip.compress(data, 0, mtime=0)
    v.good("virsh-gzip", "formats.md §3", guest, counts, virsh(squeezed, compression=1), **virsh_of)
    v.good("virsh-lzop", "formats.md §3", guest, counts, virsh(lzop(data), compression=4), needs="lzop", **virsh_of)
    sizes = {"ram": 10 * 4096}
    stream, other = Stream(capabilities=("mapped-ram",)), Guest(sizes)
    stream.start()
    mapped(stream, other, {"ram": {2: pattern(1)}}, base=len(virsh(b"")))
    stream.eos()
    sparse = virsh(finished(stream), compression=6)
    v.good("virsh-sparse", "formats.md §3, qemu-ram.md §5", other, (1, 9, 0), sparse, **virsh_of)
    section = "formats.md §3"
    v.bad("virsh-partial", section, 0, virsh(data, magic=b"LibvirtQemudPart"), kind="UnknownFormat")
    v.bad("virsh-version", section, 16, virsh(data, version=0x01020304), kind="UnknownFormat")
    v.bad("virsh-compression", section, 28, virsh(data, compression=7), kind="UnknownFormat")
    cut = virsh(lzop(data, block=1024)[:-9000], compression=4)
    v.add("virsh-lzop-cut", section, cut, complete=False, whole=False, needs="lzop", **virsh_of)
    v.bad("virsh-cookie", section, 32, virsh(data, cookie=1000))
    v.bad("virsh-cut", section, 100, virsh(data)[:100])
    long = bytearray(virsh(data))
    long[20:24] = b"\xff\xff\xff\x7f"
    v.bad("virsh-2-gib", section, 20, bytes(long), kind="LimitExceeded")

    stream, second = simple()
    second.write("ram", 0, pattern(8))
    second.write("vector.rom", 0, pattern(7))
    stream.part()
    stream.page(0, pattern(8), block="ram")
    for at in (4096, 8192, 12288):
        stream.page(at, b"\0", ZERO)
    stream.page(0, pattern(7), block="vector.rom")
    stream.eos()
    states = {"first": data, "second": finished(stream)}
    image = qcow2(states)
    q = {"format": "qcow2"}
    v.good("qcow2-first", "formats.md §4", guest, counts, image, arguments=("--snapshot", "first"), **q)
    v.good("qcow2-second", "formats.md §4", second, (2, 3, 0), image, arguments=("--snapshot", "2"), **q)
    one = qcow2({"only": data, "disk": b""}, bits=12, extra=True)
    v.good("qcow2-only-one", "formats.md §4", guest, counts, one, **q)
    v.good("qcow2-without-extra", "formats.md §4", guest, counts, qcow2({"only": data}, extra=False), **q)
    for method in ("zlib", "zstd"):
        packed = qcow2({"only": data, "disk": b""}, bits=12, compressed=method)
        v.good(f"qcow2-{method}", "formats.md §4", guest, counts, packed, **q)
    section = "formats.md §4"
    damaged = bytearray(qcow2({"only": data}, bits=12, compressed="zlib"))
    damaged[4096 + 1] ^= 0xFF
    v.bad("qcow2-zlib", section, 4096, bytes(damaged), arguments=("--snapshot", "only"))
    v.bad("qcow2-compression", section, 104, qcow2({"only": data}, method=2, features=8), kind="UnknownFormat")
    only = ("--snapshot", "only")
    v.bad("qcow2-cut", section, 0, image[:40])
    v.bad("qcow2-clusters", section, 20, image[:20] + u32(40) + image[24:])
    v.bad("qcow2-encrypted", section, 32, qcow2({"only": data}, crypt=2), kind="UnknownFormat")
    v.bad("qcow2-extended", section, 72, qcow2({"only": data}, features=16), kind="UnknownFormat")
    v.bad("qcow2-many-snapshots", section, 60, image[:60] + u32(1 << 31) + image[64:], kind="LimitExceeded")
    short = qcow2({"only": data}, l1_entries=1)
    v.bad("qcow2-short-table", section, None, short, arguments=only)
    v.bad("qcow2-far-cluster", section, None, qcow2({"only": data}, far=True), arguments=only)
    v.bad("qcow2-long-table", section, None, qcow2({"only": data}, l1_entries=1 << 31), kind="LimitExceeded")


def add_dumps(v: Vectors) -> None:
    guest = Guest({"memory": 6 * 4096})
    first = guest.write("memory", 0, pattern(1) + bytes(4096))
    second = guest.write("memory", 4 * 4096, pattern(2) + b"\x33" * 4096)
    ranges = [(0, first), (4 * 4096, second)]
    counts, one = (4, 0, 0), {"absent": {"memory": 2}, "complete": True}
    section = "formats.md §7"
    e = {"format": "elf", **one}
    v.good("elf", section, guest, counts, elf(ranges, note=bytes(336)), **e)
    v.good("elf-32-big-endian", section, guest, counts, elf(ranges, bits=32, order=">", processor=8), **e)
    v.good("elf-not-in-order", section, guest, counts, elf(ranges[::-1], note=b"registers"), **e)
    v.good("elf-many", section, guest, counts, elf(ranges, is_many=True), **e)
    aliases = [*ranges, (4096, 0, 4096, 4096), (4 * 4096, 1, 0, 8192)]
    v.good("elf-aliases", section, guest, counts, elf(aliases), **e)
    odd = Guest({"memory": 2 * 4096 + 100})
    parts = [(at, odd.write("memory", at, pattern(3, size))) for at, size in ((1000, 96), (1200, 5000), (8000, 292))]
    v.good("elf-odd", section, odd, (5, 0, 0), elf(parts), format="elf", complete=True)
    v.add("elf-cut", section, elf(ranges)[:-5000], format="elf", complete=False, whole=False)
    data = elf(ranges)
    unknown = {"kind": "UnknownFormat"}
    v.bad("elf-class", section, 4, data[:4] + b"\3" + data[5:])
    v.bad("elf-order", section, 4, data[:5] + b"\0" + data[6:])
    v.bad("elf-no-core", section, 16, elf(ranges, kind=2), **unknown)
    v.bad("elf-no-segments", section, 64, elf([]), **unknown)
    v.bad("elf-only-notes", section, 64, elf([], note=b"registers"), **unknown)
    v.bad("elf-small-segments", section, 16, data[:54] + b"\x20\0" + data[56:])
    v.bad("elf-process", section, 64, elf([(0, first), (0, second)]), **unknown)
    v.bad("elf-shared-bytes", section, 64, elf([(0, first), (1 << 20, 0, 0, 8192)]), **unknown)
    far = {"kind": "LimitExceeded"}
    v.bad("elf-far", section, 64, elf([(1 << 60, first)]), **far)
    v.bad("elf-end", section, 64, elf([((1 << 36) - 4096, first)]), **far)
    v.bad("elf-far-tables", section, 0, data[:32] + b"\0\0\0\0\1\0\0\0" + data[40:], **far)
    v.bad("elf-tables-behind", section, 8192, data[:32] + b"\0\x20\0\0" + data[36:8192] + data[64:176], **unknown)

    section = "formats.md §8"
    of = {"format": "lime", **one}
    data = lime(ranges)
    v.good("lime", section, guest, counts, data, **of)
    v.good("lime-not-in-order", section, guest, counts, lime(ranges[::-1]), **of)
    v.good("lime-odd", section, odd, (5, 0, 0), lime(parts), format="lime", complete=True)
    v.add("lime-cut", section, data[:-100], format="lime", complete=False, whole=False)
    v.add("lime-cut-in-header", section, data[:-8200], format="lime", complete=False, whole=False)
    behind = len(data)
    v.bad("lime-magic", section, behind, data + b"EMiX" + bytes(28))
    v.bad("lime-version", section, 4, lime(ranges, version=2), **unknown)
    v.bad("lime-backwards", section, behind + 8, data + lime([(8192, b"")]))
    v.bad("lime-far", section, 16, lime([(1 << 60, first)]), **far)


def add_bad(v: Vectors) -> None:
    data, _ = whole()
    s = "qemu-ram.md "
    unknown = {"kind": "UnknownFormat"}
    v.bad("version", s + "§2.1", 4, data[:4] + u32(2) + data[8:], **unknown)
    v.bad("machine-name-4-gib", s + "§3", 8, data[:9] + b"\xff" * 4 + data[13:], kind="LimitExceeded")

    def front(**more: Any) -> Stream:
        return simple(**more)[0]

    def case(name: str, section: str, build: Any, **more: Any) -> None:
        stream = front()
        at = build(stream)
        stream.put(bytes(4200))
        v.bad(name, s + section, at, bytes(stream.data), **more)

    def in_part(name: str, section: str, build: Any, **more: Any) -> None:
        def inside(stream: Stream) -> int:
            stream.part()
            return int(build(stream))

        case(name, section, inside, **more)

    case("section-type", "§2.2", lambda x: x.put(b"\x09"))
    case("part-before-start", "§2.2", lambda x: x.part(number=77))
    case("section-twice", "§2.2", lambda x: x.start("dirty-bitmap", version=1))
    case("ram-twice", "§2.2", lambda x: x.start(number=40))
    stream = Stream()
    v.bad("ram-version", s + "§4", stream.start(version=3), bytes(stream.data), **unknown)
    case("live-section", "§6", lambda x: x.start("block", number=41, version=1), **unknown)
    case("command", "§2.5", lambda x: x.command(12), **unknown)
    for number in range(4, 11):
        case(f"command-{number}", "§8", lambda x, n=number: x.command(n), **unknown)
    for name, word in (("rdma", HOOK), ("compress", COMPRESS | CONTINUE), ("full", 1)):
        in_part(f"flag-{name}", "§8", lambda x, w=word: x.put(u64(w)), **unknown)
    in_part("flags", "§4.2", lambda x: x.put(u64(0x400 | PAGE | CONTINUE)))
    in_part("mem-size-in-part", "§4.2", lambda x: x.put(u64(4096 | MEM_SIZE)))
    in_part("continue-first", "§4.2", lambda x: x.page(0, bytes(4096)))
    in_part("unlisted-block", "§4.2", lambda x: x.page(0, bytes(4096), block="other"))
    in_part("page-past-end", "§4.2", lambda x: x.page(4 * 4096, bytes(4096), block="ram"))
    in_part("page-far-past-end", "§4.2", lambda x: x.page(0xFFFFFFFFFFFFF000, b"\0", ZERO, "ram"))
    in_part("xbzrle-flags", "§4.4", lambda x: x.encoded(0, b"\0\1\1", "ram", flags=2) + 12)
    in_part("xbzrle-long", "§4.4", lambda x: x.page(0, b"\1\x10\1" + bytes(4097), XBZRLE, "ram") + 12)

    def corrupt(stream: Stream) -> int:
        stream.page(0, b"\0", ZERO, "ram")
        stream.encoded(4096, b"\0\1\1")
        return stream.encoded(8192, b"\1\2\1\2\0\0") + 8 + 3 + 4

    stream = front()
    stream.part()
    at = corrupt(stream)
    stream.eos()
    v.bad("xbzrle-runs", "xbzrle.md §4.2", at, bytes(stream.data))

    stream = front()
    stream.part()
    stream.put(u64(EOS))
    at = stream.footer(9)
    v.bad("footer", s + "§2.2", at, bytes(stream.data))

    def listed(name: str, section: str, build: Any, configuration: Any = None, **more: Any) -> None:
        stream = Stream(**(configuration or {}))
        stream.start()
        at = build(stream)
        stream.put(bytes(64))
        v.bad(name, s + section, at, bytes(stream.data), **more)

    listed("no-memory", "§4.1", lambda x: x.put(u64(MEM_SIZE)))
    listed("memory-1-tib", "§4.1", lambda x: x.put(u64(1 << 40 | MEM_SIZE)), kind="LimitExceeded")
    listed("block-over-total", "§4.1", lambda x: x.blocks({"ram": 8192}, total=4096) + 8)
    listed("block-twice", "§4.1", lambda x: (x.blocks({"ram": 4096}, total=8192), x.put(string("ram"), u64(4096)))[1])
    listed("block-without-name", "§4.1", lambda x: x.blocks({"": 4096}) + 8)
    listed("block-of-half-a-page", "§4.1", lambda x: (x.blocks({"ram": 1024}, total=1024), x.put(bytes(8)))[0] + 8)
    many = [string(f"{number:x}") + u64(0) for number in range(4097)]
    listed("many-blocks", "§4.1", lambda x: x.put(u64(1 << 30 | MEM_SIZE), *many) + 8 + len(b"".join(many[:-1])),
           kind="LimitExceeded")  # fmt: skip
    listed("page-size-unknown", "§4.3", lambda x: x.blocks({"ram": 4096}) + 8, {"machine": "versatilepb"}, **unknown)
    listed("pages-before-list", "§4.2", lambda x: x.page(0, bytes(4096), block="ram"))
    for name, section, configuration in (
        ("page-bits", "§3", {"bits": 30}),
        ("capability", "§3", {"capabilities": ("mapped-ram", "zero-page-detection")}),
        ("subsection", "§3", {"other": "configuration/other"}),
    ):
        stream = Stream(**configuration)
        v.bad(name, s + section, stream.data.index(b"\x05"), bytes(stream.data) + bytes(64), **unknown)
    stream = Stream(bits=12)
    at = stream.data.index(b"\x05")
    v.bad("page-size-contradicts", s + "§3", at, bytes(stream.data), arguments=("--page-size", "8192"))

    for name, more, number in (("mapped-version", {"version": 2}, 0), ("mapped-offsets", {"shift": 512}, 1)):
        stream, guest = Stream(capabilities=("mapped-ram",)), Guest({"ram": 4096, "vector.rom": 4096})
        stream.start()
        starts = mapped(stream, guest, {"ram": {}, "vector.rom": {}}, **more)
        v.bad(name, s + "§5", starts[number], bytes(stream.data), **(unknown if number == 0 else {}))

    stream, _ = Stream(), None
    stream.start()
    stream.blocks({"ram": 8192})
    stream.put(u64(FLUSH))
    stream.eos()
    main = finished(stream)
    for name, section, offset, bad, more in (
        ("magic", "§7.2", 64, packet(1, magic=0x11223355), {}),
        ("pages", "§7.2", 80, packet(1, "ram", tuple(range(0, 130 * 4096, 4096)), room=130), {}),
        ("offset", "§7.2", 64, packet(1, "ram", (100,), bytes(4096), flags=SYNC), {}),
        ("block", "§7.2", 64, packet(1, "other", (0,), bytes(4096), flags=SYNC), {}),
        ("page-past-end", "§7.2", 64, packet(1, "ram", (8192,), bytes(4096), flags=SYNC), {}),
        ("size", "§7.2", 64, packet(1, "ram", (0, 4096), bytes(4096), flags=SYNC), {}),
        ("huge", "§7.2", 84, packet(1, "ram", (0,), size=0xFFFFFFFF, flags=SYNC), {"kind": "LimitExceeded"}),
        ("zlib", "§7.2", 64, packet(1, "ram", (0,), b"\xff" * 100, flags=SYNC | ZLIB), {}),
        ("qpl", "§8", 72, packet(1, "ram", (0,), bytes(4096), flags=8), unknown),
        ("flags", "§7.2", 72, packet(1, "ram", (0,), bytes(4096), flags=0x100), unknown),
    ):
        v.bad(f"multifd-{name}", s + section, offset, main, hello(0) + bad, **more)
    v.bad("multifd-hello", s + "§7.1", 0, main, u32(0x11223344) + u32(2) + bytes(56), **unknown)
    v.bad("multifd-not-main", "formats.md §2", 0, hello(0), **unknown)


def build() -> dict[str, bytes]:
    """Every file of the folder, by name."""
    vectors = Vectors()
    add_good(vectors)
    add_sending(vectors)
    add_dumps(vectors)
    add_bad(vectors)
    return vectors.made()


def content(path: Path) -> bytes:
    """A file of the folder, decompressed: what xz makes of the same bytes may differ."""
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def bring_up_to_date(folder: Path, made: dict[str, bytes]) -> int:
    """Write the files that differ, or with --check only name them. Returns the exit code."""
    found = {path.name: content(path) for path in folder.glob("*")} if folder.exists() else {}
    changed = sorted(name for name in {*made, *found} if made.get(name) != found.get(name))
    if "--check" in sys.argv:
        print("\n".join(changed) or "nothing would change")
        return 1 if changed else 0
    folder.mkdir(parents=True, exist_ok=True)
    for name in changed:
        if name in made:
            data = made[name]
            (folder / name).write_bytes(lzma.compress(data, preset=9) if name.endswith(".xz") else data)
        else:
            (folder / name).unlink()
    print(f"{len(made)} files, {len(changed)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(bring_up_to_date(FOLDER, build()))
