"""Rounds of pages to QEMU's migration stream: the sender's side of XBZRLE (specs/qemu-ram.md §10). No I/O, no clock.

`begin`, `round` and `end` yield buffers, and the caller writes each before it asks for the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec.page_cache import Count, PageCache, room_for
from remus_ckpt.pages import PAGE_SIZE, Buffer, Pages
from remus_ckpt.stages import Cached, Choice, Seen, decide
from remus_ckpt.wire.qemu import events, writer

CALL_PAGES = 256
"""Pages that one call of the kernel takes: its output stays within a processor's cache."""
FIRST_CACHE_BYTES = 64 << 20
"""The cache begins with this many bytes, which QEMU always has, and grows as long as many pages are not in it …"""
CACHE_BYTES = 512 << 20
"""… up to this many, unless the caller says otherwise."""


@dataclass(frozen=True, slots=True)
class Part:
    """Pages of one block to be sent.

    block: its name
    numbers: int64[n], of the pages in the block
    pages: uint8[…, 4096], C-contiguous; they may be written meanwhile, if they come again in a later round
    index: int64[n], where in `pages` they are; None: one after the other
    """

    block: str
    numbers: NDArray[np.int64]
    pages: Pages
    index: NDArray[np.int64] | None = None


class QemuSender:
    """Writes one migration of a machine with pages of 4,096 bytes.

    blocks: of its memory, sizes in whole pages
    configuration: None: the stream has none
    number: of the section ram
    says_switchover: whether SWITCHOVER_START precedes its END
    cache_bytes: the most that the cache may take; rounded down to a power of two of pages
    is_fixed: always encode, with the cache at its largest, instead of what `stages.decide` says
    kernel: require one of `kernels.KERNELS`

    It ends by `close`, whatever the way: `end` calls it, and so does the `with` statement.
    """

    def __init__(
        self,
        blocks: Sequence[events.RamBlock],
        *,
        configuration: events.Configuration | None = None,
        number: int = 2,
        says_switchover: bool = False,
        cache_bytes: int = CACHE_BYTES,
        is_fixed: bool = False,
        kernel: str | None = None,
    ) -> None:
        self._configuration = configuration
        self._number = number
        self._says_switchover = says_switchover
        self._blocks = tuple(blocks)
        self._firsts: dict[str, tuple[int, int]] = {}  # block → number of its first page among all, pages
        pages = 0
        for block in blocks:
            if block.size % PAGE_SIZE or block.page_size != PAGE_SIZE:
                raise ValueError(f"the block {block.name!r} is not made of pages of {PAGE_SIZE} bytes")
            self._firsts[block.name] = pages, block.size // PAGE_SIZE
            pages += block.size // PAGE_SIZE
        slots = 1 << max(pages - 1, 0).bit_length()
        while slots * PAGE_SIZE > cache_bytes:
            slots //= 2
        self._most_slots = slots
        if not is_fixed:
            slots = min(slots, FIRST_CACHE_BYTES // PAGE_SIZE)
        self._is_fixed = is_fixed
        self.cache: PageCache | None = PageCache(slots, kernel=kernel)
        self._counts = self.cache.counts
        self.out = np.empty(room_for(CALL_PAGES), dtype=np.uint8)
        self._named: str | None = None  # the block of the last record
        self._last = self._counts.copy()  # of the last round that encoded
        self._idle_rounds = 0
        self.rounds = 0
        """Rounds that are complete, the first one counted."""
        self.link_bytes_s: float | None = None
        """How fast the link takes bytes, as its owner has measured it; None: not known."""
        self.coding_s = 0.0
        """Seconds that this round has taken without the writing, as its owner has measured them."""
        self._speeds: dict[bool, float] = {}  # does it encode → bytes of pages per second
        self.choice = Choice(encodes=slots > 0, slots=slots, compression="none", reasons=("the first round",))
        """What the coming round does, and why. In the first one nothing is encoded: the cache is filled."""

    def __enter__(self) -> QemuSender:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the migration, however far it is: the cache and the buffer go. May be called again."""
        self.cache, self.out = None, np.empty(0, dtype=np.uint8)

    def begin(self) -> Buffer:
        """The header, the configuration and the list of blocks."""
        return writer.front(self._configuration, is_mapped=False) + writer.start(
            self._number, self._blocks, self._configuration
        )

    def round(self, parts: Iterable[Part]) -> Iterator[Buffer]:
        """One PART: the pages that were written since the round before, in the first round all of them.

        A buffer is valid until the next one is asked for. Raises ValueError for pages that do not fit. If it is not
        taken to its end, the migration has ended: what is out is half a section.
        """
        cache = self.cache
        if cache is None:
            raise ValueError("the migration has ended: begin another with a new sender")
        encodes = self.choice.encodes and self.rounds > 0
        before = self._counts.copy()
        self._named = None
        try:
            yield writer.part(self._number)
            for part in parts:
                yield from self._records(cache, part, encodes)
            yield writer.eos(self._number)
        except BaseException:
            self.close()
            raise
        self._settle(cache, self._counts - before, encodes)

    def end(self, devices: events.DeviceState | None, parts: Iterable[Part] = ()) -> Iterator[Buffer]:
        """The last round, of a guest that is stopped, the END of ram and the device sections; then `close`."""
        yield from self.round(parts)
        self.close()
        yield writer.end(self._number, self._says_switchover)
        yield from writer.tail(devices, PAGE_SIZE)

    def statistics(self) -> dict[str, Any]:
        """What `query-migrate` calls by these names, the choice for the next round, and its reasons.

        Rates are those of the last round that encoded: of all its pages the part that the cache had not got, and how
        many bytes of pages went into one that was sent.
        """
        counts, last = _Counts(self._counts), _Counts(self._last)
        return {
            "dirty-sync-count": self.rounds,
            "duplicate": counts[Count.ZERO],
            "normal": counts[Count.PLAIN] + counts[Count.MISS] + counts[Count.OVERFLOW],
            "xbzrle-cache": {
                "cache-size": self.choice.slots * PAGE_SIZE,
                "bytes": counts.bytes,
                "pages": counts.looked_up,
                "cache-miss": counts[Count.MISS],
                "cache-miss-rate": last[Count.MISS] / max(last.pages, 1),
                "encoding-rate": last.looked_up * PAGE_SIZE / last.bytes if last.bytes else 0.0,
                "overflow": counts[Count.OVERFLOW],
            },
            "encodes": self.choice.encodes,
            "reasons": list(self.choice.reasons),
        }

    def _records(self, cache: PageCache, part: Part, encodes: bool) -> Iterator[Buffer]:
        first, pages = self._firsts[part.block]
        numbers, index = part.numbers, part.index
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < pages:
            raise ValueError(f"pages {numbers.min()} to {numbers.max()} of {part.block!r}, which has {pages}")
        for at in range(0, len(numbers), CALL_PAGES):
            some = slice(at, at + CALL_PAGES)
            found = cache.records(
                part.pages[some] if index is None else part.pages,
                None if index is None else index[some],
                numbers[some],
                first,
                self.out,
                encodes=encodes,
            )
            if len(found) and self._named != part.block:
                # The first record of a block says which one it is.
                self._named = part.block
                yield writer.naming(found[: writer.WORD_BYTES], part.block)
                found = found[writer.WORD_BYTES :]
            if len(found):
                yield found

    def _settle(self, cache: PageCache, counts: NDArray[np.int64], encodes: bool) -> None:
        """A round is complete: what it has shown, and what the next one does."""
        self.rounds += 1
        self._idle_rounds = 0 if cache.slots else self._idle_rounds + 1
        if encodes:
            self._last = counts
        pages = _Counts(counts).pages
        if self.coding_s and pages >= CALL_PAGES:
            self._speeds[encodes] = pages * PAGE_SIZE / self.coding_s
        self.coding_s = 0.0
        cache.age += 1
        if self._is_fixed:
            return
        last = _Counts(self._last)
        self.choice = decide(
            Seen(
                link_bytes_s=self.link_bytes_s,
                cached=Cached(
                    pages=last.pages - last[Count.ZERO],
                    hits=last.looked_up,
                    sent_bytes=last.bytes,
                    bytes_s=self._speeds.get(True),
                    plain_bytes_s=self._speeds.get(False),
                    slots=cache.slots,
                    most_slots=self._most_slots,
                    idle_rounds=self._idle_rounds,
                ),
            )
        )
        if self.choice.slots != cache.slots:
            self.cache = cache.resized(self.choice.slots)


class _Counts:
    """Sums over the counts of a cache, int64[7]."""

    def __init__(self, counts: NDArray[np.int64]) -> None:
        self._counts = counts.tolist()

    def __getitem__(self, which: Count) -> int:
        count: int = self._counts[which]
        return count

    @property
    def looked_up(self) -> int:
        """Pages that the cache had. QEMU counts those that are the same, and those that overflow."""
        return self[Count.SAME] + self[Count.XBZRLE] + self[Count.OVERFLOW]

    @property
    def bytes(self) -> int:
        """What they took."""
        return self[Count.BYTES] + PAGE_SIZE * self[Count.OVERFLOW]

    @property
    def pages(self) -> int:
        """All pages."""
        return self.looked_up + self[Count.ZERO] + self[Count.PLAIN] + self[Count.MISS]
