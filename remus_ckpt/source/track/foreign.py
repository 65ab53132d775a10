"""Gets a userfaultfd over the memory of another process, which runs on unmodified.

    we                                      one thread of the process
    PTRACE_SEIZE, INTERRUPT                 stops
    write a signal frame below its stack
    set registers            ┐              userfaultfd()          opens descriptor n
    block signals            │ from here    stops
    pidfd_getfd(n)           │ on, it gets  close(n)
    set registers            │ back by      stops
    mask, registers as before┘ itself
    DETACH                                  runs on; a blocking call continues to wait, for the rest of its time

Only this thread stops, for a millisecond; the others run on. If we die at any step, the kernel detaches the tracer: the
thread then executes a system call and a return, and gets into its C library's signal return, which restores registers,
FPU and signal mask from the frame. An interrupted system call is then restarted. At worst, the descriptor stays open in
the process.

The frame is the one that the kernel itself writes for a signal: `x86_64` and `arm64` make it. Source: ptrace(2).
"""

from __future__ import annotations

import os
import platform
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from remus_ckpt.errors import Untracked
from remus_ckpt.source.track import linux, seccomp
from remus_ckpt.source.track.arm64 import Arm64
from remus_ckpt.source.track.context import Again, Context
from remus_ckpt.source.track.linux import Request
from remus_ckpt.source.track.x86_64 import X86

_STOP_S = 2.0
"""How long a thread may take to stop. It is one that runs, or that waits for what a signal may interrupt."""
_STEP_S = 5.0
"""How long one system call in it may take, on a machine that is busy."""
_POLL_S = 20e-6
_MAX_THREADS = 16
_RETRIES = 20
_MAX_CODE = 64 << 20
"""How much of a mapping is searched for the two pieces of code."""

_ALL_SIGNALS = b"\xff" * 8
_STACK_ROOM = 32 << 10

_CONTEXTS: dict[str, type[Context]] = {"x86_64": X86, "aarch64": Arm64}
"""By `platform.machine()`."""


class Stopped(Untracked):
    """The process is stopped: it cannot make the call now."""


def userfaultfd_of(pid: int, pidfd: int) -> int:
    """A userfaultfd over the memory of process `pid`, before its handshake. Only we hold the descriptor.

    pidfd: of the process, which must be the one that has the pid now
    Raises Untracked, with the reason, if that is impossible, Stopped if it may be possible later; in both cases the
    process runs on as before.
    """
    _check_process(pid)
    found: list[int] = []
    failed: list[Exception] = []

    def trace() -> None:
        # A separate thread: no signal handler interrupts it, and whatever it leaves attached is detached when it ends.
        try:
            found.append(_trace(pid, pidfd))
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=trace, name=f"userfaultfd of {pid}")
    thread.start()
    try:
        thread.join()
    except BaseException:
        thread.join()
        for fd in found:
            os.close(fd)
        raise
    if failed:
        raise failed[0]
    return found[0]


def _check_process(pid: int) -> None:
    """Raise Untracked if tracing is known to fail, or to harm the process."""
    if platform.machine() not in _CONTEXTS or linux.calls() is None:
        raise Untracked(
            f"writes of another process can be tracked on x86-64 and arm64 only, not on {platform.machine()}"
        )
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        raise Untracked(f"there is no process {pid}") from None
    status = dict(line.partition(":\t")[::2] for line in lines)
    if (tracer := status.get("TracerPid", "0")) != "0":
        raise Untracked(f"process {pid} is traced by process {tracer}")
    if status.get("Seccomp", "0") == "1":
        raise Untracked(f"process {pid} is in seccomp's strict mode")
    # A shadow stack would reject the return into the frame.
    if "shstk" in status.get("x86_Thread_features", ""):
        raise Untracked(f"process {pid} has a shadow stack, which forbids placing a frame on its stack")


def _trace(pid: int, pidfd: int) -> int:
    why = f"process {pid} has no thread that could be stopped"
    for attempt in range(_RETRIES):
        if attempt:
            time.sleep(0.001 * attempt)
        maps = _read_maps(pid)
        if (threads := _threads(pid)) is None:
            raise Stopped(f"process {pid} is stopped")
        for thread in threads[:_MAX_THREADS]:
            try:
                return _Tracee(pid, thread, maps).userfaultfd(pidfd)
            except Again as error:
                why = str(error)
            except ProcessLookupError:  # it has ended, or run where it had to be stopped
                why = f"thread {thread} of process {pid} has ended"
    raise Untracked(why)


class _Mapping(NamedTuple):
    start: int
    stop: int
    flags: str
    name: str


