"""The codecs again, slow and plain, in the order of their specs: every kernel is compared with them.

They share nothing with the kernels except the names of the errors.
"""

from __future__ import annotations

import struct
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec.arrays import Apply, Check, Encode
from remus_ckpt.errors import Malformed
from remus_ckpt.pages import Pages


class PageCodec(Protocol):
    """One page at a time."""

    def encode(self, new: bytes, old: bytes, whole: bool) -> bytes:
        """One encoded page; `whole` requests the full form."""

    def decode(self, encoded: bytes, at: int, page: bytearray | None) -> int:
        """Apply the encoded page that begins at `at`, or only check it if `page` is None; returns its end."""


class Delta:
    """specs/delta.md"""

    def encode(self, new: bytes, old: bytes, whole: bool) -> bytes:
        # §3.1: a record for each 32-bit word that changed, ascending
        records = b""
        for offset in range(0, 4096, 4):
            if new[offset : offset + 4] != old[offset : offset + 4]:
                records += struct.pack("<h", offset) + new[offset : offset + 4]
        # §3.2: full if the records would be longer than the page
        if whole or len(records) > 4096:
            return struct.pack("<hI", -101, 0) + new
        return struct.pack("<hI", -100, 0) + records

    def decode(self, encoded: bytes, at: int, page: bytearray | None) -> int:
        marker, value = self._record(encoded, at)
        if marker not in (-100, -101):
            raise Malformed("no page opens here", offset=at, section="delta.md §4.2")
        if value != b"\0\0\0\0":
            raise Malformed("a marker with a value", offset=at, section="delta.md §2.2")
        start, at = at, at + 6
        if marker == -101:
            if len(encoded) - at < 4096:
                raise Malformed("a full page is cut", offset=start, section="delta.md §4.1")
            if page is not None:
                page[:] = encoded[at : at + 4096]
            return at + 4096
        # §4.2: a page ends where the next one opens, or with the data
        last = -1
        while at < len(encoded):
            offset, value = self._record(encoded, at)
            if offset in (-100, -101):
                break
            if not 0 <= offset <= 4092 or offset % 4 or offset <= last:
                raise Malformed("a bad offset", offset=at, section="delta.md §2.1")
            if page is not None:
                page[offset : offset + 4] = value
            last = offset
            at += 6
        return at

    @staticmethod
    def _record(encoded: bytes, at: int) -> tuple[int, bytes]:
        if len(encoded) == at:
            raise Malformed("the data end here", offset=at, section="delta.md §4.2")
        if len(encoded) - at < 6:
            raise Malformed("a record is cut", offset=at, section="delta.md §4.1")
        return int(struct.unpack_from("<h", encoded, at)[0]), encoded[at + 2 : at + 6]


class Rle:
    """specs/rle.md"""

    def encode(self, new: bytes, old: bytes, whole: bool) -> bytes:
        if whole:
            return b"\x80" + new
        # §3.1: runs of at most 127 equal or different words
        encoded = b""
        word = 0
        while word < 1024:
            differ = self._word(new, word) != self._word(old, word)
            end = word
            while end < 1024 and end - word < 127 and (self._word(new, end) != self._word(old, end)) == differ:
                end += 1
            if differ:
                encoded += bytes([end - word]) + new[4 * word : 4 * end]
            else:
                encoded += bytes([0x80 | (end - word)])
            word = end
        # §3.2: an unchanged page is one byte
        return b"\x00" if new == old else encoded

    def decode(self, encoded: bytes, at: int, page: bytearray | None) -> int:
        word = 0
        start = at
        while word < 1024:
            if at >= len(encoded):
                raise Malformed("the data end here", offset=at, section="rle.md §4.3")
            marker = encoded[at]
            if marker in (0x00, 0x80):
                if at != start:
                    raise Malformed("a run of no words", offset=at, section="rle.md §2.2")
                if marker == 0x00:
                    return at + 1
                if len(encoded) - at < 4097:
                    raise Malformed("a full page is cut", offset=at, section="rle.md §4.3")
                if page is not None:
                    page[:] = encoded[at + 1 : at + 4097]
                return at + 4097
            words = marker & 0x7F
            if word + words > 1024:
                raise Malformed("a run goes past the page", offset=at, section="rle.md §4.2")
            if marker < 0x80:
                if len(encoded) - at < 1 + 4 * words:
                    raise Malformed("a run is cut", offset=at, section="rle.md §4.3")
                if page is not None:
                    page[4 * word : 4 * (word + words)] = encoded[at + 1 : at + 1 + 4 * words]
                at += 4 * words
            at += 1
            word += words
        return at

    @staticmethod
    def _word(page: bytes, word: int) -> bytes:
        return page[4 * word : 4 * word + 4]


