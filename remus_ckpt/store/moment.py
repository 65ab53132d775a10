"""The memory of one checkpoint, without restoring it: each page is read when it is needed (specs/store.md §8.1)."""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from remus_ckpt.disk import guarding, open_to_read
from remus_ckpt.errors import BadCheckpoint, NoCheckpoint, StreamError
from remus_ckpt.memory import expect, zeros
from remus_ckpt.pages import PAGE_SIZE, Pages, pages_for
from remus_ckpt.restorer import Anonymous, Checkpoint, Home
from remus_ckpt.store import page_records
from remus_ckpt.store.page_index import DIRECTORY, Damaged, PageIndex, View, drop_others, owning
from remus_ckpt.store.page_records import Source, Unreadable, native_arguments, read_pages
from remus_ckpt.store.segments import Contents, Entry
from remus_ckpt.store.survey import newest_before
from remus_ckpt.wire.digest import DIGEST_BYTES
from remus_ckpt.wire.record import CheckpointRecord
from remus_ckpt.wire.xen import chunks

if TYPE_CHECKING:
    from remus_ckpt.store.history import History, Progress

_THREADS = 2
_SLICE_PAGES = 512
"""Pages read at a time if they go to a file or a comparison: this many stay in the cache meanwhile …"""
_LARGE_SLICE_PAGES = 4096
"""… and if they stay in memory."""
_HELD_BYTES = 64 << 20
"""The deltas are read into memory in one go if they have at most this many bytes."""
_TAIL_HEAD_BYTES = chunks.HVM_MAGIC_PFNS.size + 4 + chunks.SIGNATURE_BYTES + 4


