"""What every format is turned into and made from: a head, batches of pages, and a moment for each checkpoint.

A source gives pieces in this order: one `Head`; then, for each checkpoint, the pages that it changes as `PageBatch`es
and a `Moment` that closes them; in front of a later checkpoint's pages, some of them as they were `Before`. So pages
can pass through without being held, as many of them as there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.errors import RemusError
from remus_ckpt.limits import MAX_BATCH_ENTRIES
from remus_ckpt.pages import HAS_DATA, PAGE_SIZE, PageBatch, Pages, PageType
from remus_ckpt.plural import counted
from remus_ckpt.wire.record import CheckpointRecord
from remus_ckpt.wire.xen import events, v2
from remus_ckpt.wire.xen.dialect import Guest, Word


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pv:
    """What only the stream of a PV guest says in front of its pages.

    width, levels: bytes of the guest's word, levels of its page tables
    frames: uint64[n], the PFNs of the frames that hold its p2m
    extended: the blocks of a legacy header; None: the source has none, and they follow from the first moment
    """

    width: int
    levels: int
    frames: NDArray[np.uint64]
    extended: tuple[events.ExtendedInfo, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Head:
    """What a source knows before its first page.

    format: the word for it (specs/formats.md §1)
    pages: of memory; None: only known at the first moment
    guest: None: the source does not say; it has memory only
    magic_pfns: as in `Moment`; None: only known at the first moment
    """

    format: str
    pages: int | None = None
    guest: Guest | None = None
    word: Word = 8
    magic_pfns: tuple[int, int, int] | None = None
    pv: Pv | None = None
    file_header: events.FileHeader | None = None
    image: v2.ImageHeader | None = None
    policies: dict[v2.Kind, bytes] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True, eq=False)
class Moment:
    """A checkpoint, behind its pages.

    memory: uint8[n, 4096], all of memory; valid until the next piece is asked for. Empty if it is the only one, and its
        pages come in batches alone
    types: uint8[n] of `PageType`; XTAB: there is no such page, or it never came
    is_last: whether no other moment follows
    notes: what the source has that no moment can hold, as (what, how much of it)
    """

    epoch: int
    memory: Pages
    memory_bytes: int
    types: NDArray[np.uint8]
    pfns: NDArray[np.int64] | None = None
    """int64[n]: the pages that changed, ascending; None: any may have."""
    is_last: bool = False
    parameters: dict[str, int] = field(default_factory=dict)
    """HVM parameters, by the names of `v2.PARAMETERS`, without the three magic PFNs."""
    magic_pfns: tuple[int, int, int] = (0, 0, 0)
    context: bytes = b""
    vcpu_info: events.VcpuInfo | None = None
    vcpus: tuple[events.VcpuContext, ...] = ()
    vcpu_msrs: dict[int, bytes] = field(default_factory=dict)
    shared_info: bytes = b""
    unmapped: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    """What a legacy tail says of PFNs without a frame. Xen's own converter drops it too."""
    tsc: events.TscInfo | None = None
    toolstack: bytes | None = None
    xenstore: bytes | None = None
    """The device model's keys and values, as libxl's layer has them; None: not known in this form."""
    device_state: bytes = b""
    record: CheckpointRecord | None = None
    notes: tuple[tuple[str, str], ...] = ()

    @property
    def pages(self) -> int:
        """Of memory."""
        return len(self.types)

    @property
    def present(self) -> NDArray[np.bool_]:
        """bool[n]: which pages exist, with contents or just allocated."""
        found: NDArray[np.bool_] = HAS_DATA[self.types] | (self.types == PageType.XALLOC)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Before:
    """In front of a later checkpoint's pages: some of them as they were at the moment before, for deltas.

    pfns: int64[n], ascending, no page tables among them
    pages: uint8[n, 4096]
    """

    pfns: NDArray[np.int64]
    pages: Pages


Piece = Head | Before | PageBatch | Moment


MAGIC_NAMES = tuple(v2.PARAMETER_NAMES[number] for number in v2.MAGIC_PARAMETERS)


@dataclass(slots=True)
class Losses:
    """What a target cannot hold: named once each, and refused if that is demanded.

    target: the name of the format
    say: prints one line
    """

    target: str
    say: Callable[[str], None]
    strict: bool = False
    named: dict[str, str] = field(default_factory=dict)

    def listed(self) -> list[str]:
        """Everything that was named."""
        return [f"{what} ({how_much})" if how_much else what for what, how_much in self.named.items()]

    def name(self, what: str, how_much: str = "") -> None:
        """Something is left out. Raises RemusError if the conversion is strict."""
        if what in self.named:
            return
        self.named[what] = how_much
        detail = f" ({how_much})" if how_much else ""
        if self.strict:
            raise RemusError(
                f"{self.target} cannot hold the {what}{detail}: choose another format, or leave out --strict to "
                "convert without it"
            )
        self.say(f"{self.target} cannot hold the {what}{detail}: left out")


