"""What a stream needs besides memory so that a real Xen can start the guest (specs/formats.md §10)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.limits import MAX_BATCH_ENTRIES
from remus_ckpt.pages import PAGE_SIZE, PageBatch, PageType
from remus_ckpt.wire.record import CheckpointRecord
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.chunks import QEMU_MAGIC, Signature
from remus_ckpt.wire.xen.dialect import Word

MAGIC_PAGES = 3
"""Pages added to memory: Xen zeroes the pages of the three magic PFNs when it starts the guest."""
EMPTY_DEVICE_STATE = QEMU_MAGIC + (3).to_bytes(4, "big") + b"\0"
"""A QEMU stream of version 3 with no section: its end follows its head."""
_SAVE_RECORD = struct.Struct("<HHI")
_SAVE_HEADER = struct.Struct("<IIQII")
_HEADER_TYPE, _END_TYPE = 1, 0
_HEADER_MAGIC, _HEADER_VERSION = 0x54381286, 1
EMPTY_CONTEXT = (
    _SAVE_RECORD.pack(_HEADER_TYPE, 0, _SAVE_HEADER.size)
    + _SAVE_HEADER.pack(_HEADER_MAGIC, _HEADER_VERSION, 0, 0, 0)
    + _SAVE_RECORD.pack(_END_TYPE, 0, 0)
)
"""An HVM context of HEADER and END: well-formed, with no processor in it."""
NO_CONTEXT = (
    "no HVM context was given, so the stream's has only HEADER and END. Xen reads it, but the guest has "
    "no processor: give a real one with --hvm-context FILE"
)
NO_DEVICE_STATE = "no QEMU device state was given, so the stream's is empty"


def magic_pfns(pages: int) -> tuple[int, int, int]:
    """The magic PFNs of a memory of this many pages, the added ones included: ioreq, buffered ioreq, store."""
    return pages - 1, pages - 2, pages - 3


def device_record(state: bytes) -> bytes:
    """A device model's state as Xen takes it: itself if it is QEMU's, else an empty one."""
    return state if state.startswith(QEMU_MAGIC) else EMPTY_DEVICE_STATE


def blank_pages(missing: NDArray[np.int64], *, with_data: bool) -> Iterator[PageBatch]:
    """Batches of pages of zeros: carried, or only to be allocated."""
    zeros = np.zeros((MAX_BATCH_ENTRIES, PAGE_SIZE), dtype=np.uint8)
    kind = PageType.NOTAB if with_data else PageType.XALLOC
    for start in range(0, len(missing), MAX_BATCH_ENTRIES):
        part = missing[start : start + MAX_BATCH_ENTRIES].astype(np.uint64)
        types = np.full(len(part), kind, dtype=np.uint8)
        yield PageBatch(part, types, zeros[: len(part) if with_data else 0])


class StartsInXen:
    """The shape of a sender's stream that a real Xen starts: HVM, every page carried, magic PFNs of its own.

    context: the HVM context
    is_only: whether the first checkpoint is the only one: then nothing in the stream speaks of compression
    """

    leaves_zeros_out = False
    added_pages = MAGIC_PAGES

    def __init__(self, context: bytes | None, *, is_only: bool) -> None:
        self.context = context or EMPTY_CONTEXT
        self.is_only = is_only
        self._pages = 0

    def header(self, word: Word, p2m_size: int) -> list[events.Event]:
        """The header alone."""
        self._pages = p2m_size
        return [events.Header(word=word, guest="hvm", p2m_size=p2m_size)]

    def missing(self, seen: NDArray[np.bool_]) -> Iterator[PageBatch]:
        """Every page that was not sent: Xen allocates only pages that it is told about."""
        return blank_pages(np.flatnonzero(~seen), with_data=True)

    def closing(self, is_first: bool) -> list[events.Event]:
        """LAST_CHECKPOINT in an only checkpoint, ENABLE_COMPRESSION in the first of several."""
        if not is_first:
            return []
        return [events.LastCheckpoint() if self.is_only else events.EnableCompression()]

    def tail(self, record: CheckpointRecord) -> events.Tail:
        """xl's tail: the record's device state, if it is QEMU's."""
        return events.TailHvm(
            magic_pfns=magic_pfns(self._pages),
            context=self.context,
            signature=Signature.XL,
            device_state=device_record(record.device_state),
        )
