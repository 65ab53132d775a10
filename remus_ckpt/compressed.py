"""Compressed files, read up to the last byte that can still be decompressed: xz, gzip, bzip2, lz4 and zstd.

A file is a series of members (gzip), streams (xz, bzip2) or frames (lz4, zstd), with padding between and after them.
Each step consumes and produces a bounded number of bytes, whatever the bytes claim to hold.
"""

from __future__ import annotations

import bz2
import io
import lzma
import os
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, Self

import lz4.frame

from remus_ckpt.errors import Malformed, RemusError
from remus_ckpt.limits import MIB

_READ_BYTES = 1 << 16
_KEPT_BYTES = 16 * MIB
"""How many bytes of a member from a pipe are kept, to go through them again after a fault."""
_WINDOW_BYTES = 1024 * MIB
"""For an xz dictionary, 16 times that of `xz -9`; for a zstd window, `zstd --long=30`."""
_SKIPPABLE = bytes.fromhex("2a4d18")
"""After a first byte of 50 to 5f, the magic of an lz4 or zstd frame without data."""
_LOOK_BYTES = 8
"""The head of such a frame, magic and length; longer than any other magic."""


class _Decompressor(Protocol):
    """Decompresses one member, with the interface of bz2 and lzma."""

    eof: bool
    needs_input: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """At most `max_length` bytes of what these and earlier bytes hold."""


class _Gzip:
    def __init__(self) -> None:
        self._inner = zlib.decompressobj(zlib.MAX_WBITS | 16)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


class _Zstd:
    """zstandard has no `max_length`. A block gives at most 128 KiB and takes at least 4 bytes: so steps are bounded."""

    needs_input = True

    def __init__(self) -> None:
        try:
            import zstandard
        except ImportError:
            raise RemusError("this is zstd data: to read it, pip install 'remus_ckpt[zstd]'") from None
        self._inner = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).decompressobj()

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(data)


@dataclass(frozen=True, slots=True)
class Compression:
    """One row of the table.

    magic: the first bytes of a member
    start: returns a decompressor for one member
    step_bytes: bytes that it takes at a time
    skips: whether there may be frames without data
    """

    name: str
    magic: bytes
    start: Callable[[], Any]
    step_bytes: int = _READ_BYTES
    skips: bool = False


COMPRESSIONS = (
    Compression("xz", b"\xfd7zXZ\0", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _WINDOW_BYTES)),
    Compression("gzip", b"\x1f\x8b", _Gzip),
    Compression("bzip2", b"BZh", bz2.BZ2Decompressor),
    Compression("lz4", b"\x04\x22\x4d\x18", lz4.frame.LZ4FrameDecompressor, skips=True),
    Compression("zstd", b"\x28\xb5\x2f\xfd", _Zstd, step_bytes=1024, skips=True),
)


def compressions(front: bytes) -> tuple[Compression, ...]:
    """The compressions that a file with these first bytes may have: frames without data look alike in lz4 and zstd."""
    return tuple(one for one in COMPRESSIONS if front.startswith(one.magic) or (one.skips and _is_skippable(front)))


def _is_skippable(front: bytes) -> bool:
    """Whether the bytes begin with that magic, or with as much of it as the file has left."""
    return 0x50 <= front[0] <= 0x5F and front[1:4] == _SKIPPABLE[: len(front) - 1] if front else False


