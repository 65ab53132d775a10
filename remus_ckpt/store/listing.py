"""The checkpoints of a history: from the index or, if it has no answer, from the segments (specs/store.md §8)."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from remus_ckpt.errors import StoreError
from remus_ckpt.limits import Limits
from remus_ckpt.store import index, segments
from remus_ckpt.store.segments import Contents, Entry, sequence_of, walk


class Listing:
    """The entries of segments that have been surveyed.

    directory: of the history; limits: what its streams may claim
    """

    def __init__(self, directory: Path, limits: Limits | None) -> None:
        self._segments = directory / segments.DIRECTORY
        self._limits = limits
        self._index = directory / index.FILE

    def by_epoch(self, contents: Iterable[Contents], *, newest_first: bool = False) -> Iterator[Entry]:
        """All checkpoints by epoch, each once, from the newest segment that holds it; streamed. Raises StoreError."""
        sign, edge = (-1, -1) if newest_first else (1, 0)
        waiting = [one for one in contents if one.epochs]
        waiting.sort(key=lambda one: (sign * one.epochs[edge], -sequence_of(one.name)), reverse=True)
        open_ones: list[tuple[int, int, Entry, Iterator[Entry]]] = []

        def put(one: Iterator[Entry]) -> None:
            if (entry := next(one, None)) is not None:
                heapq.heappush(open_ones, (sign * entry.epoch, -sequence_of(entry.segment), entry, one))

        given = None
        while waiting or open_ones:
            # A segment is opened when its first checkpoint is due: rarely are more than two open at a time.
            while waiting and (not open_ones or sign * waiting[-1].epochs[edge] <= open_ones[0][0]):
                put(self.of(waiting.pop(), newest_first))
            if not open_ones:
                continue
            _, _, entry, rest = heapq.heappop(open_ones)
            if entry.epoch != given:
                given = entry.epoch
                yield entry
            put(rest)

    def of(self, contents: Contents, newest_first: bool = False) -> Iterator[Entry]:
        """The checkpoints of a segment: from the index or, if it has no answer, from the segment itself."""
        given: int | None = None
        with suppress(index.Unreadable), index.reading(self._index) as rows:
            for entry in rows.entries(contents, backward=newest_first) if rows else ():
                given = entry.epoch
                yield entry
        if given == contents.epochs[0 if newest_first else -1]:
            return
        found: Iterable[Entry] = self.walk(contents)
        for entry in reversed(list(found)) if newest_first else found:
            if given is None or (entry.epoch < given if newest_first else entry.epoch > given):
                yield entry

    def walk(self, contents: Contents) -> Iterator[Entry]:
        """The checkpoints of a segment, read from its bytes. Raises StoreError."""
        path = self._segments / contents.name
        try:
            yield from walk(path, Contents(contents.name), end=contents.end, limits=self._limits)
        except FileNotFoundError:
            return  # pruned since
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error

    def find(self, contents: Contents, epoch: int) -> Entry | None:
        """One checkpoint of a segment."""
        for edge in (contents.first, contents.last):
            if edge is not None and edge.epoch == epoch:
                return edge
        with suppress(index.Unreadable), index.reading(self._index) as rows:
            if rows is not None:
                return rows.find(contents, epoch)
        return next((entry for entry in self.walk(contents) if entry.epoch == epoch), None)

    def newest_until(self, contents: Contents, time_ns: int) -> Entry | None:
        """The newest checkpoint of a segment that was taken no later than a time."""
        with suppress(index.Unreadable), index.reading(self._index) as rows:
            if rows is not None and self._is_indexed(rows, contents):
                return rows.newest_until(contents, time_ns)
        found = None
        for entry in self.walk(contents):
            if entry.time_ns is not None and entry.time_ns <= time_ns:
                found = entry
        return found

    @staticmethod
    def _is_indexed(rows: index.Rows, contents: Contents) -> bool:
        assert contents.first is not None and contents.last is not None
        edges = contents.first, contents.last
        return all(rows.find(contents, edge.epoch) == edge for edge in edges)
