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
thread then executes `syscall; ret`, and returns into its C library's signal return, which restores registers, FPU and
signal mask from the frame. An interrupted system call is then restarted. At worst, the descriptor stays open in the
process.

The frame is the one that the kernel itself writes for a signal. Source: Linux, arch/x86/kernel/signal_64.c and
fpu/signal.c; arch/x86/include/uapi/asm/sigcontext.h; ptrace(2).
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
from remus_ckpt.source.track.linux import Request

_STOP_S = 2.0
"""How long a thread may take to stop. It is one that runs, or that waits for what a signal may interrupt."""
_STEP_S = 5.0
"""How long one system call in it may take, on a machine that is busy."""
_POLL_S = 20e-6
_MAX_THREADS = 16
_RETRIES = 20
_MAX_CODE = 64 << 20
"""How much of a mapping is searched for the two pieces of code."""

_REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
_PRSTATUS = struct.Struct(f"={len(_REGISTERS)}Q")
_CONTEXT = (
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rdi", "rsi", "rbp", "rbx", "rdx", "rax", "rcx", "rsp"),
    *("rip", "eflags"),
)
"""The registers of struct sigcontext, in its order."""
_FRAME = struct.Struct("=Q QQ QiiQ 18Q 4H 4Q Q 8Q 8s")
"""return address; ucontext: flags, link, alternate stack (address, flags, padding, size), sigcontext (registers; cs,
gs, fs, ss; error, trap, old mask, cr2; address of the FPU's state; reserved), signal mask"""
_UC_FLAGS = 1 | 2 | 4
"""UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS."""
_NO_ALTSTACK = 0xFF
"""No flags of an alternate stack: the kernel leaves the one that is set."""
_RED_ZONE = 128
_USER_CS = 0x33
_NO_CALL = 0xFFFFFFFFFFFFFFFF
_ALL_SIGNALS = b"\xff" * 8
_RESTART = {(-code) & 0xFFFFFFFFFFFFFFFF for code in (512, 513, 514, 516)}
"""What rax holds in an interrupted call: ERESTARTSYS, -NOINTR, -NOHAND, _RESTARTBLOCK."""
_EINTR = (-4) & 0xFFFFFFFFFFFFFFFF
_ENDED_BY_A_STOP = frozenset({65, 128, 208, 220, 232, 281, 333, 441})
"""Calls that the kernel does not take up again after a stop, but that can be made again with nothing lost: semop,
rt_sigtimedwait, io_getevents, semtimedop, epoll_wait, epoll_pwait, io_pgetevents, epoll_pwait2."""
_SYSCALL_BYTES = 2

_XSTATE_ROOM = 1 << 16
_FX_SW = struct.Struct("=IIQI")  # magic, size with the second magic, features, size
_FX_SW_AT = 464
_FX_FEATURES = struct.Struct("=Q")
_MAGIC1, _MAGIC2 = 0x46505853, struct.pack("=I", 0x46505845)
_AMX_AT, _AMX_FEATURES = 2752, 3 << 17
"""Where the tiles begin in the FPU's state. A thread that has not asked for them has no room for them in a frame."""

