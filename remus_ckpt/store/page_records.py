"""The forms of pages that a page index lists, and how a page is put together from them (specs/store.md §5.2).

The native functions do the work where the C extension is there; otherwise numpy does, and serves as their reference.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from remus_ckpt import extensions
from remus_ckpt.codec import CODECS, get_codec, kernels
from remus_ckpt.errors import Malformed
from remus_ckpt.pages import PAGE_SIZE, Buffer, Pages
from remus_ckpt.wire.xen.dialect import StreamCodec

native: Any = None
"""The C extension; None if it was not built."""
with suppress(ImportError):
    native = extensions.load("store._pages")

RECORD = np.dtype(
    [("where", "<u8"), ("pfn", "<u4"), ("before", "<u4"), ("crc", "<u4"), ("length", "<u2"), ("chain", "<u2")]
)
"""One form of one page.

where: bits 0 to 47: the offset of its bytes; 48 to 55: how many deltas since the full form; 62 and 63: 0 for the
    segment, 1 for the full pages beside the index
before: number of the form that this delta applies to, counted from 1; 0: zeros
crc: CRC-32C of the other fields and the bytes
length: of the bytes; chain: bytes of all deltas since the full form, with this one
"""
Records = NDArray[np.void]
Heads = NDArray[np.uint32]
"""uint32[pages]: the number of the newest form of each page, counted from 1; 0: zeros."""

OFFSET_BITS, DEPTH_BITS, FILE_BITS = 48, 8, 62
MAX_OFFSET = 1 << OFFSET_BITS
BESIDE = 1 << FILE_BITS
"""In `where`: the bytes are among the full pages beside the index."""
MAX_DELTAS = 64
"""A page with more deltas than this, or with deltas of more than 4 KiB, gets a full form."""
MAX_CHAIN_BYTES = PAGE_SIZE
_FULL_HEADS: dict[str, tuple[int, int]] = {"delta": (0x9B, 6), "rle": (0x80, 1)}
"""Codec → the first byte of a page that is encoded in full, and how many bytes precede its 4,096."""


class Unreadable(Exception):
    """The bytes of a page cannot be read, or are not those that were listed.

    page: its number; error: the errno of a read that failed, 0 if the file has become shorter, −1 if bytes have changed
    """

    def __init__(self, page: int, error: int) -> None:
        super().__init__(page, error)
        self.page = page
        self.error = error

    @property
    def reason(self) -> str:
        """What is wrong, in words."""
        if self.error < 0:
            return "its bytes have changed"
        return os.strerror(self.error) if self.error else "its bytes are cut off"


@dataclass(frozen=True, slots=True)
class Source:
    """What the pages of one checkpoint are put together from.

    files: descriptors of the segment, and of the full pages beside the index
    held, held_start: bytes of the segment that are in memory, and the offset of the first of them
    """

    files: tuple[int, int]
    records: Records
    heads: Heads
    codec: StreamCodec
    held: Buffer | None = None
    held_start: int = 0

    def holding(self, held: Buffer, start: int) -> Source:
        """The same, with some bytes of the segment at hand."""
        return replace(self, held=held, held_start=start)


def native_arguments(source: Source) -> tuple[object, ...] | None:
    """`source` as the native functions take it; None if numpy has to do."""
    kernel = kernels.wanted()
    if native is None or kernel not in kernels.NATIVE:
        return None
    files, held = source.files, source.held
    records = np.ascontiguousarray(source.records).view(np.uint8)
    return files, records, source.heads, held, source.held_start, CODECS.index(source.codec), kernel


def read_pages(source: Source, first: int, out: Pages) -> None:
    """Fill `out` with pages from number `first` on, checked. Raises Unreadable."""
    if (arguments := native_arguments(source)) is not None:
        if (fault := native.read(arguments, first, out)) is not None:
            raise Unreadable(*fault)
        return
    codec = get_codec(source.codec)
    for number in range(first, first + len(out)):
        page = out[number - first]
        page[:] = 0
        for record in reversed(list(_chain(source, number))):
            data = _bytes_of(source, number, record)
            if not _depth(record):
                page[:] = data
                continue
            try:
                size = codec.apply(data, page.reshape(1, PAGE_SIZE))
            except Malformed:
                raise Unreadable(number, -1) from None
            if size != len(data):
                raise Unreadable(number, -1)


def _chain(source: Source, page: int) -> Iterator[np.void]:
    """The forms of a page, from the newest to the full one."""
    number, above = int(source.heads[page]), 1 << DEPTH_BITS
    while number:
        if number > len(source.records):
            raise Unreadable(page, -1)
        record = source.records[number - 1]
        depth = _depth(record)
        is_possible = int(record["pfn"]) == page and depth < above and (depth or int(record["length"]) == PAGE_SIZE)
        if not is_possible or int(record["where"]) >> FILE_BITS > 1 or (depth and int(record["before"]) >= number):
            raise Unreadable(page, -1)
        yield record
        number, above = int(record["before"]) if depth else 0, depth


def _depth(record: np.void) -> int:
    return int(record["where"]) >> OFFSET_BITS & (1 << DEPTH_BITS) - 1


def _bytes_of(source: Source, page: int, record: np.void) -> NDArray[np.uint8]:
    where, length = int(record["where"]), int(record["length"])
    try:
        data = os.pread(source.files[where >> FILE_BITS], length, where & MAX_OFFSET - 1)
    except OSError as error:
        raise Unreadable(page, error.errno or 0) from error
    if len(data) < length:
        raise Unreadable(page, 0)
    if _crc(record, data) != int(record["crc"]):
        raise Unreadable(page, -1)
    return np.frombuffer(data, dtype=np.uint8)


def _crc(record: np.void, data: bytes) -> int:
    whole = record.tobytes()
    crc: int = google_crc32c.value(whole[:16] + whole[20:24])
    if len(data) == PAGE_SIZE:
        data = page_sum(np.frombuffer(data, dtype=np.uint8)).to_bytes(8, "little")
    return int(google_crc32c.extend(crc, data))


def page_sum(page: NDArray[np.uint8]) -> int:
    """The sum that represents the bytes of a page in its checksum (specs/store.md §5.2)."""
    halves = page.view("<u4") + _keys()
    return int((halves[0::2].astype(np.uint64) * halves[1::2]).sum(dtype=np.uint64))


@functools.cache
def _keys() -> NDArray[np.uint32]:
    """uint32[1024]: 512 numbers of splitmix64 from 0, low half first."""
    z = np.arange(1, PAGE_SIZE // 8 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return (z ^ z >> np.uint64(31)).astype("<u8").view("<u4")


def checksum(data: NDArray[np.uint8]) -> int:
    """CRC-32C of contiguous bytes."""
    return int(google_crc32c.value(data)) if len(data) else 0


def seal(records: Records, data: NDArray[np.uint8], at: NDArray[np.int64]) -> None:
    """Give records their checksums. at: int64[n]: where in `data` the bytes of each record begin"""
    if native is not None:
        native.seal(records, data, at)
        return
    for number, start in enumerate(at.tolist()):
        length = int(records[number]["length"])
        records[number]["crc"] = _crc(records[number], data[start : start + length].tobytes())


def borders(codec: StreamCodec, encoded: NDArray[np.uint8], pages: int) -> NDArray[np.int64]:
    """int64[pages + 1]: where each encoded page begins, and where the last one ends. Raises Malformed."""
    found = np.zeros(pages + 1, dtype=np.int64)
    if native is not None:
        if native.borders(CODECS.index(codec), encoded, found) < 0:
            get_codec(codec).check(encoded, pages)
        return found
    one = get_codec(codec)
    for number in range(pages):
        found[number + 1] = found[number] + one.check(encoded[found[number] :], 1)
    return found


def make_records(pfns: NDArray[np.int64], where: NDArray[np.uint64], length: Any) -> Records:
    """Records without `before`, `crc` and `chain`."""
    records = np.zeros(len(pfns), dtype=RECORD)
    records["pfn"] = pfns
    records["where"] = where
    records["length"] = length
    return records


def full_head(
    codec: StreamCodec, encoded: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """int64[n]: for pages that are encoded in full, the bytes before their 4,096; 0 for the others."""
    first, head = _FULL_HEADS[codec]
    is_full = lengths == PAGE_SIZE + head
    is_full[is_full] = encoded[starts[is_full]] == first
    return np.where(is_full, head, 0)