class Xbzrle:
    """specs/xbzrle.md"""

    def __init__(self, *, fold: bool) -> None:
        self.fold = fold

    def encode(self, new: bytes, old: bytes, whole: bool) -> bytes:
        page = None if whole else self.encode_page(new, old)
        if page is None:
            return b"\x02" + struct.pack(">H", 4096) + new
        if page == b"":
            return b"\x00\x00\x00"
        return b"\x01" + struct.pack(">H", len(page)) + page

    def encode_page(self, new: bytes, old: bytes) -> bytes | None:
        """b"" for an unchanged page, None for an overflow."""
        differ = [a != b for a, b in zip(new, old, strict=True)]
        if self.fold:
            # §3.3: a gap of one byte costs more than it saves
            differ = [here or (0 < i < 4095 and differ[i - 1] and differ[i + 1]) for i, here in enumerate(differ)]
        encoded = b""
        at = 0
        while at < 4096:
            if len(encoded) + 2 > 4096:
                return None
            start = at
            while at < 4096 and not differ[at]:
                at += 1
            if at == 4096:
                break  # §3.1: the last zero run is not sent
            encoded += self._uleb128(at - start)
            if len(encoded) + 2 > 4096:
                return None
            start = at
            while at < 4096 and differ[at]:
                at += 1
            encoded += self._uleb128(at - start) + new[start:at]
            if len(encoded) > 4096:
                return None
        return encoded

    def decode(self, encoded: bytes, at: int, page: bytearray | None) -> int:
        if len(encoded) - at < 3:
            raise Malformed("the data end here", offset=at, section="xbzrle.md §5.1")
        kind, size = struct.unpack_from(">BH", encoded, at)
        body = encoded[at + 3 : at + 3 + size]
        fits = {0: size == 0, 1: 3 <= size <= 4096, 2: size == 4096}
        if not fits.get(kind, False) or len(body) != size:
            raise Malformed("a bad frame", offset=at, section="xbzrle.md §5.1")
        if kind == 2 and page is not None:
            page[:] = body
        if kind == 1:
            self._decode_page(body, at + 3, page)
        return int(at + 3 + size)

    def _decode_page(self, body: bytes, base: int, page: bytearray | None) -> None:
        at = target = 0
        while at < len(body):
            here = at
            gap, at = self._length(body, at, base)
            if gap == 0 and here != 0:
                raise Malformed("an empty zero run", offset=base + here, section="xbzrle.md §4.2")
            target += gap
            here = at
            size, at = self._length(body, at, base)
            if size == 0:
                raise Malformed("an empty run", offset=base + here, section="xbzrle.md §4.2")
            if target + size > 4096 or size > len(body) - at:
                raise Malformed("a run goes past its end", offset=base + here, section="xbzrle.md §4.3")
            if page is not None:
                page[target : target + size] = body[at : at + size]
            target += size
            at += size

    @staticmethod
    def _uleb128(value: int) -> bytes:
        return bytes([value]) if value < 128 else bytes([value & 0x7F | 0x80, value >> 7])

    @staticmethod
    def _length(body: bytes, at: int, base: int) -> tuple[int, int]:
        if at < len(body) and body[at] < 0x80:
            return body[at], at + 1
        if at + 1 >= len(body) or body[at + 1] >= 0x80:
            raise Malformed("a bad length", offset=base + at, section="xbzrle.md §4.1")
        return body[at] & 0x7F | body[at + 1] << 7, at + 2


Index = NDArray[np.int64]


def kernel(codec: PageCodec) -> tuple[Encode, Check, Apply]:
    """The three functions of a kernel, a page at a time."""

    def encode(
        pages: Pages,
        index: Index | None,
        reference: Pages,
        reference_index: Index | None,
        full: NDArray[np.bool_] | None,
        update: bool,
        out: NDArray[np.uint8],
    ) -> int:
        size = 0
        for i in range(len(pages) if index is None else len(index)):
            new = pages[i if index is None else index[i]].tobytes()
            slot = i if reference_index is None else int(reference_index[i])
            old = new if slot < 0 else reference[slot].tobytes()
            encoded = codec.encode(new, old, slot < 0 or (full is not None and bool(full[i])))
            out[size : size + len(encoded)] = np.frombuffer(encoded, dtype=np.uint8)
            size += len(encoded)
            if update and slot >= 0:
                reference[slot] = np.frombuffer(new, dtype=np.uint8)
        return size

    def check(encoded: NDArray[np.uint8], n: int) -> int:
        data = encoded.tobytes()
        at = 0
        for _ in range(n):
            at = codec.decode(data, at, None)
        return at

    def apply(encoded: NDArray[np.uint8], pages: Pages, index: Index | None, checked: int | None = None) -> int:
        data = encoded.tobytes()
        numbers = range(len(pages)) if index is None else index
        check(encoded, len(numbers))
        at = 0
        for number in numbers:
            page = bytearray(pages[number].tobytes())
            at = codec.decode(data, at, page)
            pages[number] = np.frombuffer(page, dtype=np.uint8)
        return at

    return encode, check, apply
