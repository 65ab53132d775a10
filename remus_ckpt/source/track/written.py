"""Address ranges that the kernel watches: arm them, query which pages were written since the last time, release them.

A watched page is write-protected; the kernel lifts that at the first write, without a handler (asynchronous
write-protection: Linux 6.7, on arm64 6.10). A scan finds the pages that are no longer protected and protects them
again, in one step: no write is lost between the two. Scan first, then copy.
"""

from __future__ import annotations

import errno
import mmap
import os
import platform

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.errors import Untracked
from remus_ckpt.flag import Descriptor
from remus_ckpt.forks import disown_in_forks
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.source.track import linux

Runs = NDArray[np.int64]
"""int64[n, 2]: (first page, count) each, ascending and apart. A page's number is its address / 4096."""

_PAGE_BITS = PAGE_SIZE.bit_length() - 1
_REGIONS = 4096
"""How many runs one call returns: 96 KiB, which stays in the second-level cache. More are fetched by further calls."""
_WRITE_PROTECTS = {"aarch64": "6.10"}
"""Where a later kernel than 6.7 is needed, by `platform.machine()`."""


class Unwatched(Untracked):
    """Some of a range is mapped but not watched."""


class MemoryGone(Untracked):
    """The memory of a userfaultfd no longer exists: the process has ended, or executed another program."""


class Userfault:
    """A userfaultfd: what it has registered is watched until all holders have closed it.

    file: from `linux.userfaultfd`, or of another process; closed with this
    Raises Untracked if the kernel cannot protect asynchronously.
    """

    def __init__(self, file: Descriptor) -> None:
        self._file = file
        # A forked child's copy would keep watching, and no one else could watch the memory.
        disown_in_forks(self)
        try:
            linux.handshake(file.fileno())
        except OSError as error:
            self.close()
            raise Untracked(_words(error)) from None

    @classmethod
    def of_this_process(cls) -> Userfault:
        """A userfaultfd for this process's memory. Raises Untracked."""
        check_page_size()
        try:
            return cls(linux.userfaultfd())
        except OSError as error:
            raise Untracked(_words(error)) from None

    def close(self) -> None:
        """Release all ranges: writes no longer cost anything. May be called again."""
        self._file.close()

    def disown(self) -> None:
        """In a forked child: the userfaultfd belongs to the parent."""
        self.close()

    def register(self, start: int, stop: int) -> bool:
        """Register a range of addresses, whole pages. It is watched from `Scanner.arm` on.

        Returns False, and registers nothing, if the mapping can never be written.
        Raises Untracked if it cannot be watched, because another userfaultfd does or because some of it is not mapped;
        MemoryGone.
        """
        try:
            linux.register(-1 if self._file.closed else self._file.fileno(), start, stop)
            return True
        except OSError as error:
            if error.errno == errno.EPERM:  # of a file opened for reading
                return False
            if error.errno == errno.ENOMEM:
                raise MemoryGone("it has ended, or executed another program") from None
            reason = {
                errno.EBUSY: "another userfaultfd watches some of it",
                errno.EINVAL: "some of it is not mapped, or mapped in a way that userfaultfd does not take",
            }.get(error.errno or 0, error.strerror)
            raise Untracked(f"memory at {start:#x}-{stop:#x} cannot be watched: {reason}") from None


def check_page_size() -> None:
    """Raise Untracked if the kernel's pages, which it notes writes by, are larger than ours."""
    if mmap.PAGESIZE != PAGE_SIZE:
        raise Untracked(f"this machine's pages have {mmap.PAGESIZE} bytes, not {PAGE_SIZE}")


