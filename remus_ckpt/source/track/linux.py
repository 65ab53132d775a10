"""The kernel's interfaces for tracking writes: every number and layout, and thin calls.

They are called by ctypes and fcntl, which release the GIL (fcntl for arguments of up to 1,024 bytes, as all here are).
A C extension would save a microsecond of a scan that takes 400.

Source: Linux, include/uapi/linux/userfaultfd.h, fs.h, ptrace.h, elf.h; arch/*/include/uapi/asm/unistd.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple

from remus_ckpt.flag import Descriptor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

# System calls


class Calls(NamedTuple):
    """The numbers of system calls on one machine. audit: AUDIT_ARCH_*, as seccomp filters see it"""

    userfaultfd: int
    pidfd_getfd: int
    close: int
    rt_sigreturn: int
    getpid: int
    audit: int


CALLS = {
    "x86_64": Calls(323, 438, 3, 15, 39, 0xC000003E),
    "aarch64": Calls(282, 438, 57, 139, 172, 0xC00000B7),
}
"""By `platform.machine()`."""


def calls() -> Calls | None:
    """The numbers for this machine; None if unknown."""
    return CALLS.get(platform.machine()) if ctypes.sizeof(ctypes.c_void_p) == 8 else None


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


# userfaultfd(2)

USER_MODE_ONLY = 1
USERFAULTFD_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | USER_MODE_ONLY
"""If vm.unprivileged_userfaultfd is 0, only root may omit USER_MODE_ONLY. Asynchronous protection needs no handler, so
writes by the kernel on behalf of system calls are not affected."""

UFFD_API = 0xAA
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
_API = struct.Struct("=3Q")  # api, features, ioctls
_REGISTER = struct.Struct("=4Q")  # start, length, mode, ioctls
_MODE_WP = 2


class Feature(IntFlag):
    """The UFFD_FEATURE_* flags that we request."""

    PAGEFAULT_FLAG_WP = 1 << 0
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    WP_ASYNC = 1 << 15


FEATURES = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED | Feature.WP_ASYNC


def userfaultfd() -> Descriptor:
    """A userfaultfd over this process's memory, before its handshake. Raises OSError."""
    numbers = calls()
    if numbers is None:
        raise OSError(errno.ENOSYS, f"the system calls of {platform.machine()} are not known")
    opening = map(_libc.syscall, (ctypes.c_long(numbers.userfaultfd),), (ctypes.c_long(USERFAULTFD_FLAGS),))
    try:
        return next(map(Descriptor, opening, ("r+",)))
    except ValueError:  # no descriptor: it is -1
        _check(-1)
        raise


def handshake(fd: int) -> None:
    """Request asynchronous write-protection. Raises OSError: EINVAL if the kernel does not have it."""
    fcntl.ioctl(fd, UFFDIO_API, bytearray(_API.pack(UFFD_API, FEATURES, 0)))


def register(fd: int, start: int, stop: int) -> None:
    """Register a range for write-protection. Raises OSError: EBUSY if another userfaultfd has some of it."""
    fcntl.ioctl(fd, UFFDIO_REGISTER, bytearray(_REGISTER.pack(start, stop - start, _MODE_WP, 0)))


# PAGEMAP_SCAN on /proc/PID/pagemap

PAGEMAP_SCAN = 0xC0606610
_SCAN = struct.Struct("=12Q")
"""size, flags, start, end, walk_end, vec, vec_len, max_pages, and four masks of categories: inverted, all, any, told"""
_WALK_END = struct.Struct("=Q")
_WALK_END_AT = 32
_WP_MATCHING, _CHECK_WPASYNC = 1, 2
_PAGE_IS_WRITTEN = 2

REGION_WORDS = 3
"""struct page_region: start, end, categories; each 64 bits."""


def pagemap_scan(
    pagemap: int, start: int, stop: int, vector: int, length: int, *, protect: bool = True
) -> tuple[int, int]:
    """Find the pages written in a range, and protect them again in the same step.

    vector, length: address of an array of struct page_region and how many it holds; 0 and 0 to protect only
    protect: False only finds them
    Returns (regions filled in, address up to which the range was walked).
    Raises OSError: EPERM if some of the range is mapped but not registered. Unmapped addresses are skipped.
    """
    flags = (_WP_MATCHING if protect else 0) | _CHECK_WPASYNC
    written = _PAGE_IS_WRITTEN
    argument = bytearray(_SCAN.pack(_SCAN.size, flags, start, stop, 0, vector, length, 0, 0, written, 0, written))
    regions = fcntl.ioctl(pagemap, PAGEMAP_SCAN, argument)
    return regions, _WALK_END.unpack_from(argument, _WALK_END_AT)[0]


# PROCMAP_QUERY on /proc/PID/maps, from Linux 6.11 on

_PROCMAP_QUERY = 0xC0686611
_QUERY = struct.Struct("=9Q4I2Q")
"""size, flags, address; start, stop, flags, page size, offset, inode; device's major and minor, two sizes of names; two
addresses for names"""
_SHARED, _NEXT, _FILE_BACKED = 0x08, 0x10, 0x20


class Mapping(NamedTuple):
    """A shared mapping of a file. stop: after its last byte; offset: in the file; device: major and minor"""

    start: int
    stop: int
    offset: int
    device: tuple[int, int]
    inode: int


