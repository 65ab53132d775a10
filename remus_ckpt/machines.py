"""Machines in files that hold one state of them, whatever stands around it (specs/formats.md).

Of QEMU: a migration stream, alone or with the further connections of multifd; a mapped-ram file; what `virsh save`
writes; an internal snapshot of a qcow2 image. Of any machine: memory as an ELF core or in the format of LiME.
"""

from __future__ import annotations

import heapq
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol, Self, cast

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.blocks import Blocks
from remus_ckpt.compressed import COMPRESSIONS, Inflater, Lzop
from remus_ckpt.errors import Malformed, RemusError, StreamError, UnknownFormat
from remus_ckpt.files import StreamFile
from remus_ckpt.image import elf, lime
from remus_ckpt.image.dump import DumpReader
from remus_ckpt.image.qcow2 import Qcow2, Snapshot
from remus_ckpt.image.virsh import VirshHeader, read_header
from remus_ckpt.limits import MIB, Limits
from remus_ckpt.plural import counted
from remus_ckpt.restorer import Home
from remus_ckpt.wire.formats import DUMP_WORDS
from remus_ckpt.wire.qemu import events
from remus_ckpt.wire.qemu.channel import ChannelReader, Hello, Packet
from remus_ckpt.wire.qemu.devices import description_of
from remus_ckpt.wire.qemu.reader import Reader
from remus_ckpt.wire.qemu.sections import MAPPED_RAM, ChannelFlag

_END_BYTES = 4 * MIB
"""Where the JSON description is looked for, from the end of the bytes."""
_STEP_BYTES = 1024
"""Bytes of zstd data decompressed at a time: a block gives at most 128 KiB and takes at least 4."""


class _Body(Protocol):
    """The bytes of a stream, from its first to its last."""

    def readinto(self, buffer: memoryview) -> int:
        """Read at least a byte; returns the number, 0 at the end."""


class _Seekable(_Body, Protocol):
    """One of which any part can be read."""

    def skip(self, size: int) -> int:
        """Pass over bytes; returns how many there were."""

    def last(self, size: int) -> bytes:
        """The last bytes."""


class _Source(io.RawIOBase):
    """A stream file as what an `Inflater` reads from."""

    def __init__(self, file: StreamFile) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(memoryview(buffer).cast("B"))


@dataclass(frozen=True, slots=True)
class Around:
    """What stands around a stream.

    format: "qemu", "virsh-save", "qcow2", "elf" or "lime"
    """

    format: str
    virsh: VirshHeader | None = None
    snapshots: tuple[Snapshot, ...] | None = None
    snapshot: Snapshot | None = None


