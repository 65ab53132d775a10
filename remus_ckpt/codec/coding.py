"""What a page coding is: one registration, at the end of the file that holds it."""

from __future__ import annotations

from dataclasses import dataclass

from remus_ckpt.codec.arrays import Apply, Check, Encode
from remus_ckpt.codec.oracle import PageCodec


@dataclass(frozen=True, slots=True)
class Coding:
    """One page coding.

    name: what `get_codec` and the native kernels call it
    max_page_bytes: the most that an encoder of this coding writes for one page
    encode, check, apply: the numpy kernel; see `kernels` for the arguments
    oracle: the same one page at a time, slow and plain
    page_buffer_pages: pages that a save stream compresses at a time; None for a coding that save streams do not use
    """

    name: str
    max_page_bytes: int
    encode: Encode
    check: Check
    apply: Apply
    oracle: PageCodec
    page_buffer_pages: int | None = None