class Inflater:
    """Decompresses a file, member by member.

    file: at its first byte
    kinds: what its members may be, from `compressions`

    `readinto` gives everything that can be decompressed before a fault, then raises Malformed.
    """

    def __init__(self, file: BinaryIO, kinds: tuple[Compression, ...]) -> None:
        self.kinds = kinds
        self.is_cut = False
        """Whether the file ends within a member."""
        self.padding_bytes = 0
        """Zeros after the last member."""
        self.junk_bytes = 0
        """Bytes after the last member that are neither zeros nor another member."""
        self.position = 0
        """Bytes of the file that have been read."""
        self._file = file
        self._back = b""  # bytes to be read again
        self._log: bytearray | None = None  # for a pipe: the bytes of the member so far
        self._member: _Decompressor | None = None
        self._begin = 0  # offset of the member in the file
        self._given = 0  # bytes decompressed from it
        self._step = 0  # offset of its last step in the file
        self._skip = 0  # on a further pass: bytes that have been given already
        self._pass = 0  # number of passes over it
        self._fine = 0  # on a further pass: the offset in the file from which steps are small
        self._out = memoryview(b"")
        self._offset = 0
        self._is_over = False

    @property
    def name(self) -> str:
        """The name of the compression."""
        return " or ".join(one.name for one in self.kinds)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing at the end, and nothing follows that does not belong there."""
        return not self.is_cut and not self.junk_bytes

    def readinto(self, buffer: memoryview) -> int:
        """Give at least one byte; returns the number, 0 at the end."""
        while not self._out:
            if self._is_over or not (self._member or self._begin_member()):
                self._is_over = True
                return 0
            self._advance(len(buffer))
        size = min(len(buffer), len(self._out))
        buffer[:size] = self._out[:size]
        self._out = self._out[size:]
        self._offset += size
        return size

    def refuse_junk(self) -> None:
        """Raise Malformed if anything but padding follows the last member."""
        if self.junk_bytes:
            raise Malformed(
                f"{self.junk_bytes} bytes after the {self.name} data are neither {self.name} data nor padding",
                offset=self._offset,
            )

    def _advance(self, room: int) -> None:
        """One step through the member."""
        member = self._member
        assert member is not None
        size = self.kinds[0].step_bytes
        if self._pass:
            is_fine = self.position >= self._fine
            size = 1 if is_fine else min(size, self._fine - self.position)
            room = 1 if is_fine and self._pass > 1 else room
        data = b""
        is_hungry = member.needs_input
        if is_hungry:
            at = self.position
            data = self._take(size)
            self._step = at
        try:
            out = member.decompress(data, room)
        except MemoryError:
            raise  # no fault of the data
        except Exception as error:  # each library has its own, and one may not be installed
            self._again(error)
            return
        if member.eof:
            self._give_back(member.unused_data or b"")
            self._member = None
        elif is_hungry and not data and not out:
            self.is_cut = self._is_over = True
        skipped = min(self._skip, len(out))
        self._skip -= skipped
        self._given += len(out) - skipped
        self._out = memoryview(out)[skipped:]

    def _again(self, error: Exception) -> None:
        """A failing step loses what it would have given. So go through the member again, and take that step byte by
        byte; then once more, and limit what the failing byte gives."""
        if self._pass == 2 or not self._rewind():
            raise Malformed(f"the {self.name} data cannot be read any further ({error})", offset=self._offset)
        self._pass += 1
        self._fine, self._skip = self._step, self._given
        self._member = self.kinds[0].start()

    def _begin_member(self) -> bool:
        """Begin the next member; returns whether there is one. Skips padding and frames without data."""
        self._mark(None)
        self._pass = 0
        while True:
            self._pass_zeros()
            look = self._look()
            if not look:
                return False
            if found := [one for one in self.kinds if look.startswith(one.magic)]:
                self.kinds = (found[0],)
                self.padding_bytes = 0
                self._give_back(look)
                self._mark(bytearray())
                self._member = found[0].start()
                self._given = 0
                return True
            if not (self.kinds[0].skips and _is_skippable(look)):
                self.is_cut = any(one.magic.startswith(look) for one in self.kinds)
                self.junk_bytes = 0 if self.is_cut else len(look) + self._drain()
                return False
            self.padding_bytes = 0
            if len(look) < _LOOK_BYTES or not self._jump(int.from_bytes(look[4:8], "little")):
                self.is_cut = True
                return False

    # The file

    def _pass_zeros(self) -> None:
        while data := self._take(_READ_BYTES):
            rest = data.lstrip(b"\0")
            self.padding_bytes += len(data) - len(rest)
            if rest:
                self._give_back(rest)
                return

    def _look(self) -> bytes:
        """The next bytes, fewer than 8 only at the end."""
        look = b""
        while len(look) < _LOOK_BYTES and (more := self._take(_LOOK_BYTES - len(look))):
            look += more
        return look

    def _take(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        if self._back:
            data, self._back = self._back[:size], self._back[size:]
        else:
            data = self._file.read1(size)  # type: ignore[attr-defined]
        self.position += len(data)
        if self._log is not None:
            self._log += data
            if len(self._log) > _KEPT_BYTES:
                self._log = None
        return data

    def _give_back(self, data: bytes) -> None:
        self._back = data + self._back
        self.position -= len(data)

    def _mark(self, log: bytearray | None) -> None:
        """Note that a member begins here, for `_rewind`."""
        self._begin = self.position
        self._log = log if not self._file.seekable() else None

    def _rewind(self) -> bool:
        if self._file.seekable():
            self._file.seek(self._begin - self.position - len(self._back), io.SEEK_CUR)
            self._back = b""
        elif self._log is not None:
            self._back = bytes(self._log) + self._back
            self._log.clear()
        else:
            return False
        self.position = self._begin
        return True

    def _jump(self, size: int) -> bool:
        """Skip bytes; returns whether all of them were there."""
        while size and (data := self._take(min(size, _READ_BYTES))):
            size -= len(data)
        return not size

    def _drain(self) -> int:
        size = 0
        while data := self._take(_READ_BYTES):
            size += len(data)
        return size


class Lzop:
    """Decompresses lzop data in a file with the command `lzop`: Python's standard library cannot.

    fd: of the file; start: where the data begin
    Raises FileNotFoundError if there is no such command. A fault shows as a premature end, like a truncation.
    """

    name = "lzop"

    def __init__(self, fd: int, start: int) -> None:
        with open(f"/proc/self/fd/{fd}", "rb", buffering=0) as file:  # a place in the file of its own
            file.seek(start)
            self._process = subprocess.Popen(
                ["lzop", "-dc"], stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
            )
        self.is_cut = False
        """Whether the data end too early, or are damaged."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def readinto(self, buffer: memoryview) -> int:
        """Give at least one byte; returns the number, 0 at the end."""
        size = os.readv(self._process.stdout.fileno(), [buffer])  # type: ignore[union-attr]
        if not size:
            self.is_cut = self._process.wait() != 0
        return size
