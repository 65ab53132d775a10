#!/usr/bin/env python3
"""The page codings in plain Python, written from specs/ alone, as the conformance suite wants them (conformance.md §5).

    tools/conform.py --codec rle --decoder 'tools/page_codec.py decode' --encoder 'tools/page_codec.py encode'

decode: the old page and the encoded one on standard input; the new page on standard output, or exit code 20
encode: the old page and the new one on standard input; the encoded page on standard output
REMUS_CODEC says which coding; under REMUS_FULL=1 the page must go full.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable

from plain_decoder import PAGE, Refused, need, walk_delta, walk_rle

Write = Callable[[int, int, bytes], None]
"""Takes (page, offset, bytes)."""


def walk_xbzrle(data: bytes, count: int, write: Write) -> list[int]:
    """Where each of `count` pages ends; what changes in them is written."""
    at, ends = 0, []
    for page in range(count):  # xbzrle.md §5.1
        need(len(data) - at >= 3, at, "xbzrle.md §5.1", "a cut frame")
        kind, size = struct.unpack_from(">BH", data, at)
        allowed = {0: range(1), 1: range(3, PAGE + 1), 2: range(PAGE, PAGE + 1)}.get(kind, range(0))
        need(size in allowed and size <= len(data) - at - 3, at, "xbzrle.md §5.1", "kind, length, or a cut frame")
        begin, at = at + 3, at + 3 + size
        if kind == 2:
            write(page, 0, data[begin:at])
        else:
            _runs(data, begin, at, lambda offset, run, page=page: write(page, offset, run))
        ends.append(at)
    return ends


def _runs(data: bytes, at: int, end: int, write: Callable[[int, bytes], None]) -> None:  # xbzrle.md §2, §4
    offset = 0
    while at < end:
        gap, second = _length(data, at, end)
        need(gap or not offset, at, "xbzrle.md §4.2", "a zrun of nothing")
        run, begin = _length(data, second, end)
        need(run, second, "xbzrle.md §4.2", "an nzrun of nothing")
        offset, at = offset + gap + run, begin + run
        need(offset <= PAGE and at <= end, second, "xbzrle.md §4.3", "a run past its end")
        write(offset - run, data[begin:at])


def _length(data: bytes, at: int, end: int) -> tuple[int, int]:  # xbzrle.md §2.1, §4.1
    need(at < end, at, "xbzrle.md §4.1", "a length is missing")
    if data[at] < 0x80:
        return data[at], at + 1
    need(at + 1 < end and data[at + 1] < 0x80, at, "xbzrle.md §4.1", "a length that is cut, or too long")
    return data[at] & 0x7F | data[at + 1] << 7, at + 2


def encode_delta(old: bytes, new: bytes, full: bool) -> bytes:
    """delta.md §3."""
    changed = [at for at in range(0, PAGE, 4) if old[at : at + 4] != new[at : at + 4]]
    if full or len(changed) > 682:
        return struct.pack("<hI", -101, 0) + new
    return struct.pack("<hI", -100, 0) + b"".join(struct.pack("<h", at) + new[at : at + 4] for at in changed)


def encode_rle(old: bytes, new: bytes, full: bool) -> bytes:
    """rle.md §3."""
    if full or old == new:
        return b"\x80" + new if full else b"\0"
    differs = [old[at : at + 4] != new[at : at + 4] for at in range(0, PAGE, 4)]
    out, word = b"", 0
    while word < len(differs):
        run = 1
        while run < 127 and word + run < len(differs) and differs[word + run] == differs[word]:
            run += 1
        out += bytes([run]) + new[4 * word : 4 * (word + run)] if differs[word] else bytes([0x80 | run])
        word += run
    return out


def encode_xbzrle(old: bytes, new: bytes, full: bool) -> bytes:
    """xbzrle.md §3.1 and §3.2, in its frame."""
    if old == new and not full:
        return bytes(3)
    runs = None if full else _encoded_runs(old, new)
    return struct.pack(">BH", 2, PAGE) + new if runs is None else struct.pack(">BH", 1, len(runs)) + runs


def _encoded_runs(old: bytes, new: bytes) -> bytes | None:
    out, at = b"", 0
    while at < PAGE:
        if len(out) + 2 > PAGE:
            return None
        start = at
        while at < PAGE and old[at] == new[at]:
            at += 1
        if at == PAGE:
            break
        out += _uleb128(at - start)
        if len(out) + 2 > PAGE:
            return None
        start = at
        while at < PAGE and old[at] != new[at]:
            at += 1
        out += _uleb128(at - start) + new[start:at]
        if len(out) > PAGE:
            return None
    return out


def _uleb128(value: int) -> bytes:
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80, value >> 7])


WALKS = {"delta": walk_delta, "rle": walk_rle, "xbzrle": walk_xbzrle}
ENCODERS = {"delta": encode_delta, "rle": encode_rle, "xbzrle": encode_xbzrle}


def decode(codec: str, old: bytes, encoded: bytes) -> bytes:
    """The new page. Raises Refused."""
    page = bytearray(old)

    def write(_: int, offset: int, data: bytes) -> None:
        page[offset : offset + len(data)] = data

    WALKS[codec](encoded, 1, write)
    return bytes(page)


def main() -> int:
    """Run it; returns the exit code."""
    codec, given = os.environ["REMUS_CODEC"], sys.stdin.buffer.read()
    old, rest = given[:PAGE], given[PAGE:]
    try:
        if sys.argv[1:] == ["decode"]:
            out = decode(codec, old, rest)
        else:
            out = ENCODERS[codec](old, rest, os.environ.get("REMUS_FULL") == "1")
    except Refused as refused:
        at, section, text, _ = refused.args
        print(f"{section}: at byte {at}: {text}", file=sys.stderr)
        return 20
    sys.stdout.buffer.write(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