def name_losses(losses: Losses, moment: Moment, holds: frozenset[str]) -> None:
    """Name everything in a moment that the target does not hold.

    holds: names of `_CONTENTS`
    """
    for what, measure in _CONTENTS.items():
        if what not in holds and (text := measure(moment)):
            losses.name(what, text)
    for what, text in moment.notes:
        losses.name(what, text)


def _bytes_of(data: bytes | None) -> str:
    return counted(len(data), "byte") if data else ""


def _count_tables(moment: Moment) -> str:
    tables = int(np.count_nonzero(HAS_DATA[moment.types] & (moment.types != PageType.NOTAB)))
    return counted(tables, "page") if tables else ""


def _parameters(moment: Moment) -> list[str]:
    return [*moment.parameters, *(name for name, pfn in zip(MAGIC_NAMES, moment.magic_pfns, strict=True) if pfn)]


def _toolstack(moment: Moment) -> str:
    if moment.xenstore is not None:
        return _bytes_of(moment.xenstore)
    return _bytes_of(moment.toolstack)


END_WITHIN_A_PAGE = "end of memory within its last page"
_CONTENTS: dict[str, Callable[[Moment], str]] = {
    "device state": lambda moment: _bytes_of(moment.device_state),
    "HVM context": lambda moment: _bytes_of(moment.context),
    "HVM parameters": lambda moment: f"{len(_parameters(moment))}" if _parameters(moment) else "",
    "virtual CPUs": lambda moment: f"{len(moment.vcpus)}" if moment.vcpus else "",
    "shared info": lambda moment: _bytes_of(moment.shared_info),
    "page types": _count_tables,
    "time stamp counter's mode": lambda moment: "" if moment.tsc is None else f"mode {moment.tsc.mode}",
    "toolstack's data": _toolstack,
    END_WITHIN_A_PAGE: lambda moment: f"{moment.memory_bytes:,} bytes" if moment.memory_bytes % PAGE_SIZE else "",
    "position in a history": lambda moment: "" if moment.record is None else f"{moment.record.after}",
}
"""What a moment may have besides memory, and how much of it there is; empty: nothing."""


def extended_info(moment: Moment, pv: Pv) -> tuple[events.ExtendedInfo, ...]:
    """The blocks of a legacy PV header that describe these virtual CPUs (specs/stream.md §3.3)."""
    context = moment.vcpus[0].context if moment.vcpus else bytes({8: 5168, 4: 2800}[pv.width])
    blocks = [events.ExtendedInfo(id=b"vcpu", data=context)]
    if any(vcpu.extended is not None for vcpu in moment.vcpus):
        blocks.append(events.ExtendedInfo(id=b"extv", data=b""))
    if sizes := [len(vcpu.xsave) for vcpu in moment.vcpus if vcpu.xsave_size is not None]:
        blocks.append(events.ExtendedInfo(id=b"xcnt", data=(16 + max(sizes)).to_bytes(4, "little")))
    return tuple(blocks)


def page_batches(pfns: NDArray[np.uint64], types: NDArray[np.uint8], data: Pages) -> Iterator[PageBatch]:
    """Entries in batches of at most 1,024. data: uint8[m, 4096], for the entries whose types carry data."""
    if len(pfns) <= MAX_BATCH_ENTRIES:
        yield PageBatch(pfns, types, data)
        return
    done = 0
    for start in range(0, len(pfns), MAX_BATCH_ENTRIES):
        part = types[start : start + MAX_BATCH_ENTRIES]
        count = int(np.count_nonzero(HAS_DATA[part]))
        yield PageBatch(pfns[start : start + MAX_BATCH_ENTRIES], part, data[done : done + count])
        done += count


def stored_pages(moment: Moment, filled: NDArray[np.bool_] | None = None) -> Iterator[PageBatch]:
    """The pages that changed, in batches, from memory; if any may have, all that have a type.

    filled: bool[≥ n], those that may hold something other than zeros: the others are left out; None: none is
    """
    pfns = np.flatnonzero(moment.types != PageType.XTAB) if moment.pfns is None else moment.pfns
    if filled is not None:
        pfns = pfns[filled[pfns]]
    for start in range(0, len(pfns), MAX_BATCH_ENTRIES):
        part = pfns[start : start + MAX_BATCH_ENTRIES]
        types = moment.types[part]
        with_data = part[HAS_DATA[types]]
        is_run = len(with_data) and int(with_data[-1]) - int(with_data[0]) + 1 == len(with_data)
        data = moment.memory[with_data[0] : with_data[-1] + 1] if is_run else moment.memory[with_data]
        yield PageBatch(part.astype(np.uint64), types, data)


def one_moment(pieces: Iterator[Piece], epoch: int | None) -> Iterator[Piece]:
    """The pieces up to one moment, as if it were the only one: the pages of those before it have just come more often.

    epoch: None: the last
    """
    for piece in pieces:
        if not isinstance(piece, Moment):
            yield piece
        elif piece.epoch == epoch or (epoch is None and piece.is_last):
            piece.is_last, piece.pfns = True, None
            yield piece
            return
