"""What a history holds after its writer died at any point, and what must be done about it (specs/store.md §9).

Nothing is cut, removed, synced or saved here: the writer does that, following the result.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Protocol

from remus_ckpt.disk import guarding, open_to_read
from remus_ckpt.errors import StoreError, StreamError, UnknownFormat
from remus_ckpt.hashing import hashing
from remus_ckpt.limits import Limits
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.restorer import Restorer
from remus_ckpt.store import segments
from remus_ckpt.store.segments import (
    Contents,
    digest_of_stream,
    entry_of,
    first_epoch_of,
    holds_a_record,
    is_segment,
    list_segments,
    reader_of,
    replay,
    sequence_of,
    shape_of,
    walk_again,
)
from remus_ckpt.store.state import State
from remus_ckpt.store.survey import joined, was_pruned, without
from remus_ckpt.store.unwritten import data_end
from remus_ckpt.store.warm import MappedFile
from remus_ckpt.wire.digest import new_digest
from remus_ckpt.wire.record import RECORD_SECTION

MAX_WARNINGS = _MAX_DAMAGED = 1_000
_MAX_REASON = 300


class Fill(Protocol):
    """Reads the part of a segment, up to `end`, that the index lacks, and adds it to the index and to `contents`."""

    def __call__(self, contents: Contents, *, end: int) -> None:
        """Raises OSError."""


@dataclass(frozen=True, slots=True)
class Newest:
    """The segment that holds the newest checkpoint, replayed into a warm copy; the restorer has that checkpoint in
    force.

    synced: how many of its first bytes are already synced; the rest, up to the checkpoint's end, must be written again
    is_cut: whether to cut off what follows the checkpoint: another that never came to its end
    is_sealed: nothing may be appended
    """

    name: str
    restorer: Restorer
    home: MappedFile
    contents: Contents
    synced: int
    is_cut: bool
    is_sealed: bool


@dataclass(frozen=True, slots=True)
class Found:
    """What the segments hold.

    contents: of each segment, oldest first
    indexed: what the index says now
    newest: None if there is no whole checkpoint
    lengths: of older segments that are longer than their data, where these must be cut
    highest_epoch: of any checkpoint ever seen, −1 before the first
    state: what store.json must say
    warnings: what is wrong, in words
    """

    contents: list[Contents]
    indexed: dict[str, Contents]
    newest: Newest | None
    lengths: dict[str, int]
    highest_epoch: int
    state: State
    warnings: list[str]


@dataclass(slots=True)
class Recovery:
    """Reads all segments, once. All but the newest have been synced, so the index may name what they hold.

    state: what store.json says
    indexed: what the index says; the caller's dictionary stays as it is
    limits: what streams may claim
    new_home: makes a place for a warm copy
    """

    directory: Path
    state: State
    indexed: dict[str, Contents]
    limits: Limits | None
    new_home: Callable[[], MappedFile]
    fill: Fill
    _names: list[str] = field(init=False)
    _newest: Newest | None = field(init=False, default=None)
    _highest: int = field(init=False)
    _lengths: dict[str, int] = field(init=False, default_factory=dict)
    _warnings: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.indexed = dict(self.indexed)
        self._names = list_segments(self.directory)
        self._highest = -1 if self.state.highest_epoch is None else self.state.highest_epoch

    @property
    def _segments(self) -> Path:
        return self.directory / segments.DIRECTORY

    def found(self) -> Found:
        """Read them. Raises StoreError if a file cannot be read, or has a later format."""
        try:
            return self._found()
        except BaseException:
            if self._newest is not None:
                self._newest.home.remove()
            raise

    def _found(self) -> Found:
        names, there = self._names, set(self._names)
        # A segment that is gone stays named until its neighbours have been pruned.
        oldest = sequence_of(names[0]) if names else -1
        damaged = {
            name: why
            for name, why in self.state.damaged.items()
            if name in there or (is_segment(name) and sequence_of(name) > oldest)
        }
        known: dict[str, Contents] = {}
        for name in reversed(names):
            said = self.indexed.get(name)
            self._see(first_epoch_of(name), said)
            may_be_newest = self._newest is None
            with guarding(self._segments / name):
                contents, reason = (self._read_newest if may_be_newest else self._glance)(name, said)
            if may_be_newest or said is None:
                damaged.pop(name, None)  # it has been examined again
            if not may_be_newest and (said is None or contents.end != said.end):
                # It is in the index now, with the length that the file still has.
                self.indexed[name] = replace(contents, size=None if name in self._lengths else contents.size)
            known[name] = contents
            self._see(-1, contents)
            if reason is not None:
                damaged[name] = reason
        gone = sorted((name for name in self.indexed.keys() - there), key=sequence_of)
        kept_or_pruned = joined([*(known[name].epochs for name in names), *self.state.pruned])
        if names:
            # The oldest ones are gone because they were pruned, and so may be some between others.
            newest_number = sequence_of(names[-1])
            gone = [
                name
                for name in gone
                if sequence_of(name) > newest_number
                or (sequence_of(name) > oldest and not was_pruned(self.indexed[name], kept_or_pruned))
            ]
        for name in gone:
            self._warn([f"{name}: the index lists it, but it is missing"])
            self._see(-1, self.indexed[name])
            lost = self.indexed[name].epochs
            damaged[name] = "it is gone" + (f", and with it checkpoints {lost[0]} to {lost[-1]}" if lost else "")
        damaged = _bounded(damaged)
        all_contents = [known[name] for name in names]
        self._warn(_gaps(all_contents, damaged, self.state.pruned))
        self._warn(f"{name}: {damaged[name]}" for name in names if name in damaged)
        state, newest = self.state, self._newest
        if damaged != state.damaged or gone:
            state = replace(state, damaged=damaged, highest_epoch=self._highest if damaged or gone else None)
        if gone and newest is not None and sequence_of(gone[-1]) > sequence_of(newest.name):
            newest = replace(newest, is_sealed=True)
        return Found(all_contents, self.indexed, newest, self._lengths, self._highest, state, self._warnings)

    def _warn(self, warnings: Iterable[str]) -> None:
        self._warnings += islice(warnings, MAX_WARNINGS - len(self._warnings))

    def _see(self, epoch: int, contents: Contents | None) -> None:
        last = -1 if contents is None else max(contents.epochs, default=-1)
        self._highest = max(self._highest, epoch, last)

    def _read_newest(self, name: str, known: Contents | None) -> tuple[Contents, str | None]:
        """Replay what may be the newest segment; returns what it holds and, if it is damaged, how."""
        limits = self.limits or Limits()
        if known is not None and known.shape is not None and known.shape.p2m_size * PAGE_SIZE > limits.memory_bytes:
            raise StoreError(
                f"{self.directory}: memory of {known.shape.p2m_size * PAGE_SIZE} bytes is over the limit memory_bytes "
                f"of {limits.memory_bytes}"
            )
        home = self.new_home()
        try:
            fd = open_to_read(self._segments / name)
            try:
                restorer, contents = self._replay(name, fd, home)
                size = os.fstat(fd).st_size
                written = walk_again(fd, contents, size, self.limits)
                reason = _damage_of(contents, known, fd, written, size)
            finally:
                os.close(fd)
            if contents.first is None:
                home.remove()
                contents.size = size
                return contents, reason
            restorer.reader.new_digest = new_digest
            restorer.rewind()
            is_sealed = reason is not None or name != self._names[-1] or not restorer.reader.compressing
            end = contents.end
            if is_sealed:
                contents.size = end if reason is None else size
            # The index names what was synced. Whole checkpoints after that may be unsynced, or their sync has failed.
            synced = 0 if known is None else min(known.end, end)
            self._newest = Newest(name, restorer, home, contents, synced, reason is None and size > end, is_sealed)
        except BaseException:
            if self._newest is None:
                home.remove()
            raise
        return contents, reason

    def _replay(self, name: str, fd: int, home: MappedFile) -> tuple[Restorer, Contents]:
        contents = Contents(name)
        with hashing() as threaded:
            known = self.indexed.get(name)
            digest = digest_of_stream(reader_of(fd), None if known is None else known.last)
            restorer = Restorer(limits=self.limits, home=home, digest=digest, new_digest=threaded)
            try:
                for staged in replay(reader_of(fd), restorer):
                    contents.add(entry_of(staged, name))
                    restorer.commit()
                    contents.shape = shape_of(restorer)
            except StreamError as error:
                if isinstance(error, UnknownFormat) and error.section == RECORD_SECTION:
                    # The digest is right: a later version of the program wrote this.
                    raise StoreError(f"{self._segments / name}: {error}") from error
                contents.fault = error.with_traceback(None)  # which would keep the memory
        return restorer, contents

    def _glance(self, name: str, known: Contents | None) -> tuple[Contents, str | None]:
        """Examine an older segment: trust the index if the size is right, and add to it what is missing."""
        size = (self._segments / name).stat().st_size
        if known is not None and known.last is not None:
            is_explained = known.end == size or (known.size == size and name in self.state.damaged)
            if is_explained and known.size in (size, None):
                return replace(known, size=size), None
        contents = Contents(name, size=size)
        self.fill(contents, end=size)
        self._take_length(contents, known, size)
        size = contents.size = self._lengths.get(name, size)
        if contents.fault is not None:
            return contents, str(contents.fault)
        if contents.last is None:
            return contents, "it holds no whole checkpoint"
        if contents.end < size or (known is not None and known.end > contents.end):
            return contents, f"its whole checkpoints end at byte {contents.end} of {size}"
        return contents, None

    def _take_length(self, contents: Contents, known: Contents | None, size: int) -> None:
        """Note where an older segment must be cut, because nothing was written after its last checkpoint."""
        if contents.last is None or contents.end == size or (known is not None and known.end > contents.end):
            return
        fd = open_to_read(self._segments / contents.name)
        try:
            if data_end(fd, contents.end, size) == contents.end:
                contents.fault = None
                self._lengths[contents.name] = contents.end
        finally:
            os.close(fd)


def _gaps(contents: list[Contents], damaged: dict[str, str], pruned: list[range]) -> Iterator[str]:
    """Warnings about epochs missing between two segments, unless they were pruned or other damage explains them."""
    explained = sorted(sequence_of(name) for name in damaged if is_segment(name))
    reached = -1
    for before, one in pairwise(contents):
        reached = max([reached, *before.epochs[-1:]])
        numbers = sequence_of(before.name), sequence_of(one.name)
        first, stop = (bisect_left(explained, number) for number in numbers)
        gap = range(reached + 1, one.first.epoch) if one.first is not None and reached >= 0 else range(0)
        for part in without(gap, pruned) if first == stop else ():
            yield f"{one.name}: checkpoints {part[0]} to {part[-1]} before it are missing"


def _damage_of(contents: Contents, known: Contents | None, fd: int, written: int, size: int) -> str | None:
    """How a segment that was read to its end is damaged; None if it is not. Raises OSError."""
    end = contents.end
    lost = known.epochs[len(contents.epochs) :] if known is not None and known.end > end else range(0)
    reason = None
    if contents.fault is not None:
        reason = str(contents.fault)
    elif lost:
        reason = f"whole checkpoints end at byte {end} of {size}"
    elif contents.last is None:
        reason = "it holds no whole checkpoint"
    elif size > end and holds_a_record(fd, contents.last.position, end, written, size):
        reason = f"no checkpoint follows byte {end}, but there is one further on"
    if reason is not None and lost:
        reason += f"; checkpoints {lost[0]} to {lost[-1]} are lost"
    return reason


def _bounded(damaged: dict[str, str]) -> dict[str, str]:
    """As many entries as store.json has room for: `verify` finds the damage that is not named there."""
    newest_first = sorted(damaged, key=lambda name: sequence_of(name) if is_segment(name) else -1, reverse=True)
    return {name: str(damaged[name])[:_MAX_REASON] for name in reversed(newest_first[:_MAX_DAMAGED])}
