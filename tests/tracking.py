"""What tests of tracking share: programs to be tracked, and filters that make a kernel look as if it could not."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from remus_ckpt.source.track import linux
from remus_ckpt.source.track.written import why_not

WHY_NOT = why_not()
needs_tracking = pytest.mark.skipif(WHY_NOT is not None, reason=f"no tracking by the kernel: {WHY_NOT}")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

TARGET_PAGES = 64
_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER, _TSYNC = 1, 1
INSTRUCTION = struct.Struct("=HBBI")
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
CALLS = linux.calls() or linux.CALLS["x86_64"]
NEEDED = "6.10" if platform.machine() == "aarch64" else "6.7"
IOCTL, _SECCOMP = {"x86_64": (16, 317), "aarch64": (29, 277)}.get(platform.machine(), (0, 0))


def filter_of(number: int, answer: int, *, argument: int | None = None) -> bytes:
    """A seccomp filter: one system call, or one with this in the lower half of its second argument, is
    answered; all others pass."""
    code = [(0x20, 0, 0, 0), (0x15, 0, 1 if argument is None else 3, number)]
    if argument is not None:
        code += [(0x20, 0, 0, 24), (0x15, 0, 1, argument)]
    code += [(0x06, 0, 0, answer), (0x06, 0, 0, ALLOW)]
    return b"".join(INSTRUCTION.pack(*row) for row in code)


def put_filter(program: bytes) -> None:
    """Put a seccomp filter on all threads of this process, for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(program, len(program))
    packed = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    assert libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.syscall(_SECCOMP, _SET_MODE_FILTER, _TSYNC, ctypes.c_void_p(ctypes.addressof(packed))) == 0


def in_fork(work: Callable[[], str]) -> str:
    """What a function returns when a fork of this process runs it; what it raised, as text."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(theirs, work().encode())
        except BaseException as error:
            os.write(theirs, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as file:
        said = file.read().decode()
    os.waitpid(pid, 0)
    return said


@pytest.fixture(scope="session")
def target_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled tracked_target.c."""
    path = tmp_path_factory.mktemp("target") / "target"
    source = Path(__file__).with_name("tracked_target.c")
    flags = ["-O2", "-march=native", "-pthread"]
    subprocess.run(["cc", *flags, "-o", str(path), str(source), "-lm"], check=True)
    return path


@pytest.fixture(scope="session")
def racing_writers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled racing_writers.c, a library."""
    path = tmp_path_factory.mktemp("racing") / "racing.so"
    source = Path(__file__).with_name("racing_writers.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-pthread", "-o", str(path), str(source)], check=True)
    return path


class Target:
    """A running tracked_target, its pidfd, and the file that it writes to."""

    def __init__(self, process: subprocess.Popen[bytes], memory: Path) -> None:
        self.process = process
        self.pid = process.pid
        self.pidfd = os.pidfd_open(process.pid)
        self.memory = memory

    def end(self) -> str:
        """Let it end. Returns what it says: "right", or what went wrong."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        said = self.process.stdout.read().decode().strip()
        return said or f"exit status {self.process.wait()}"

    def is_untouched(self) -> bool:
        """Whether nobody traces it, and its threads run or wait."""
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            try:
                status = (task / "status").read_text()
            except OSError:  # it has ended
                continue
            if "\nTracerPid:\t0\n" not in status or "\nState:\tt" in status:
                return False
        return True


def without_query(patch: pytest.MonkeyPatch) -> None:
    """As before Linux 6.11: the kernel cannot be asked for one mapping. Which call asks is no user's choice."""
    patch.setattr("remus_ckpt.source.track.spans._PROCMAP_QUERY", 0xC0686699)


@contextmanager
def running(program: Path, memory: Path, threads: str) -> Iterator[Target]:
    """A target with some threads, until the end of the block."""
    memory.write_bytes(bytes(TARGET_PAGES * 4096))
    command = [str(program), "0", str(memory), threads]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        target = Target(process, memory)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield target
        finally:
            process.kill()
            os.close(target.pidfd)


class Dying:
    """In place of `linux.ptrace`: ends this process at its n-th call, before it or after it."""

    def __init__(self, at: int, *, is_after: bool) -> None:
        self._real = linux.ptrace
        self._left = at
        self._is_after = is_after

    def __call__(self, *arguments: Any) -> int:
        self._left -= 1
        if self._left == 0 and not self._is_after:
            os.kill(os.getpid(), 9)
        result = self._real(*arguments)
        if self._left == 0:
            os.kill(os.getpid(), 9)
        return result