_SYSCALL_RET = b"\x0f\x05\xc3"
_SIGNAL_RETURNS = (b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05", b"\xb8\x0f\x00\x00\x00\x0f\x05")
"""mov $15, %rax (%eax); syscall: rt_sigreturn, which whatever handles signals has."""
_STACK_ROOM = 32 << 10


class _Again(Exception):
    """Another thread or another moment may work; the message says why this one did not."""


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
    if platform.machine() != "x86_64" or linux.calls() is None:
        raise Untracked(f"writes of another process can be tracked on x86-64 only, not on {platform.machine()}")
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
            except _Again as error:
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
            self._stop()
            return self._inject(pidfd)
        finally:
            # The thread is stopped or gone; if it is neither, it is detached when our own thread ends.
            with suppress(ProcessLookupError):
                linux.ptrace(Request.DETACH, self._thread)

    def _inject(self, pidfd: int) -> int:
        before = linux.get_registers(self._thread, linux.NT_PRSTATUS, 1024)
        if len(before) != _PRSTATUS.size:
            raise Untracked(f"process {self._pid} is a 32-bit process")
        registers = dict(zip(_REGISTERS, _PRSTATUS.unpack(before), strict=True))
        if registers["cs"] != _USER_CS:
            raise _Again(f"thread {self._thread} of process {self._pid} runs 32-bit code")
        numbers = linux.calls()
        assert numbers is not None
        self._check_seccomp((numbers.userfaultfd, numbers.close, numbers.rt_sigreturn), numbers.audit)
        self._check_rseq(registers["rip"])
        mask = linux.get_signal_mask(self._thread)
        code = next(self._code((_SYSCALL_RET,)), None)
        back = next(self._code(_SIGNAL_RETURNS), None)
        if code is None or back is None:
            raise Untracked(f"process {self._pid} has no code that returns from a signal: nothing would put it back")
        if self._is_to_be_called_again(registers):
            registers |= {"rax": registers["orig_rax"], "rip": registers["rip"] - _SYSCALL_BYTES, "orig_rax": _NO_CALL}
            before = _PRSTATUS.pack(*(registers[name] for name in _REGISTERS))
        stack = self._lay_frame(registers, mask, back)
        # From here on the thread gets back to its work without us.
        call = dict(registers, rip=code, rsp=stack, orig_rax=_NO_CALL)
        try:
            fd = self._call(call | {"rax": numbers.userfaultfd, "rdi": linux.USERFAULTFD_FLAGS}, block_signals=True)
            if fd < 0:
                raise Untracked(f"process {self._pid} was refused a userfaultfd: {os.strerror(-fd)}")
            try:
                return linux.pidfd_getfd(pidfd, fd)
            except OSError as error:
                raise Untracked(f"the userfaultfd of process {self._pid} cannot be fetched: {error.strerror}") from None
            finally:
                self._call(call | {"rax": numbers.close, "rdi": fd})
        finally:
            # In this order: the frame would put back both, until the registers end its reign. Being detached wakes the
            # thread as a signal does, so that the kernel takes an interrupted call up again, its timeout as it was.
            linux.set_signal_mask(self._thread, mask)
            linux.set_registers(self._thread, linux.NT_PRSTATUS, before)

    def _is_to_be_called_again(self, registers: dict[str, int]) -> bool:
        """Whether the thread's system call would report the interruption, and we caused it: no signal is pending."""
        if registers["orig_rax"] not in _ENDED_BY_A_STOP or registers["rax"] != _EINTR:
            return False
        status = Path(f"/proc/{self._pid}/task/{self._thread}/status").read_text(errors="replace")
        words = dict(line.partition(":\t")[::2] for line in status.splitlines())
        return not (int(words["SigPnd"], 16) | int(words["ShdPnd"], 16)) & ~int(words["SigBlk"], 16)

    def _call(self, registers: dict[str, int], *, block_signals: bool = False) -> int:
        """Make the thread execute one system call; returns the call's result."""
        packed = _PRSTATUS.pack(*(registers[name] for name in _REGISTERS))
        linux.set_registers(self._thread, linux.NT_PRSTATUS, packed)
        if block_signals:
            # A handler would run in between. Not before: the frame has the mask, and is in force only now.
            linux.set_signal_mask(self._thread, _ALL_SIGNALS)
        deadline = time.monotonic() + _STEP_S
        for _ in ("entry", "exit"):
            linux.ptrace(Request.SYSCALL, self._thread)
            self._wait(deadline, is_event=False)
        after = _PRSTATUS.unpack(linux.get_registers(self._thread, linux.NT_PRSTATUS, 1024))
        result: int = after[_REGISTERS.index("rax")]
        return result - (1 << 64) if result >> 63 else result

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

    def _check_rseq(self, rip: int) -> None:
        """Raise _Again in a restartable sequence: it would not be restarted if its thread went another way."""
        try:
            address = linux.rseq_address(self._thread)
        except OSError:
            return
        if not address:
            return
        (descriptor,) = struct.unpack("=Q", self._read(address + 8, 8))
        if descriptor:
            _, _, start, length = struct.unpack("=IIQQ", self._read(descriptor, 24))
            if 0 <= rip - start < length:
                raise _Again(f"thread {self._thread} of process {self._pid} is in a restartable sequence")

    def _code(self, wanted: Sequence[bytes]) -> Iterator[int]:
        """The addresses of some instruction sequences."""
        for mapping in self._maps:
            if mapping.flags[0] != "r" or mapping.flags[2] != "x" or mapping.name == "[vsyscall]":
                continue
            code = self._read(mapping.start, min(mapping.stop - mapping.start, _MAX_CODE))
            for bytes_ in wanted:
                if (at := code.find(bytes_)) >= 0:
                    yield mapping.start + at

    def _lay_frame(self, registers: dict[str, int], mask: bytes, back: int) -> int:
        """Write a signal frame below the thread's stack that restores its state. Returns the frame's address."""
        stack = registers["rsp"]
        self._check_stack(stack)
        was = dict(registers)
        if registers["orig_rax"] >> 63 == 0 and registers["rax"] in _RESTART:
            was["rax"] = registers["orig_rax"]
            was["rip"] -= _SYSCALL_BYTES
        fpu = self._fpu()
        at_fpu = (stack - _RED_ZONE - len(fpu)) // 64 * 64
        at_frame = (at_fpu - _FRAME.size) // 16 * 16 - 8
        if stack - at_frame > _STACK_ROOM // 2:
            raise Untracked(f"the FPU state of process {self._pid} takes {len(fpu)} bytes: too much for a stack")
        segments = (
            registers["cs"] & 0xFFFF,
            registers["gs"] & 0xFFFF,
            registers["fs"] & 0xFFFF,
            registers["ss"] & 0xFFFF,
        )
        frame = _FRAME.pack(
            back,
            *(_UC_FLAGS, 0),
            *(0, _NO_ALTSTACK, 0, 0),
            *(was[name] for name in _CONTEXT),
            *segments,
            *(0, 0, 0, 0),
            at_fpu,
            *[0] * 8,
            mask,
        )
        self._write(at_frame, frame + bytes(at_fpu - at_frame - len(frame)) + fpu)
        return at_frame

    def _fpu(self) -> bytes:
        """The FPU's state, as a signal frame holds it."""
        state = bytearray(linux.get_registers(self._thread, linux.NT_X86_XSTATE, _XSTATE_ROOM))
        (features,) = _FX_FEATURES.unpack_from(state, _FX_SW_AT)
        if len(state) > _AMX_AT:
            if features & _AMX_FEATURES:
                raise Untracked(f"process {self._pid} uses AMX tiles, which are not put back")
            del state[_AMX_AT:]
        _FX_SW.pack_into(state, _FX_SW_AT, _MAGIC1, len(state) + len(_MAGIC2), features, len(state))
        return bytes(state) + _MAGIC2

    def _check_stack(self, stack: int) -> None:
        """Raise _Again if what lies below its stack pointer may be in use.

        A goroutine's stack, for one, is in the heap and may end right there. The stack of a C library's thread is its
        own mapping, followed by one that cannot be touched; the first thread's is the kernel's.
        """
        for below, mapping in zip((None, *self._maps), self._maps, strict=False):
            if mapping.start <= stack - _STACK_ROOM and stack <= mapping.stop and mapping.flags[:2] == "rw":
                is_guarded = below is not None and below.flags[:3] == "---" and below.stop == mapping.start
                if mapping.name == "[stack]" or is_guarded:
                    return
        raise _Again(f"thread {self._thread} of process {self._pid} has a stack that may end below its last byte")

    def _read(self, address: int, size: int) -> bytes:
        with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as memory:
            return os.pread(memory.fileno(), size, address)

    def _write(self, address: int, data: bytes) -> None:
        with open(f"/proc/{self._pid}/mem", "r+b", buffering=0) as memory:
            if os.pwrite(memory.fileno(), data, address) != len(data):
                raise Untracked(f"the stack of process {self._pid} cannot be written")
