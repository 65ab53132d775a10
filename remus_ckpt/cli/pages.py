"""Pages on the command line: which ones are meant, and how they are shown."""

from __future__ import annotations

import re
from collections.abc import Iterator

import typer

from remus_ckpt.pages import PAGE_SIZE


def page_range(text: str, pages: int) -> list[int]:
    """The numbers that --pfn names. Raises typer.BadParameter."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(0x[0-9a-fA-F]+|\d+)(?:-(0x[0-9a-fA-F]+|\d+))?\s*", part)
        if not match:
            raise typer.BadParameter(f"--pfn {part!r}: write 5, 0x10-0x1f, or a comma-separated list")
        first = int(match[1], 0)
        last = int(match[2], 0) if match[2] else first
        if not first <= last < pages:
            raise typer.BadParameter(f"--pfn {part}: memory has pages 0x0-{pages - 1:#x}")
        numbers += range(first, last + 1)
    return numbers


def hexdump(number: int, page: bytes) -> Iterator[str]:
    """The lines of a page's hexdump; rows that repeat become one asterisk."""
    repeated = False
    for start in range(0, len(page), 16):
        row = page[start : start + 16]
        if start and row == page[start - 16 : start] and start < len(page) - 16:
            if not repeated:
                yield "*"
            repeated = True
            continue
        repeated = False
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        yield f"{number * PAGE_SIZE + start:012x}  {row[:8].hex(' '):23}  {row[8:].hex(' '):23}  |{text}|"