def _read_maps(pid: int) -> list[_Mapping]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    except PermissionError:
        raise Untracked(f"process {pid} may not be traced: run as its user or as root") from None
    except OSError:
        raise Untracked(f"there is no process {pid}") from None
    maps = []
    for line in lines:
        area, flags, _, _, _, *name = line.split(maxsplit=5)
        start, _, stop = area.partition("-")
        maps.append(_Mapping(int(start, 16), int(stop, 16), flags, name[0] if name else ""))
    return maps


def _threads(pid: int) -> list[int] | None:
    """Its threads, first those that wait in a system call: they stop at once, and their stop delays no computation.

    None if one is stopped.
    """
    waiting, others = [], []
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in map(int, os.listdir(f"/proc/{pid}/task")):
            with suppress(OSError):
                state = Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()[0]
                if state == "S":
                    waiting.append(thread)
                elif state == "R":
                    others.append(thread)
                elif state == "T":
                    return None
    return sorted(waiting) + sorted(others)


class _Tracee:
    """One thread, traced."""

    def __init__(self, pid: int, thread: int, maps: Sequence[_Mapping]) -> None:
        self._pid = pid
        self._thread = thread
        self._maps = maps

    def userfaultfd(self, pidfd: int) -> int:
        try:
            linux.ptrace(Request.SEIZE, self._thread, 0, linux.TRACESYSGOOD)
        except PermissionError:
            raise Untracked(
                f"process {self._pid} may not be traced: only its user or root may, if no debugger is attached "
                "and no security module (Yama) forbids it"
            ) from None
        try:
            self._context = _CONTEXTS[platform.machine()](self._pid, self._thread, self._read)
            self._stop()
            return self._inject(pidfd)
        finally:
            # The thread is stopped or gone; if it is neither, it is detached when our own thread ends.
            with suppress(ProcessLookupError):
                linux.ptrace(Request.DETACH, self._thread)

    def _inject(self, pidfd: int) -> int:
        context = self._context
        context.load()
        numbers = linux.calls()
        assert numbers is not None
        to_be_made = [numbers.userfaultfd, numbers.close, numbers.rt_sigreturn]
        if context.first_argument is not None:
            to_be_made.append(numbers.getpid)
        self._check_seccomp(to_be_made, numbers.audit)
        self._check_rseq(context.pc)
        mask = linux.get_signal_mask(self._thread)
        # Not where it stopped itself: arm64's kernel would take that for the restart of its own call.
        code = next((at for at in self._code((context.code,)) if at != context.pc), None)
        back = next(self._code(context.signal_returns), None)
        if code is None or back is None:
            raise Untracked(f"process {self._pid} has no code that returns from a signal: nothing would put it back")
        if context.is_ended_by_stop() and not self._has_signals():
            context.call_again()
        frame = self._lay_frame(mask, back)
        # From here on the thread gets back to its work without us.

        def call(number: int, argument: int, *, block_signals: bool = False) -> int:
            context.call(code, frame, back, number, argument)
            if block_signals:
                # A handler would run in between. Not before: the frame has the mask, and is in force only now.
                linux.set_signal_mask(self._thread, _ALL_SIGNALS)
            self._pass_call()
            return context.result()

        try:
            fd = call(numbers.userfaultfd, linux.USERFAULTFD_FLAGS, block_signals=True)
            try:
                if fd < 0:
                    raise Untracked(f"process {self._pid} was refused a userfaultfd: {os.strerror(-fd)}")
                try:
                    return linux.pidfd_getfd(pidfd, fd)
                except OSError as error:
                    raise Untracked(
                        f"the userfaultfd of process {self._pid} cannot be fetched: {error.strerror}"
                    ) from None
                finally:
                    call(numbers.close, fd)
            finally:
                if context.first_argument is not None:
                    call(numbers.getpid, context.first_argument)
        finally:
            # In this order: the frame would put back both, until the registers end its reign.
            linux.set_signal_mask(self._thread, mask)
            context.put_back()

    def _has_signals(self) -> bool:
        """Whether a signal is pending that it does not block."""
        status = Path(f"/proc/{self._pid}/task/{self._thread}/status").read_text(errors="replace")
        words = dict(line.partition(":\t")[::2] for line in status.splitlines())
        return bool((int(words["SigPnd"], 16) | int(words["ShdPnd"], 16)) & ~int(words["SigBlk"], 16))

    def _pass_call(self) -> None:
        """Let the thread make its next system call, and stop behind it."""
        deadline = time.monotonic() + _STEP_S
        for _ in ("entry", "exit"):
            linux.ptrace(Request.SYSCALL, self._thread)
            self._wait(deadline, is_event=False)

    def _stop(self) -> None:
        linux.ptrace(Request.INTERRUPT, self._thread)
        number = self._wait(time.monotonic() + _STOP_S, is_event=True)
        if number != 5:
            raise Stopped(f"process {self._pid} is stopped by signal {number}")

    def _wait(self, deadline: float, *, is_event: bool) -> int:
        """Wait until the thread stops, interrupted or at a system call. Returns the signal of the stop."""
        while True:
            try:
                thread, status = os.waitpid(self._thread, linux.WALL | os.WNOHANG)
            except ChildProcessError:
                raise ProcessLookupError from None
            if thread == 0:
                if time.monotonic() > deadline:
                    raise Untracked(f"thread {self._thread} of process {self._pid} does not stop")
                time.sleep(_POLL_S)
                continue
            if not os.WIFSTOPPED(status):
                raise ProcessLookupError
            number = status >> 8 & 0xFF
            if status >> 16 == linux.EVENT_STOP:
                if is_event:
                    return number
                # Someone else stops the process: the stop takes effect once we have detached.
                linux.ptrace(Request.SYSCALL, self._thread)
            elif number == 5 | 0x80:
                if not is_event:
                    return number
                linux.ptrace(Request.CONT, self._thread)
            else:  # a signal is about to be delivered
                linux.ptrace(Request.CONT if is_event else Request.SYSCALL, self._thread, 0, number)

    def _check_seccomp(self, numbers: Sequence[int], audit: int) -> None:
        """Raise Untracked if a filter would not let it make these calls, or cannot be read."""
        path = Path(f"/proc/{self._pid}/task/{self._thread}/status")
        if "\nSeccomp:\t0" in path.read_text(errors="replace"):
            return
        at = 0
        while True:
            try:
                program = linux.seccomp_filter(self._thread, at)
            except OSError as error:
                raise Untracked(
                    f"process {self._pid} has seccomp filters that cannot be read ({error.strerror}): one may kill it "
                    "for a call that it does not know; root can read them"
                ) from None
            if program is None:
                return
            for number in numbers:
                if not seccomp.allows(program, audit, number):
                    raise Untracked(f"a seccomp filter of process {self._pid} forbids system call {number}")
            at += 1

    def _check_rseq(self, pc: int) -> None:
        """Raise Again in a restartable sequence: it would not be restarted if its thread went another way."""
        try:
            address = linux.rseq_address(self._thread)
        except OSError:
            return
        if not address:
            return
        (descriptor,) = struct.unpack("=Q", self._read(address + 8, 8))
        if descriptor:
            _, _, start, length = struct.unpack("=IIQQ", self._read(descriptor, 24))
            if 0 <= pc - start < length:
                raise Again(f"thread {self._thread} of process {self._pid} is in a restartable sequence")

    def _code(self, wanted: Sequence[bytes]) -> Iterator[int]:
        """The addresses of some instruction sequences."""
        for mapping in self._maps:
            if mapping.flags[0] != "r" or mapping.flags[2] != "x" or mapping.name == "[vsyscall]":
                continue
            code = self._read(mapping.start, min(mapping.stop - mapping.start, _MAX_CODE))
            for bytes_ in wanted:
                at = code.find(bytes_)
                while at >= 0:
                    yield mapping.start + at
                    at = code.find(bytes_, at + 1)

    def _lay_frame(self, mask: bytes, back: int) -> int:
        """Write a signal frame below the thread's stack that restores its state. Returns the frame's address."""
        stack = self._context.sp
        self._check_stack(stack)
        at, frame = self._context.frame(mask, back)
        if stack - at > _STACK_ROOM // 2:
            raise Untracked(f"the FPU state of process {self._pid} takes {stack - at} bytes: too much for a stack")
        self._write(at, frame)
        return at

    def _check_stack(self, stack: int) -> None:
        """Raise Again if what lies below its stack pointer may be in use.

        A goroutine's stack, for one, is in the heap and may end right there. The stack of a C library's thread is its
        own mapping, followed by one that cannot be touched; the first thread's is the kernel's.
        """
        for below, mapping in zip((None, *self._maps), self._maps, strict=False):
            if mapping.start <= stack - _STACK_ROOM and stack <= mapping.stop and mapping.flags[:2] == "rw":
                is_guarded = below is not None and below.flags[:3] == "---" and below.stop == mapping.start
                if mapping.name == "[stack]" or is_guarded:
                    return
        raise Again(f"thread {self._thread} of process {self._pid} has a stack that may end below its last byte")

    def _read(self, address: int, size: int) -> bytes:
        with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as memory:
            try:
                return os.pread(memory.fileno(), size, address)
            except OSError as error:
                raise Again(f"memory of process {self._pid} at {address:#x} cannot be read: {error.strerror}") from None

    def _write(self, address: int, data: bytes) -> None:
        with open(f"/proc/{self._pid}/mem", "r+b", buffering=0) as memory:
            if os.pwrite(memory.fileno(), data, address) != len(data):
                raise Untracked(f"the stack of process {self._pid} cannot be written")
