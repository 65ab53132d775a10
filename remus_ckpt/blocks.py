"""The blocks of a machine's memory, filled by the events of a QEMU stream (specs/qemu-ram.md) or of a dump.

There is no earlier state to preserve, so pages are written as they come. Until `MemoryEnd` has come, memory is a
mixture of instants.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec import get_codec
from remus_ckpt.codec.xbzrle import FRAME_BYTES, apply_page
from remus_ckpt.errors import Malformed
from remus_ckpt.image.dump import Bytes, Growing
from remus_ckpt.memory import memory_sha256
from remus_ckpt.pages import PAGE_SIZE, Pages, pages_for
from remus_ckpt.restorer import Anonymous, Home
from remus_ckpt.wire.qemu import events

_FIRMWARE = re.compile(r"\.(m?rom|bios|vram|flash\d*)$|^isa-bios$")
_OBJECTS = "/objects/"
"""How the blocks of memory backends begin with some machines; all other names with a slash are of devices and ROMs."""


def is_device(name: str) -> bool:
    """Whether a block, by its name, belongs to a device or holds firmware: the guest does not call it its memory."""
    return bool(_FIRMWARE.search(name)) or ("/" in name and not name.startswith(_OBJECTS))


class Block:
    """One block of memory.

    stated: what the stream says of it
    home: where its memory lives; None: nowhere, its pages are only checked
    """

    def __init__(self, stated: events.RamBlock, home: Home | None) -> None:
        self.name = stated.name
        self.size = stated.size
        """In bytes."""
        self.page_size = stated.page_size
        self.address = stated.address
        """Where it is in the guest's memory, if the stream says so."""
        most = stated.most if isinstance(stated, Growing) else self.size
        self._came = np.zeros(-(-most // self.page_size), dtype=bool)
        self._filled = np.zeros(len(self._came), dtype=bool)  # may hold something other than zeros
        self._home = home
        pages = pages_for(most)
        self._memory: Pages = np.empty((0, PAGE_SIZE), dtype=np.uint8)
        if home is not None and pages:
            self._memory = home.open(pages)
        self._flat = self._memory.reshape(-1)
        self.is_plain = home is None or isinstance(home, Anonymous)
        """Whether its memory is in this process, or nowhere."""

    @property
    def came(self) -> NDArray[np.bool_]:
        """bool[pages of `page_size`]: which of them the stream had."""
        return self._came[: -(-self.size // self.page_size)]

    @property
    def memory(self) -> Pages:
        """uint8[n, 4096]: its memory, the last page padded with zeros; empty if it lives nowhere."""
        return self._memory[: pages_for(self.size)]

    @property
    def image(self) -> NDArray[np.uint8]:
        """uint8[size]: its memory without padding."""
        return self._flat[: self.size]

    def sha256(self) -> str:
        """SHA-256 of its memory, in hex."""
        return memory_sha256(self.image)

    def write(self, first: int, pages: Pages) -> None:
        """Write full pages of the block's own size, uint8[n, page_size], from number `first` on."""
        self._came[first : first + len(pages)] = True
        self._filled[first : first + len(pages)] = True
        if self._home is None:
            return
        size = self.page_size
        if self.is_plain:
            self._flat[first * size : (first + len(pages)) * size].reshape(len(pages), size)[:] = pages
        elif size % PAGE_SIZE:
            self._reserve(np.arange(first, first + len(pages)))
            self._flat[first * size : (first + len(pages)) * size] = pages.reshape(-1)
        else:
            whole = np.ascontiguousarray(pages).reshape(-1, PAGE_SIZE)
            begin = first * size // PAGE_SIZE
            self._home.write(self._memory, np.arange(begin, begin + len(whole)), whole)

    def scatter(self, numbers: NDArray[np.int64], pages: Pages) -> bool:
        """Write full pages, each to its place, in one call, if memory is a file; returns whether it is.

        numbers: int64[n], each once
        pages: uint8[n, page_size]
        """
        if self._home is None or self.page_size % PAGE_SIZE:
            return False
        self._came[numbers] = self._filled[numbers] = True
        parts = self.page_size // PAGE_SIZE
        if parts > 1:
            numbers = (numbers[:, None] * parts + np.arange(parts)).reshape(-1)
        self._home.write(self._memory, numbers, pages.reshape(-1, PAGE_SIZE))
        return True

    def fill(self, numbers: NDArray[np.int64], fills: NDArray[np.uint8]) -> None:
        """Fill pages with a byte each; zeros only where something else may be."""
        self._came[numbers] = True
        needed = self._filled[numbers] | (fills != 0)
        if not needed.any():
            return
        for number, fill in zip(numbers[needed].tolist(), fills[needed].tolist(), strict=True):
            self.write(number, np.full((1, self.page_size), fill, dtype=np.uint8))
            self._filled[number] = fill != 0

    def put(self, at: int, data: memoryview) -> int:
        """Write bytes from `at` on, whole pages or not; returns how many pages they touch."""
        stop = at + len(data)
        self.size = max(self.size, stop)
        first, last = at // self.page_size, -(-stop // self.page_size)
        self._came[first:last] = self._filled[first:last] = True
        if self._home is None:
            return last - first
        pages = np.arange(at // PAGE_SIZE, pages_for(stop))
        if self.is_plain:
            self._flat[at:stop] = data
        elif at % PAGE_SIZE or stop % PAGE_SIZE:
            self._home.reserve(pages)
            self._flat[at:stop] = data
        else:
            self._home.write(self._memory, pages, np.frombuffer(data, dtype=np.uint8).reshape(-1, PAGE_SIZE))
        return last - first

    def apply(self, numbers: NDArray[np.int64], frames: bytes) -> None:
        """Apply pages encoded by XBZRLE to what is there. Raises Malformed, with the offset in `frames`."""
        if self.page_size == PAGE_SIZE:
            codec = get_codec("xbzrle")
            checked = codec.check(frames, len(numbers))
            if self._home is not None:
                self._home.reserve(numbers)
                codec.apply(frames, self._memory, index=numbers, checked=checked)
        else:
            self._apply_other(numbers, frames)
        self._came[numbers] = self._filled[numbers] = True

    def _apply_other(self, numbers: NDArray[np.int64], frames: bytes) -> None:
        """Pages of other sizes, one by one."""
        size = self.page_size
        if self._home is not None:
            self._reserve(numbers)
        scratch = np.zeros(size, dtype=np.uint8)
        at = 0
        for number in numbers.tolist():
            body = at + FRAME_BYTES
            at = body + (frames[at + 1] << 8 | frames[at + 2])
            page = scratch if self._home is None else self._flat[number * size : (number + 1) * size]
            try:
                apply_page(frames[body:at], page)
            except Malformed as error:
                raise Malformed(error.message, offset=body + (error.offset or 0), section=error.section) from None

    def _reserve(self, numbers: NDArray[np.int64]) -> None:
        assert self._home is not None
        first, stop = numbers * self.page_size // PAGE_SIZE, pages_for_each((numbers + 1) * self.page_size)
        self._home.reserve(np.unique(np.concatenate([np.arange(a, b) for a, b in zip(first, stop, strict=True)])))


def pages_for_each(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """As `pages_for`, for many sizes."""
    return -(-sizes // PAGE_SIZE)


class Blocks:
    """All blocks of one machine's memory.

    home: gives the home of a block, by name and size; None for a block whose pages are only checked
    fail: records a fault of the stream, as `Reader.fail`
    """

    def __init__(
        self,
        home: Callable[[events.RamBlock], Home | None],
        fail: Callable[[Malformed], Malformed] = lambda error: error,
    ) -> None:
        self.named: dict[str, Block] = {}
        """The blocks, in the order of the stream."""
        self.counts = {"page": 0, "zero": 0, "xbzrle": 0}
        """Pages by the way they came. A page that comes twice counts twice; one that a mapped-ram file leaves out is
        zero."""
        self.is_whole = False
        """Whether all of memory has come."""
        self._home = home
        self._fail = fail

    def take(self, event: events.Event) -> None:
        """Take in what an event says of memory; other events are ignored. Raises Malformed."""
        match event:
            case events.Pages():
                self._pages(event)
            case events.RamBlock():
                self.named[event.name] = Block(event, self._home(event))
            case events.Mapped():
                # What the bitmap leaves out is zeros, and in the stream so far as it can be.
                self.named[event.block].came[:] = True
                self.counts["zero"] += event.absent
            case Bytes():
                self.counts["page"] += self.named[event.block].put(event.at, event.data)
            case events.MemoryEnd():
                self.is_whole = True

    def _pages(self, event: events.Pages) -> None:
        block = self.named[event.block]
        counts = self.counts
        if count := len(event.full):
            counts["page"] += count
            self._write_full(block, event)
        if count := len(event.zero):
            counts["zero"] += count
            block.fill(event.zero, event.fills)
        if count := len(event.encoded):
            counts["xbzrle"] += count
            try:
                block.apply(event.encoded, event.frames)
            except Malformed as error:
                raise self._fail(_placed(error, event)) from None

    def _write_full(self, block: Block, event: events.Pages) -> None:
        """Runs of pages that follow each other, in memory and at one distance in the buffer, are one copy each."""
        numbers, places, size = event.full, event.places, block.page_size
        if not block.is_plain:
            data = np.frombuffer(event.data, dtype=np.uint8)
            if block.scatter(numbers, np.lib.stride_tricks.sliding_window_view(data, size)[places]):
                return
        if len(numbers) == 1:
            block.write(int(numbers[0]), np.ndarray((1, size), np.uint8, event.data, int(places[0])))
            return
        steps = np.diff(places)
        stride = int(steps.min())
        borders = np.flatnonzero((np.diff(numbers) != 1) | (steps != stride)) + 1
        for first, stop in itertools.pairwise([0, *borders.tolist(), len(numbers)]):
            run = np.ndarray((stop - first, size), np.uint8, event.data, int(places[first]), (stride, 1))
            block.write(int(numbers[first]), run)

    @property
    def main(self) -> Block | None:
        """The block that is the guest's memory; None if there are several, or none."""
        found = [block for block in self.named.values() if not is_device(block.name)]
        if not found and len(self.named) == 1:
            found = list(self.named.values())
        return found[0] if len(found) == 1 else None

    @property
    def missing(self) -> dict[str, int]:
        """Blocks of which pages never came, and how many."""
        found = {name: int(len(block.came) - np.count_nonzero(block.came)) for name, block in self.named.items()}
        return {name: count for name, count in found.items() if count}


def _placed(error: Malformed, event: events.Pages) -> Malformed:
    """The error, with its offset in the stream instead of in the frames."""
    at, number = error.offset or 0, 0
    begin = 0
    while number + 1 < len(event.encoded):
        size = FRAME_BYTES + (event.frames[begin + 1] << 8 | event.frames[begin + 2])
        if at < begin + size:
            break
        begin += size
        number += 1
    where = int(event.frame_offsets[number]) + at - begin
    return Malformed(error.message, offset=where, section=error.section, chunk="XBZRLE")