class Scanner:
    """Queries which pages were written. One thread at a time may use it.

    Each call takes a descriptor of /proc/PID/pagemap, opened since the process last executed a program.
    """

    def __init__(self) -> None:
        self._vector = np.empty((_REGIONS, linux.REGION_WORDS), dtype=np.uint64)
        self._address = self._vector.ctypes.data

    def arm(self, pagemap: int, start: int, stop: int) -> None:
        """Protect all pages of a range: `written` finds writes from here on.

        Takes 10 to 30 ms per GiB in use; untouched pages take as long where memory has 4 KiB pages.
        Raises Untracked as `written` does.
        """
        self._walk(pagemap, start, stop, is_told=False)

    def written(self, pagemap: int, start: int, stop: int) -> Runs:
        """The pages of a range written since it was armed or last asked about; they are protected again.

        Raises Unwatched if some of it is mapped but not watched, because other memory has taken its place. Then it is
        unknown what was written. A range that is not mapped reports nothing: see `linux.is_mapped`.
        """
        return self._walk(pagemap, start, stop, is_told=True)

    def peek(self, pagemap: int, start: int, stop: int) -> Runs:
        """Like `written`, but the pages stay as they are: the next call finds them again."""
        return self._walk(pagemap, start, stop, is_told=True, protect=False)

    def _walk(self, pagemap: int, start: int, stop: int, *, is_told: bool, protect: bool = True) -> Runs:
        vector, length = (self._address, _REGIONS) if is_told else (0, 0)
        found = []
        at = start
        try:
            while at < stop:
                regions, reached = linux.pagemap_scan(pagemap, at, stop, vector, length, protect=protect)
                if regions:
                    found.append((self._vector[:regions, :2] >> _PAGE_BITS).view(np.int64))
                if not at < reached <= stop:
                    raise Untracked(f"a scan of {at:#x}-{stop:#x} has stopped at {reached:#x}")
                at = reached
        except OSError as error:
            if error.errno == errno.EPERM:
                raise Unwatched(
                    f"memory at {start:#x}-{stop:#x} is no longer watched: it was freed, moved or remapped"
                ) from None
            raise Untracked(_words(error)) from None
        if len(found) == 1:  # in a pause each call of numpy counts
            runs = found[0]
            runs[:, 1] -= runs[:, 0]
            return runs
        return in_order(np.concatenate([np.empty((0, 2), dtype=np.int64), *found]))


def in_order(regions: NDArray[np.int64]) -> Runs:
    """The runs in some regions, int64[n, 2] as (first, stop).

    For some calls the kernel reports a shorter walk than it made (walk_end stays where its own buffer of 512 regions
    was last full). The next call begins there, and finds again what was written in between.
    """
    first, stop = regions[:, 0], regions[:, 1]
    order = np.argsort(first, kind="stable")
    stop = np.maximum.accumulate(stop[order])
    first = first[order]
    first[1:] = np.maximum(first[1:], stop[:-1])
    runs = np.stack([first, stop - first], axis=1)
    return runs[runs[:, 1] > 0]


def why_not() -> str | None:
    """Why the kernel cannot track writes to this process's memory; None if it can. This is tried out."""
    try:
        userfault = Userfault.of_this_process()
    except Untracked as error:
        return str(error)
    pagemap = -1
    with mmap.mmap(-1, 2 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        start = np.frombuffer(area, dtype=np.uint8).ctypes.data
        stop = start + len(area)
        try:
            userfault.register(start, stop)
            pagemap = open_pagemap()
            scanner = Scanner()
            scanner.arm(pagemap, start, stop)
            area[PAGE_SIZE] = 1
            found = scanner.written(pagemap, start, stop)
        except Untracked as error:
            return str(error)
        finally:
            userfault.close()
            if pagemap >= 0:
                os.close(pagemap)
    if found.tolist() != [[start // PAGE_SIZE + 1, 1]]:
        return f"a write to one page of two was found as {found.tolist()} by this kernel ({platform.release()})"
    return None


def open_pagemap() -> int:
    """/proc/self/pagemap. Raises Untracked."""
    try:
        return os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Untracked(f"/proc/self/pagemap cannot be read: {error.strerror}") from None


def _words(error: OSError) -> str:
    """Why a tracking call failed."""
    return {
        errno.ENOSYS: f"this kernel ({platform.release()}) has no userfaultfd, or a filter (seccomp) hides it",
        errno.EPERM: "userfaultfd is not permitted here: a filter (seccomp) or a security module forbids it",
        errno.EINVAL: f"this kernel ({platform.release()}) does not write-protect asynchronously: that needs "
        f"Linux {_WRITE_PROTECTS.get(platform.machine(), '6.7')}",
        errno.ENOTTY: f"this kernel ({platform.release()}) cannot scan for written pages: that needs Linux 6.7",
        errno.ESRCH: "the process whose memory it is has ended",
    }.get(error.errno or 0, f"tracking by the kernel failed: {error.strerror}")
