"""What the tests of the store share: memories that follow from an epoch, and streams of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from remus_ckpt.memory import memory_sha256
from remus_ckpt.pages import MAX_BATCH_ENTRIES, PAGE_SIZE, Pages, batches
from remus_ckpt.sender import Sender
from remus_ckpt.store import History, HistoryWriter
from remus_ckpt.wire.record import Position

PAGES = 48


def memory_at(epoch: int, pages: int = PAGES) -> Pages:
    """The memory at an epoch: it follows from the number alone, so that anyone can tell what it must be.

    A few pages change from one epoch to the next, some become zeros, most stay, and half are always zeros.
    """
    memory = np.zeros((pages, PAGE_SIZE), dtype=np.uint8)
    words = memory.view("<u8")
    used = np.arange(pages // 2)
    words[used, 0] = used + 1
    words[used, 100] = epoch // (used + 1)
    hot = epoch % (pages // 2)
    memory[hot] = 0
    filling = np.frombuffer(hashlib.sha256(str(epoch).encode()).digest(), dtype=np.uint8)
    memory[(epoch * 7) % (pages // 2), :32] = filling
    return memory


def sha(epoch: int, pages: int = PAGES) -> str:
    """SHA-256 of the memory at an epoch."""
    return memory_sha256(memory_at(epoch, pages))


def dirty(epoch: int, pages: int = PAGES) -> np.ndarray[Any, Any]:
    """The pages that an epoch changes."""
    changed = (memory_at(epoch, pages) != memory_at(epoch - 1, pages)).any(axis=1)
    return np.flatnonzero(changed)


class Source:
    """A sender whose checkpoints hold `memory_at`."""

    def __init__(self, pages: int = PAGES, *, position: Position | None = None, **options: Any) -> None:
        self.sender = Sender(pages, position=position, **options)
        self.pages = pages

    @property
    def position(self) -> Position:
        """Of the last checkpoint."""
        assert self.sender.position is not None
        return self.sender.position

    def checkpoint(self, time_ns: int | None = None, device_state: bytes | None = None) -> bytes:
        """The bytes of the next one; by default, its device state and its time follow from the epoch too."""
        before = self.sender.position
        epoch = 0 if before is None else before.epoch + 1
        memory = memory_at(epoch, self.pages)
        pfns = np.arange(self.pages) if self.sender.sent is None else dirty(epoch, self.pages)
        scan = batches(pfns, memory[pfns])
        taken_ns = epoch * 10**9 if time_ns is None else time_ns
        device_state = b"dev%d" % epoch if device_state is None else device_state
        groups = self.sender.checkpoint(scan, device_state=device_state, time_ns=taken_ns)
        return b"".join(bytes(buffer) for group in groups for buffer in group)


def commit(writer: HistoryWriter, data: bytes, position: Position, step: int | None = None) -> None:
    """All steps for one checkpoint."""
    for at in range(0, len(data), step or len(data)):
        writer.feed(data[at : at + (step or len(data))])
    writer.check(position)
    writer.store()
    writer.apply()


def fill(writer: HistoryWriter, count: int, source: Source | None = None) -> Source:
    """Begin a stream where it is needed, and commit checkpoints."""
    if source is None:
        source = Source(position=writer.position)
        writer.begin(full=True)
    for _ in range(count):
        commit(writer, source.checkpoint(), source.position)
    return source


def cuts(size: int, borders: list[int], step: int = 512) -> Iterator[int]:
    """Every so many bytes, and around every border."""
    near = {border + offset for border in borders for offset in (-2, -1, 0, 1, 2)}
    yield from sorted({at for at in near | set(range(0, size, step)) if 0 <= at <= size})


assert PAGES <= MAX_BATCH_ENTRIES


def epochs(history: History) -> list[int]:
    return [entry.epoch for entry in history.entries()]


def files(history: History) -> list[str]:
    return sorted(os.listdir(history.directory / "segments"))