class Machine:
    """One machine's saved state: reads its stream to the end, or to a fault.

    file: as opened; it is closed with this object
    more: paths of the further connections of a multifd migration
    snapshot: the name of one in a qcow2 image
    page_size: what is known of it, for a stream that does not state it
    home: gives the home of each block's memory; see `Blocks`
    A fault of the bytes is kept in `error`. Raises RemusError for options that do not fit, and OSError.
    """

    def __init__(
        self,
        file: StreamFile,
        more: Sequence[str] = (),
        *,
        home: Callable[[events.RamBlock], Home | None],
        snapshot: str | None = None,
        page_size: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.file = file
        self.name = file.name
        self.limits = limits or Limits()
        self.error: StreamError | None = None
        self.end: events.EndOfStream | None = None
        self.configuration: events.Configuration | None = None
        self.devices: events.DeviceState | None = None
        self.cut: str | None = None
        """Which connection of a multifd migration ends too early."""
        self.inflater: Inflater | Lzop | None = file.inflater
        """Decompresses the stream, if it is compressed."""
        self._stack = ExitStack()
        self._stack.callback(file.close)
        self.around = Around(file.format.word if file.format is not None and file.format.word else "qemu")
        self._body: _Body = file
        self._channels: list[_Channel] = []
        closing: int | None = None
        try:
            self._channels += [self._stack.enter_context(_Channel(path)) for path in more]
            self.around, self._body = self._unwrap(snapshot)
            closing = None if page_size else self._closing_page_size()
        except StreamError as error:
            self.error = error
        except BaseException:
            self._stack.close()
            raise
        self.reader: Reader | DumpReader
        if self.is_dump:
            if page_size is not None:
                file.close()
                raise RemusError(f"{self.name}: --page-size is for QEMU streams, and this is not one")
            self.reader = _dump_reader(self.around.format, self.limits)
        else:
            self.reader = Reader(page_size=page_size, closing_page_size=closing, limits=self.limits)
        self.blocks = Blocks(home, self.reader.fail)
        self._marks = 0
        self._waits_for_flush = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        self._stack.close()

    @property
    def is_dump(self) -> bool:
        """Whether it holds memory alone, by physical address."""
        return self.around.format in DUMP_WORDS

    @property
    def is_mapped(self) -> bool:
        """Whether the stream is a mapped-ram file."""
        return self.configuration is not None and MAPPED_RAM in (self.configuration.capabilities or ())

    @property
    def format(self) -> str:
        """The word for what it is (specs/formats.md §1)."""
        return "mapped-ram" if self.around.format == "qemu" and self.is_mapped else self.around.format

    @property
    def is_multifd(self) -> bool:
        """Whether further connections belong to it."""
        return bool(self._channels)

    @property
    def connections(self) -> int:
        """How many further connections belong to it."""
        return len(self._channels)

    @property
    def is_good(self) -> bool:
        """Whether all of memory has come, and belongs to one instant."""
        return self.blocks.is_whole and self.cut is None

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing."""
        is_whole = self.inflater is None or not self.inflater.is_cut
        return self.end is not None and self.end.complete and self.cut is None and is_whole

    def _unwrap(self, snapshot: str | None) -> tuple[Around, _Body]:
        file = self.file
        found = file.format
        word = found.word if found is not None else None
        if word == "multifd":
            raise UnknownFormat(
                "this is one of the other connections of a multifd migration: name the main connection first, "
                "then the others",
                offset=0,
                section="formats.md §2",
            )
        if snapshot is not None and word != "qcow2":
            raise RemusError(f"{self.name}: --snapshot is for qcow2 images, and this is not one")
        if self._channels and word != "qemu":
            raise RemusError(f"{self.name}: only a QEMU migration stream has other connections")
        if word == "virsh-save":
            return self._unwrap_virsh()
        if word == "qcow2":
            if not file.can_seek:
                raise UnknownFormat(
                    "a qcow2 image must be an uncompressed file: its parts are read in any order",
                    offset=0,
                    section="formats.md §4",
                )
            image = self._stack.enter_context(Qcow2(f"/proc/self/fd/{file.fileno()}", self.limits))
            image.path = self.name
            chosen = image.find(snapshot)
            return Around("qcow2", snapshots=image.snapshots, snapshot=chosen), image.state(chosen)
        return Around(word if word in DUMP_WORDS else "qemu"), file

    def _unwrap_virsh(self) -> tuple[Around, _Body]:
        def read(size: int) -> bytes:
            data = bytearray(size)
            at = 0
            while at < size and (count := self.file.readinto(memoryview(data)[at:])):
                at += count
            return bytes(data[:at])

        header = read_header(read, self.limits)
        around = Around("virsh-save", virsh=header)
        if header.compression in ("raw", "sparse"):
            return around, self.file
        if header.compression == "lzop":
            self.inflater = self._lzop(header.body)
        else:
            kinds = tuple(one for one in COMPRESSIONS if one.name == header.compression)
            self.inflater = Inflater(io.BufferedReader(_Source(self.file)), kinds)
        return around, self.inflater

    def _lzop(self, body: int) -> Lzop:
        try:
            if self.file.can_seek:
                return self._stack.enter_context(Lzop(self.file.fileno(), body))
            why = "it is not a seekable file"
        except FileNotFoundError:
            why = "the command lzop is missing: install it"
        raise UnknownFormat(
            f"the body is compressed by lzop, and {why}; or take what follows the first {body} bytes, decompress "
            "it (`lzop -dc`), and read the result",
            offset=28,
            section="formats.md §3",
        )

    def _closing_page_size(self) -> int | None:
        """The page size in the JSON at the end, if that can be read before the rest."""
        seekable = self._seekable
        if seekable is None or self.is_dump:
            return None
        description = description_of(seekable.last(_END_BYTES), self.limits.description_bytes) or {}
        found = description.get("page_size")
        return found if isinstance(found, int) else None

    @property
    def _seekable(self) -> _Seekable | None:
        body = self._body
        can_seek = body.can_seek if isinstance(body, StreamFile) else not isinstance(body, Inflater | Lzop)
        return cast(_Seekable, body) if can_seek else None

    # The stream

    def read_events(self) -> Iterator[events.Event]:
        """Every event, once it is applied, up to a fault."""
        if self.error is not None:
            return
        reader, seekable = self.reader, self._seekable
        try:
            while self.cut is None:
                event = reader.next_event()
                if event is not None:
                    self._take(event)
                    yield event
                    if isinstance(event, events.EndOfStream):
                        return
                    continue
                if reader.gap and seekable is not None:
                    reader.skip_gap(seekable.skip(reader.gap))
                if size := self._body.readinto(reader.get_buffer()):
                    reader.buffer_updated(size)
                else:
                    reader.feed_eof()
        except StreamError as error:
            self.error = error

    def read(self) -> None:
        """Read to the end, or to a fault."""
        for _ in self.read_events():
            pass

    def _take(self, event: events.Event) -> None:
        match event:
            case events.Configuration():
                self.configuration = event
            case events.DeviceState():
                self.devices = event
            case events.EndOfStream():
                self.end = event
            case events.Mark():
                self._mark(event)
        self.blocks.take(event)

    # multifd

    def _mark(self, mark: events.Mark) -> None:
        """specs/qemu-ram.md §7.3"""
        if mark.kind == "flush":
            self._waits_for_flush = True
            if not self._channels:
                raise UnknownFormat(
                    "memory comes through other connections (multifd): name those files too, the main connection first",
                    offset=mark.offset,
                    section="qemu-ram.md §7",
                )
        elif self._waits_for_flush:
            return
        if not self._channels:
            return
        self._marks += 1
        page_size = self.reader.known_page_size(mark.offset)
        # Numbers are given out in order: of two packets with one page the higher is newer, in whichever channel.
        for packet in heapq.merge(
            *(channel.up_to_sync(page_size, self.limits) for channel in self._channels), key=lambda one: one.number
        ):
            self._take_packet(packet, page_size)
        self.cut = next((channel.name for channel in self._channels if channel.syncs < self._marks), None)

    def _take_packet(self, packet: Packet, page_size: int) -> None:
        if not len(packet.normal) and not len(packet.zero):
            return
        block = self.blocks.named.get(packet.block)
        highest = max(packet.normal.max(initial=0), packet.zero.max(initial=0))
        if block is None or highest >= len(block.came):
            raise Malformed(
                f"a packet for page {highest} of the block {packet.block!r}",
                offset=packet.offset,
                section="qemu-ram.md §7.2",
                chunk="multifd",
            )
        self.blocks.take(
            events.Pages(
                offset=packet.offset,
                block=packet.block,
                data=memoryview(packet.data),
                full=packet.normal,
                places=np.arange(len(packet.normal)) * page_size,
                zero=packet.zero,
                fills=np.zeros(len(packet.zero), dtype=np.uint8),
                encoded=np.empty(0, dtype=np.int64),
                frames=b"",
                frame_offsets=np.empty(0, dtype=np.int64),
            )
        )


def _dump_reader(word: str, limits: Limits) -> DumpReader:
    if word == "elf":
        return DumpReader(elf.parse, "formats.md §7", limits)
    return DumpReader(lime.parse, "formats.md §8", limits)


class _Channel:
    """One further connection of a multifd migration, in a file."""

    def __init__(self, path: str) -> None:
        self._file = StreamFile(path)
        self.name = self._file.name
        self.syncs = 0
        """How many SYNC packets have come."""
        self._reader: ChannelReader | None = None
        self._inflate: Callable[[NDArray[np.uint8], int, int], NDArray[np.uint8]] | None = None
        found = self._file.format
        if found is None or found.word != "multifd":
            self.close()
            raise UnknownFormat(
                f"{self.name} is not another connection of a multifd migration: name the main connection first, "
                "then the others",
                offset=0,
                section="qemu-ram.md §7.1",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def up_to_sync(self, page_size: int, limits: Limits) -> Iterator[Packet]:
        """The packets up to the next SYNC, decompressed, or to the end of the file. Raises StreamError."""
        reader = self._reader = self._reader or ChannelReader(page_size, limits)
        while True:
            try:
                event = reader.next_event()
            except EOFError:
                return
            except StreamError as error:
                error.message = f"{self.name}: {error.message}"
                raise
            if event is None:
                if size := self._file.readinto(reader.get_buffer()):
                    reader.buffer_updated(size)
                else:
                    reader.feed_eof()
            elif not isinstance(event, Hello):
                yield self._decompressed(event, page_size)
                if event.flags & ChannelFlag.SYNC:
                    self.syncs += 1
                    return

    def _decompressed(self, packet: Packet, page_size: int) -> Packet:
        size = len(packet.normal) * page_size
        data = packet.data
        if size and packet.flags & (ChannelFlag.ZLIB | ChannelFlag.ZSTD):
            if self._inflate is None:
                self._inflate = _inflater(bool(packet.flags & ChannelFlag.ZSTD))
            data = self._inflate(data, size, packet.offset)
        if len(data) != size:
            raise Malformed(
                f"{self.name}: a packet of {len(data)} bytes for {counted(len(packet.normal), 'page')} of {page_size}",
                offset=packet.offset,
                section="qemu-ram.md §7.2",
                chunk="multifd",
            )
        return Packet(
            offset=packet.offset,
            flags=packet.flags,
            number=packet.number,
            block=packet.block,
            normal=packet.normal,
            zero=packet.zero,
            data=data,
        )


def _inflater(is_zstd: bool) -> Callable[[NDArray[np.uint8], int, int], NDArray[np.uint8]]:
    """A function that decompresses one packet after the other: a channel is one compressed stream (§7.2)."""
    step: Callable[[bytes, int], bytes]
    if is_zstd:
        try:
            import zstandard
        except ImportError:
            raise RemusError("the pages are compressed by zstd: to read them, pip install 'remus_ckpt[zstd]'") from None
        zstd = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()

        def step(data: bytes, left: int) -> bytes:
            return zstd.decompress(data)
    else:
        inner = zlib.decompressobj()

        def step(data: bytes, left: int) -> bytes:
            return inner.decompress(data, left + 1)

    def inflate(data: NDArray[np.uint8], size: int, offset: int) -> NDArray[np.uint8]:
        out = bytearray()
        try:
            for at in range(0, len(data), _STEP_BYTES):
                out += step(data[at : at + _STEP_BYTES].tobytes(), size - len(out))
                if len(out) > size:
                    break
        except MemoryError:
            raise
        except Exception as error:
            raise Malformed(
                f"a packet that cannot be decompressed ({error})",
                offset=offset,
                section="qemu-ram.md §7.2",
                chunk="multifd",
            ) from None
        return np.frombuffer(out, dtype=np.uint8)

    return inflate
