"""A file that other processes have mapped: which of its pages they have written, through all their mappings of it.

In some cases writes may have been missed: a process or a mapping is new or gone, a child has ended, or a system call
has written to the file. Then Untracked is raised, and a comparison must find the pages of that checkpoint.

Some writes are not seen at all: through a mapping that comes and goes between two queries, by a child that has ended
but has not been waited for, and by processes that are not named.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.errors import Untracked
from remus_ckpt.flag import Descriptor
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.source.track import linux
from remus_ckpt.source.track.foreign import Stopped, userfaultfd_of
from remus_ckpt.source.track.spans import expand
from remus_ckpt.source.track.written import MemoryGone, Scanner, Userfault, check_page_size

_CMINFLT = 8
"""Faults of children that have ended: which word of /proc/PID/stat, counted from the state."""
_EVENTS_BYTES = 1 << 16


class Writer(Protocol):
    """A process that writes to the file, held by descriptors so that its pid cannot come to mean another."""

    @property
    def pid(self) -> int:
        """Its pid in our namespace."""

    @property
    def fd(self) -> int:
        """Its pidfd."""

    def open(self, name: str) -> int:
        """Open a file of /proc/PID. Raises OSError."""


class _Row(NamedTuple):
    """A shared mapping of the file. stop: after its last byte; offset: in the file"""

    start: int
    stop: int
    offset: int


class FileWatch:
    """The shared mappings of a file in some processes, watched.

    fd: the open file
    device, inode: as /proc/PID/maps lists it
    pages: writes beyond them in a mapping are not reported
    on_call: called in `written` when a system call has written to the file, or punched a hole in it
    One thread at a time may use it.
    """

    def __init__(
        self,
        fd: int,
        device: tuple[int, int],
        inode: int,
        pages: int,
        on_call: Callable[[], None] = lambda: None,
    ) -> None:
        self._pages = pages
        self._on_call = on_call
        self._file = device, inode
        self._scanner = Scanner()
        self._followed: dict[Writer, _Followed] = {}
        self._refused: dict[Writer, str] = {}
        check_page_size()
        if linux.file_system(fd) == linux.HUGETLBFS:
            raise Untracked("the file is on hugetlbfs: the kernel records writes to whole huge pages only")
        try:
            self._writes = linux.watch_writes(fd)
        except OSError as error:
            raise Untracked(f"writes to the file by system calls cannot be noticed: {error.strerror}") from None

    @property
    def is_open(self) -> bool:
        """Whether it has not been closed."""
        return self._writes >= 0

    @property
    def refused(self) -> list[str]:
        """Why processes that were given to `attach` cannot be followed."""
        return [*self._refused.values()]

    def close(self) -> None:
        """Release all processes."""
        for followed in self._followed.values():
            followed.close()
        self._followed.clear()
        writes, self._writes = self._writes, -1
        if writes >= 0:
            os.close(writes)

    def attach(self, processes: Sequence[Writer]) -> None:
        """Attach to new processes, and release those that are not named. Call this while they run.

        Writes from here on are found; earlier ones are unknown. A process that cannot be tracked is not tried again:
        `written` reports it from then on. A stopped process is skipped.
        """
        self._let_go(processes)
        for process in processes:
            if process in self._followed or process in self._refused:
                continue
            try:
                self._followed[process] = _Followed(process, self._scanner)
            except Stopped:
                continue
            except Untracked as error:
                self._refused[process] = str(error)

    def written(self, processes: Sequence[Writer]) -> NDArray[np.int64]:
        """The pages that these processes have written since the last call, int64[n], ascending. Call this while they
        are stopped.

        Raises Untracked, with the reason, if pages may be missing. Writes from here on are found again, if possible.
        """
        doubts = []
        with suppress(BlockingIOError):
            while os.read(self._writes, _EVENTS_BYTES):
                doubts = ["a system call has written to the file"]
        if doubts:
            self._on_call()
        if gone := self._let_go(processes):
            doubts.append(f"process {gone[0].pid} has ended, or no longer has the file")
        found: list[NDArray[np.int64]] = []
        is_ascending = len(processes) == 1
        for process in processes:
            followed = self._followed.get(process)
            if followed is None:
                doubts.append(self._refused.get(process, f"process {process.pid} is new"))
                continue
            try:
                runs = followed.written(*self._file)
            except MemoryGone as error:
                # `attach` takes in what it is now.
                self._followed.pop(process).close()
                doubts.append(str(error))
                continue
            except Untracked as error:
                doubts.append(str(error))
                continue
            is_ascending = is_ascending and followed.mappings == 1
            first, count = runs[:, 0], runs[:, 1]
            if not is_ascending or (len(runs) and runs[-1].sum() > self._pages):
                first = np.minimum(first, self._pages)
                count = np.minimum(runs[:, 0] + count, self._pages) - first
            found.append(expand(first, count))
        if doubts:
            raise Untracked("; ".join(doubts))
        return found[0] if is_ascending else np.unique(np.concatenate([np.empty(0, dtype=np.int64), *found]))

    def _let_go(self, named: Sequence[Writer]) -> list[Writer]:
        """Release all processes that are not named. Returns those that were followed."""
        gone = [process for process in self._followed if process not in named]
        for process in gone:
            self._followed.pop(process).close()
        self._refused = {process: why for process, why in self._refused.items() if process in named}
        return gone


class _Followed:
    """One process, and its mappings that are watched."""

    def __init__(self, process: Writer, scanner: Scanner) -> None:
        self.process = process
        self._scanner = scanner
        self._rows: dict[_Row, bool] = {}  # whether it is watched: not if the process can never write through it
        self._faults = ""
        self._userfault = Userfault(Descriptor(userfaultfd_of(process.pid, process.fd), "r+"))

    @property
    def mappings(self) -> int:
        """How many mappings of the file it has."""
        return len(self._rows)

    def close(self) -> None:
        self._userfault.close()

    def written(self, device: tuple[int, int], inode: int) -> NDArray[np.int64]:
        """Runs of written pages of this file, int64[n, 2]. Raises Untracked if some may be missing; the next call
        counts from here."""
        pid = self.process.pid
        try:
            rows = self._read_rows(device, inode)
            faults = self._read("stat").rpartition(b")")[2].split()[_CMINFLT].decode()
            # Reopened each time: an open pagemap stays with the memory that the process had when it was opened.
            pagemap = self.process.open("pagemap")
        except (OSError, IndexError) as error:
            raise Untracked(f"process {pid} cannot be inspected: {error}") from None
        doubt = ""
        if faults != self._faults:
            doubt = f"a child of process {pid} has ended, which may have written"
        if not rows:
            doubt = f"process {pid} does not have the file mapped"
        elif rows != self._rows.keys():
            doubt = f"process {pid} has changed its mappings"
        self._rows = {row: is_watched for row, is_watched in self._rows.items() if row in rows}
        found = [np.empty((0, 2), dtype=np.int64)]
        try:
            for row in rows:
                if row not in self._rows:
                    self._take_in(row, pagemap)
                if not self._rows[row]:
                    continue
                try:
                    runs = self._scanner.written(pagemap, row.start, row.stop)
                except Untracked as error:
                    # Remapped at the same address: register the new mapping now.
                    doubt = f"process {pid}: {error}"
                    self._take_in(row, pagemap)
                    continue
                runs[:, 0] += (row.offset - row.start) // PAGE_SIZE
                found.append(runs)
        finally:
            os.close(pagemap)
        self._faults = faults
        if doubt:
            raise Untracked(doubt)
        return found[1] if len(found) == 2 else np.concatenate(found)

    def _take_in(self, row: _Row, pagemap: int) -> None:
        self._rows.pop(row, None)
        try:
            is_watched = self._userfault.register(row.start, row.stop)
            if is_watched:
                self._scanner.arm(pagemap, row.start, row.stop)
        except Untracked as error:
            raise type(error)(f"process {self.process.pid}: {error}") from None
        self._rows[row] = is_watched

    def _read_rows(self, device: tuple[int, int], inode: int) -> set[_Row]:
        """The shared mappings of this file."""
        maps = self.process.open("maps")
        try:
            found = linux.shared_mappings(maps)
        finally:
            os.close(maps)
        if found is None:
            return rows_in(self._read("maps"), device, inode)
        return {_Row(*one[:3]) for one in found if (one.device, one.inode) == (device, inode)}

    def _read(self, name: str) -> bytes:
        with open(self.process.open(name), "rb", buffering=0) as file:
            return file.readall()


def rows_in(maps: bytes, device: tuple[int, int], inode: int) -> set[_Row]:
    """The same from the text of /proc/PID/maps. The lines of other files, often hundreds, are not parsed."""
    listed = b" %02x:%02x %d " % (*device, inode)
    rows = set()
    at = 0
    while (at := maps.find(listed, at)) >= 0:
        words = maps[maps.rfind(b"\n", 0, at) + 1 : at].split()
        # A path may hold the same words, farther behind.
        if len(words) == 3 and words[1].endswith(b"s"):
            start, stop = words[0].split(b"-")
            rows.add(_Row(int(start, 16), int(stop, 16), int(words[2], 16)))
        at += 1
    return rows