def shared_mappings(maps: int) -> list[Mapping] | None:
    """The shared mappings of files in a process, by its opened /proc/PID/maps; None if the kernel cannot be asked.

    Reading that file, which lists every mapping as text, takes six times as long for 73 mappings. Raises OSError.
    """
    found: list[Mapping] = []
    at = 0
    while True:
        argument = bytearray(_QUERY.pack(_QUERY.size, _SHARED | _NEXT | _FILE_BACKED, at, *[0] * 12))
        try:
            fcntl.ioctl(maps, _PROCMAP_QUERY, argument)
        except FileNotFoundError:
            return found
        except OSError as error:
            if error.errno == errno.ENOTTY:
                return None
            raise
        _, _, _, start, at, _, _, offset, inode, major, minor, *_ = _QUERY.unpack(argument)
        found.append(Mapping(start, at, offset, (major, minor), inode))


_MS_ASYNC = 1


def is_mapped(start: int, stop: int) -> bool:
    """Whether all of a range of this process's addresses is mapped.

    msync(MS_ASYNC) only walks the mappings, and returns ENOMEM at a gap.
    """
    if _libc.msync(start, stop - start, _MS_ASYNC) == 0:
        return True
    if ctypes.get_errno() == errno.ENOMEM:
        return False
    _check(-1)
    raise AssertionError


# inotify(7)

_IN_MODIFY = 0x2


def watch_writes(fd: int) -> int:
    """A descriptor that becomes readable when a system call has written to an open file.

    write(), truncate(), fallocate(): everything but writes through mappings. Raises OSError.
    """
    watch = _check(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
    try:
        _check(_libc.inotify_add_watch(watch, f"/proc/self/fd/{fd}".encode(), _IN_MODIFY))
    except BaseException:
        os.close(watch)
        raise
    return watch


HUGETLBFS = 0x958458F6


def file_system(fd: int) -> int:
    """The magic number of the file system that an open file is on. Raises OSError."""
    status = ctypes.create_string_buffer(256)
    _check(_libc.fstatfs(fd, status))
    return int.from_bytes(status.raw[:4], "little")


# ptrace(2)


class Request(IntEnum):
    """The PTRACE_* requests that we use."""

    CONT = 7
    DETACH = 17
    SYSCALL = 24
    GETREGSET = 0x4204
    SETREGSET = 0x4205
    SEIZE = 0x4206
    INTERRUPT = 0x4207
    GETSIGMASK = 0x420A
    SETSIGMASK = 0x420B
    SECCOMP_GET_FILTER = 0x420C
    GET_RSEQ_CONFIGURATION = 0x420F


TRACESYSGOOD = 1
EVENT_STOP = 128
NT_PRSTATUS, NT_PRFPREG = 1, 2
NT_X86_XSTATE = 0x202
NT_ARM_SYSTEM_CALL, NT_ARM_SVE, NT_ARM_SSVE, NT_ARM_GCS = 0x404, 0x405, 0x40B, 0x410
WALL = 0x40000000
"""__WALL of waitpid: threads too."""


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def ptrace(request: Request, thread: int, address: int = 0, data: int = 0) -> int:
    """One request. Raises OSError."""
    return _check(_libc.ptrace(request, thread, address, data))


def get_registers(thread: int, kind: int, room: int) -> bytes:
    """A set of registers of a stopped tracee, of at most `room` bytes. Raises OSError."""
    buffer = ctypes.create_string_buffer(room)
    vector = _IoVec(ctypes.addressof(buffer), room)
    ptrace(Request.GETREGSET, thread, kind, ctypes.addressof(vector))
    return buffer.raw[: vector.length]


def set_registers(thread: int, kind: int, registers: bytes) -> None:
    """Set them. Raises OSError."""
    buffer = ctypes.create_string_buffer(registers, len(registers))
    vector = _IoVec(ctypes.addressof(buffer), len(registers))
    ptrace(Request.SETREGSET, thread, kind, ctypes.addressof(vector))


NO_ALTSTACK = 0xFF
"""No flags of an alternate stack: rt_sigreturn leaves the one that is set."""
_SIGSET_BYTES = 8


def get_signal_mask(thread: int) -> bytes:
    """The signals that a stopped tracee blocks, as the kernel's sigset_t."""
    buffer = ctypes.create_string_buffer(_SIGSET_BYTES)
    ptrace(Request.GETSIGMASK, thread, _SIGSET_BYTES, ctypes.addressof(buffer))
    return buffer.raw


def set_signal_mask(thread: int, mask: bytes) -> None:
    """Set them."""
    buffer = ctypes.create_string_buffer(mask, _SIGSET_BYTES)
    ptrace(Request.SETSIGMASK, thread, _SIGSET_BYTES, ctypes.addressof(buffer))


_RSEQ = struct.Struct("=Q4I")  # address, size, signature, flags, pad


def rseq_address(thread: int) -> int:
    """Where a stopped tracee has its struct rseq; 0 if it has none. Raises OSError (kernels before 5.13)."""
    buffer = ctypes.create_string_buffer(_RSEQ.size)
    ptrace(Request.GET_RSEQ_CONFIGURATION, thread, _RSEQ.size, ctypes.addressof(buffer))
    address: int = _RSEQ.unpack(buffer.raw)[0]
    return address


def seccomp_filter(thread: int, number: int) -> bytes | None:
    """A seccomp filter of a stopped tracee, as instructions of 8 bytes; None after the last. Raises OSError."""
    try:
        length = ptrace(Request.SECCOMP_GET_FILTER, thread, number, 0)
    except FileNotFoundError:
        return None
    buffer = ctypes.create_string_buffer(length * 8)
    ptrace(Request.SECCOMP_GET_FILTER, thread, number, ctypes.addressof(buffer))
    return buffer.raw


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A duplicate of a descriptor of another process. Raises OSError."""
    numbers = calls()
    assert numbers is not None
    return _check(
        _libc.syscall(ctypes.c_long(numbers.pidfd_getfd), ctypes.c_long(pidfd), ctypes.c_long(fd), ctypes.c_long(0))
    )