class Moment:
    """One checkpoint of a history on this machine. Any thread may read it; `close` must come last.

    It stays valid while the history grows, even if its segment is pruned.
    """

    def __init__(self, history: History, entry: Entry, fd: int, index: PageIndex) -> None:
        self.history = history
        self.entry = entry
        self._fd = -1
        self._index = index
        self._lock = threading.Lock()
        self._is_rebuilt = False
        self._view: View = index.at(entry)
        try:
            self.record = _record_of(self._view, fd)
        except BaseException:
            os.close(self._view.full)
            raise
        self._fd = fd
        self._source: Source = self._view.source(fd)
        self.pages = self._view.shape.p2m_size
        """The number of pages of memory."""
        stated = self.record.memory_bytes
        self.memory_bytes = self.pages * PAGE_SIZE if stated is None else stated
        """Bytes of memory; the rest of its last page is padding."""

    # Opening

    @classmethod
    def open(cls, history: History, entry: Entry) -> Self:
        """Open a checkpoint; if there is no page index that has it, one is built.

        Raises NoCheckpoint if its segment is gone, BadCheckpoint if it is damaged, StoreError.
        """
        found = cls._open(history, entry, build=True)
        assert found is not None
        return found

    @classmethod
    def open_indexed(cls, history: History, entry: Entry) -> Self | None:
        """Open a checkpoint if a page index on disk has it. Raises like `open`."""
        return cls._open(history, entry, build=False)

    @classmethod
    def _open(cls, history: History, entry: Entry, *, build: bool) -> Self | None:
        path = history.path_of(entry.segment)
        with guarding(path):
            try:
                fd = open_to_read(path)
            except FileNotFoundError:
                raise NoCheckpoint(f"{path} is gone: checkpoint {entry.epoch} has been pruned") from None
            try:
                if os.fstat(fd).st_size < entry.end:
                    raise _bad(history, entry, "its bytes are cut off", os.fstat(fd).st_size)
                for is_fresh in (False, True):
                    index = _built(history, entry, fd, is_fresh) if build else _found(history, entry)
                    if index is None:
                        break
                    try:
                        return cls(history, entry, fd, index)
                    except Damaged:
                        index.close()
                        if not build:
                            break
            except BaseException:
                os.close(fd)
                raise
        os.close(fd)
        if build:
            raise _bad(history, entry, "the end of the checkpoint has changed", entry.start)
        return None

    def close(self) -> None:
        """Close the files. Memory that was handed out stays valid."""
        if self._fd >= 0:
            self._index.close()
            os.close(self._view.full)
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Reading

    @property
    def device_state(self) -> bytes:
        """The user's own bytes."""
        return self.record.device_state

    @property
    def carried(self) -> NDArray[np.int64]:
        """int64[n]: the pages that the checkpoint itself carries, ascending, each once."""
        return np.unique(self._view.carried["pfn"]).astype(np.int64)

    def read(self, first: int, out: Pages) -> None:
        """Fill `out`, uint8[n, 4096], with pages from number `first` on, checked.

        Raises BadCheckpoint if the segment has changed or cannot be read.
        """
        try:
            read_pages(self._source, first, out)
        except Unreadable as error:
            self._rebuild(error)
            try:
                read_pages(self._source, first, out)
            except Unreadable as again:
                raise self._is_bad(again) from None

    def read_bytes(self, at: int, size: int) -> bytes:
        """Bytes of memory. Raises like `read`."""
        size = max(min(size, self.memory_bytes - at), 0)
        first, stop = at // PAGE_SIZE, pages_for(at + size)
        out = np.empty((stop - first, PAGE_SIZE), dtype=np.uint8)
        if size:
            self.read(first, out)
        start = at - first * PAGE_SIZE
        return out.reshape(-1)[start : start + size].tobytes()

    def _rebuild(self, error: Unreadable) -> None:
        """The index or the segment is damaged. If it is the index, replace it with a new one. Raises BadCheckpoint."""
        with self._lock:
            if self._is_rebuilt:
                return
            if error.error > 0:
                raise self._is_bad(error)
            index = _built(self.history, self.entry, self._fd, is_fresh=True)
            try:
                view = index.at(self.entry)
            except Damaged:
                index.close()
                raise self._is_bad(error) from None
            old, old_view, self._index, self._view = self._index, self._view, index, view
            self._source = view.source(self._fd)
            self._is_rebuilt = True
            old.close()
            os.close(old_view.full)

    def _is_bad(self, error: Unreadable) -> BadCheckpoint:
        return _bad(self.history, self.entry, f"page {error.page}: {error.reason}", self.entry.start)

    def restore(self, home: Home, progress: Progress | None = None) -> Checkpoint:
        """Read the checkpoint into a home. Raises like `fill`."""
        memory = home.open(self.pages)
        self.fill(memory, None if isinstance(home, Anonymous) else home, progress)
        return self.checkpoint(memory)

    def fill(self, memory: Pages, home: Home | None = None, progress: Progress | None = None) -> None:
        """Read all of memory, in two threads.

        memory: uint8[pages, 4096], zeros; home: gets the pages instead, except those that are zeros
        progress: called with the bytes of the segment that have been read, roughly
        Raises like `read`, and what `home` raises.
        """
        used = np.flatnonzero(np.diff(self._source.heads > 0, prepend=False, append=False)).reshape(-1, 2).tolist()
        with self._holding():
            size = _LARGE_SLICE_PAGES if home is None else _SLICE_PAGES
            parts = [(start, min(start + size, stop)) for first, stop in used for start in range(first, stop, size)]
            pages = sum(stop - start for start, stop in parts)
            if home is None and used:
                expect(memory, np.arange(used[0][0], used[-1][1])) if _is_dense(used) else None
            todo, done, lock = iter(parts), 0, threading.Lock()

            def work() -> None:
                nonlocal done
                room = np.empty((_SLICE_PAGES, PAGE_SIZE), dtype=np.uint8) if home is not None else None
                while True:
                    with lock:
                        part = next(todo, None)
                        if progress is not None and pages:
                            progress(self.entry.end * done // pages)
                    if part is None:
                        return
                    start, stop = part
                    out = memory[start:stop] if room is None else room[: stop - start]
                    self.read(start, out)
                    if home is not None:
                        keep = np.flatnonzero(out.view(np.uint64).any(axis=1))
                        home.write(memory, keep + start, out if len(keep) == len(out) else out[keep])
                    done += stop - start

            with ThreadPoolExecutor(_THREADS, "restore") as threads:
                for one in [threads.submit(work) for _ in range(min(_THREADS, len(parts)))]:
                    one.result()

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Read the deltas into memory for the length of the block, if they are not many."""
        start, end = self._view.base_end, self._view.end
        plain = self._source
        if 0 < end - start <= _HELD_BYTES:
            held = np.empty(end - start, dtype=np.uint8)
            if os.preadv(self._fd, [held], start) == len(held):
                self._source = plain.holding(held, start)
        try:
            yield
        finally:
            if self._source.held is not None:
                self._source = plain

    def differing(self, other: Moment) -> Iterator[tuple[NDArray[np.int64], Pages, Pages]]:
        """Where this checkpoint and another one of the same history differ, some pages at a time, ascending.

        Yields (pages, ours, theirs): int64[n], and uint8[n, 4096] each; pages beyond the end of a memory are zeros. In
        one segment, only pages that were carried between the two are read. Raises like `read`.
        """
        if self.entry.segment == other.entry.segment and not (self._is_rebuilt or other._is_rebuilt):
            numbers = np.flatnonzero(self._source.heads != other._source.heads)
        else:
            numbers = np.arange(max(self.pages, other.pages))
        for at in range(0, len(numbers), _SLICE_PAGES):
            part = numbers[at : at + _SLICE_PAGES]
            ours, theirs = self._pick(part), other._pick(part)
            differ = np.flatnonzero((ours.view(np.uint64) != theirs.view(np.uint64)).any(axis=1))
            if len(differ):
                yield part[differ], ours[differ], theirs[differ]

    def _pick(self, numbers: NDArray[np.int64]) -> Pages:
        """Some pages, ascending. Raises like `read`."""
        out = np.zeros((len(numbers), PAGE_SIZE), dtype=np.uint8)
        there = int(np.searchsorted(numbers, self.pages))
        edges = [0, *(np.flatnonzero(np.diff(numbers[:there]) != 1) + 1).tolist(), there]
        for first, stop in itertools.pairwise(edges):
            if first < stop:
                self.read(int(numbers[first]), out[first:stop])
        return out

    # Memory

    def checkpoint(self, memory: Pages) -> Checkpoint:
        """What a restore returns, with that memory."""
        found = Checkpoint(self.record.epoch, self.entry.start, memory, self.entry.end)
        found.record = self.record
        found.entries = found.page_count = self.entry.pages
        found.pfn_lists.append(self._view.carried["pfn"].astype(np.int64))
        return found

    def memory(self) -> Pages:
        """uint8[pages, 4096]: memory of this process that is filled as it is touched, or at once if the kernel does not
        allow that. It may be written to, and stays valid without this object.

        If a page cannot be read or has changed on disk, touching it kills the process with SIGBUS, like a mapped file
        on a failing disk. A forked child does not have this memory. Raises like `read` if it is filled at once.
        """
        arguments = native_arguments(self._source)
        if arguments is not None and (memory := self._lazily()) is not None:
            return memory
        memory = zeros(self.pages)
        self.fill(memory)
        return memory

    def _lazily(self) -> Pages | None:
        area = mmap.mmap(-1, self.pages * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        memory = np.frombuffer(area, dtype=np.uint8).reshape(self.pages, PAGE_SIZE)
        address = memory.ctypes.data
        try:
            fault_fd = page_records.native.watch(address, memory.nbytes)
        except OSError:
            return None
        area.madvise(mmap.MADV_DONTFORK)
        server = _Server(fault_fd, self._view, self._fd, address)
        if not server.is_ready:
            return None
        # References to the memory keep the mapping: when it goes, nothing can touch it any more.
        weakref.finalize(area, server.stop).atexit = False
        return memory


_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class _Server:
    """A thread that fills pages of a mapping as they are touched, without ever holding the GIL.

    is_ready: whether it runs; otherwise there was no thread or memory for it
    """

    def __init__(self, fault_fd: int, view: View, segment: int, address: int) -> None:
        own = [fault_fd, os.dup(segment), os.dup(view.full)]
        source = Source((own[1], own[2]), view.records, view.heads, view.shape.codec)
        arguments = native_arguments(source)
        stop, self._stop = os.pipe2(os.O_CLOEXEC)
        ready, told = os.pipe2(os.O_CLOEXEC)
        own += [stop, told]

        def run() -> None:
            try:
                with suppress(MemoryError):
                    page_records.native.serve(arguments, fault_fd, stop, told, address)
            finally:
                for fd in own:
                    os.close(fd)

        try:
            threading.Thread(target=run, name="memory", daemon=True).start()
        except RuntimeError:  # no more threads are allowed
            for fd in (*own, ready, self._stop):
                os.close(fd)
            self.is_ready = False
            return
        # Once it has answered, it needs no GIL: the toucher of a page may hold it.
        self.is_ready = os.read(ready, 1) == b"r"
        os.close(ready)

    def stop(self) -> None:
        """End the thread; nothing can touch the memory any more."""
        os.write(self._stop, b"s")  # a forked child may have the pipe too: to close it would not be enough
        os.close(self._stop)


def _record_of(view: View, fd: int) -> CheckpointRecord:
    """The record in the tail of a checkpoint. Raises Damaged."""
    data = os.pread(fd, view.end - view.tail, view.tail)
    if google_crc32c.value(data) != view.tail_crc:
        raise Damaged
    return CheckpointRecord.unpack(data[_TAIL_HEAD_BYTES:-DIGEST_BYTES], view.tail + _TAIL_HEAD_BYTES)


def _is_dense(used: list[list[int]]) -> bool:
    return sum(stop - first for first, stop in used) * 5 >= (used[-1][1] - used[0][0]) * 4


def _found(history: History, entry: Entry) -> PageIndex | None:
    """The index on disk, if it has the checkpoint."""
    index = PageIndex.open(history.directory / DIRECTORY, entry.segment)
    if index is not None and not index.covers(entry):
        index.close()
        return None
    return index


def _built(history: History, entry: Entry, fd: int, is_fresh: bool) -> PageIndex:
    """An index that has the checkpoint: the one on disk, extended, or one without a name. Raises BadCheckpoint."""
    if not is_fresh and (index := _found(history, entry)) is not None:
        return index
    with owning(history.directory) as directory:
        if directory is not None:
            try:
                return _extended(
                    None if is_fresh else PageIndex.open(directory, entry.segment, writable=True),
                    lambda: PageIndex.create(directory, entry.segment),
                    history,
                    entry,
                    fd,
                )
            except OSError:
                pass  # no room: it is a cache
    like = None if is_fresh else PageIndex.open(history.directory / DIRECTORY, entry.segment)
    try:
        copy = None if like is None else PageIndex.unnamed(entry.segment, like)
        return _extended(copy, lambda: PageIndex.unnamed(entry.segment, None), history, entry, fd)
    finally:
        if like is not None:
            like.close()


def _extended(
    index: PageIndex | None, create: Callable[[], PageIndex], history: History, entry: Entry, fd: int
) -> PageIndex:
    for one in (index, None):
        index = one or create()
        try:
            index.extend(fd, entry, history.limits)
        except Damaged:
            index.close()
            continue
        except StreamError as error:
            index.close()
            # The traceback would keep the index mapped.
            raise _bad(history, entry, error.message, error.offset or entry.start) from error.with_traceback(None)
        except BaseException:
            index.close()
            raise
        if index.covers(entry):
            return index
        index.close()  # it is of another segment of that name
    raise _bad(history, entry, "the segment has another checkpoint in its place", entry.start)


def _bad(history: History, entry: Entry, reason: str, offset: int) -> BadCheckpoint:
    """The error for a checkpoint that cannot be read: it is read again completely, to find what is wrong and where."""
    try:
        history.check(entry)
    except BadCheckpoint as error:
        return error
    except NoCheckpoint:
        pass  # pruned since
    good = newest_before([one.epochs for one in history.contents()], entry.epoch)
    return BadCheckpoint(
        f"{reason}, but only sometimes: checkpoint {entry.epoch} is unreliable; check the disk",
        segment=entry.segment,
        epoch=entry.epoch,
        good=good,
        offset=offset,
        section="store.md §8.1",
    )


def index_pages(history: History, until: Callable[[], bool]) -> int:
    """Bring the page indexes of a history up to date, newest segment first; returns how many checkpoints were added.

    until: asked between two checkpoints whether to stop
    Does nothing while another process does it. Raises StoreError.
    """
    added = 0
    if not any(one.epochs for one in history.contents()):
        return 0  # its backup may remove it at any moment
    with owning(history.directory) as directory:
        if directory is None:
            return 0
        contents = history.contents()
        drop_others(directory, [one.name for one in contents])
        for one in reversed(contents):
            if until():
                break
            with guarding(directory):
                added += _index_segment(history, directory, one, until)
    return added


def _index_segment(history: History, directory: Path, one: Contents, until: Callable[[], bool]) -> int:
    if one.last is None:
        return 0
    try:
        fd = open_to_read(history.path_of(one.name))
    except FileNotFoundError:
        return 0  # pruned since
    try:
        index = PageIndex.open(directory, one.name, writable=True)
        if index is None or index.end > one.end:
            if index is not None:
                index.close()
            index = PageIndex.create(directory, one.name)
        with index:
            before = index.count
            try:
                with suppress(StreamError):  # its readers find out
                    index.extend(fd, one.last, history.limits, until)
            except Damaged:
                PageIndex.create(directory, one.name).close()  # the next turn fills it
                return 0
            return index.count - before
    finally:
        os.close(fd)
