"""What arm64 has in a thread's registers and in a signal frame.

A stop inside a system call shows the registers as they have to be when the call is made again, not what it returned,
which says whether and how that happens: the call's number tells. For this restart the kernel keeps the first argument
of the last call, where no tracer can write it: so the thread makes one more call that has it.

Source: Linux, arch/arm64/kernel/signal.c, ptrace.c, syscall.c; arch/arm64/include/uapi/asm/sigcontext.h, ptrace.h.
"""

from __future__ import annotations

import struct

from remus_ckpt.errors import Untracked
from remus_ckpt.source.track import linux
from remus_ckpt.source.track.context import Again, Context, Read, signed, unsigned

_PRSTATUS = struct.Struct("=34Q")  # x0 to x30, sp, pc, pstate
_X7, _X8, _LR, _SP, _PC, _PSTATE = 7, 8, 30, 31, 32, 33
_SYSTEM_CALL = struct.Struct("=I")
_NO_CALL = 0xFFFFFFFF
_BTYPE = 3 << 10
"""In pstate: the instruction before was an indirect branch, and the next one must be a landing pad."""
_SVC = b"\x01\x00\x00\xd4"
_SVC_BYTES = 4
_EINTR = unsigned(-4)

_FRAME = struct.Struct("=128x QQ QiiQ 8s 120x 8x Q 34Q 8x")
"""siginfo; ucontext: flags, link, alternate stack (address, flags, padding, size), signal mask; sigcontext: fault
address, registers. Records follow, each a magic, its size, and the rest."""
_RECORD = struct.Struct("=II")
_RECORDS_ROOM = 4096
_FPSIMD_MAGIC, _FPSIMD = 0x46508001, struct.Struct("=512s8s8x")  # v0 to v31; fpsr, fpcr
_SVE_MAGIC, _SVE_CONTEXT = 0x53564501, struct.Struct("=H6x")  # bytes in a vector
_SVE_HEADER = struct.Struct("=IIHHHH")  # size, room; bytes in a vector, at most; flags
_SVE_ROOM = 1 << 15
_HAS_VECTORS = 1
_GCS = struct.Struct("=3Q")  # what is enabled, what is locked, its pointer

_FUTEX = 98
_CLOCK_NANOSLEEP = 115
_ERESTARTSYS, _ERESTARTNOINTR, _ERESTARTNOHAND, _ERESTART_RESTARTBLOCK = 512, 513, 514, 516
_RESTARTS = {
    **dict.fromkeys((72, 73, 133, 188, 189), _ERESTARTNOHAND),  # pselect6, ppoll, rt_sigsuspend, msgrcv, msgsnd
    **dict.fromkeys((101, _CLOCK_NANOSLEEP), _ERESTART_RESTARTBLOCK),  # nanosleep
}
"""How the kernel takes up a call: other than by ERESTARTSYS."""
_ENDED_BY_A_STOP = frozenset({4, 22, 137, 192, 193, 292, 441})
"""Calls that the kernel does not take up again after a stop, but that can be made again with nothing lost:
io_getevents, epoll_pwait, rt_sigtimedwait, semtimedop, semop, io_pgetevents, epoll_pwait2."""


class Arm64(Context):
    """A thread of 64 bits.

    waits_in: what the kernel said right before the stop, of the system call that it waits in
    """

    code = _SVC + b"\xc0\x03\x5f\xd6"  # svc #0; ret
    signal_returns = (b"\x68\x11\x80\xd2" + _SVC, b"\x68\x11\x80\x52" + _SVC)
    """mov x8, #139 (w8); svc #0."""

    def __init__(self, pid: int, thread: int, read: Read) -> None:
        super().__init__(pid, thread, read)
        # Right before the stop: the call's first argument is not to be had afterwards.
        try:
            with open(f"/proc/{thread}/syscall", "rb", buffering=0) as file:
                self.waits_in = file.read()
        except OSError:
            self.waits_in = b""

    def _waited_in(self, number: int) -> int | None:
        """The first argument of the system call in which it waited, if it was this one."""
        words = self.waits_in.split()
        return int(words[1], 0) if len(words) == 9 and int(words[0]) == number else None

    def load(self) -> None:
        packed = linux.get_registers(self._thread, linux.NT_PRSTATUS, 1024)
        if len(packed) != _PRSTATUS.size:
            raise Untracked(f"process {self._pid} is a 32-bit process")
        self._registers = list(_PRSTATUS.unpack(packed))
        self.pc, self.sp = self._registers[_PC], self._registers[_SP]
        if self._read(self.pc, _SVC_BYTES) == _SVC:
            self.first_argument = self._registers[0]
        # A shadow stack would reject the return into the frame.
        if (gcs := self._optional(linux.NT_ARM_GCS, _GCS.size)) and _GCS.unpack(gcs)[0] & 1:
            raise Untracked(f"process {self._pid} has a shadow stack, which forbids placing a frame on its stack")
        # A system call ends streaming mode and clears the vectors, all but the lower 128 bits of each.
        if self._has_vectors(self._optional(linux.NT_ARM_SSVE, _SVE_ROOM)):
            raise Again(f"thread {self._thread} of process {self._pid} is in SME's streaming mode")
        self._vectors = self._optional(linux.NT_ARM_SVE, _SVE_ROOM)
        if not self._has_vectors(self._vectors):
            self._vectors = b""

    def _optional(self, kind: int, room: int) -> bytes:
        """Registers that not every CPU has, and that not every kernel knows."""
        try:
            return linux.get_registers(self._thread, kind, room)
        except ProcessLookupError:
            raise
        except OSError:
            return b""

    @staticmethod
    def _has_vectors(sve: bytes) -> bool:
        return bool(sve) and bool(_SVE_HEADER.unpack_from(sve)[4] & _HAS_VECTORS)

    def is_ended_by_stop(self) -> bool:
        registers = self._registers
        if registers[_X8] not in _ENDED_BY_A_STOP or registers[0] != _EINTR:
            return False
        if self._read(self.pc - _SVC_BYTES, _SVC_BYTES) != _SVC:
            return False
        # Where it is unknown, the thread has entered the call in these microseconds, and is told of the interruption.
        self._again = self._waited_in(registers[_X8])
        return self._again is not None

    def call_again(self) -> None:
        assert self._again is not None
        self._registers[0] = self._again
        self._registers[_PC] -= _SVC_BYTES

    def frame(self, mask: bytes, back: int) -> tuple[int, bytes]:
        simd = linux.get_registers(self._thread, linux.NT_PRFPREG, _FPSIMD.size)
        vectors, status = _FPSIMD.unpack(simd)
        records = _record(_FPSIMD_MAGIC, status + vectors)
        if self._vectors:
            _, _, length, *_ = _SVE_HEADER.unpack_from(self._vectors)
            size = length * 32 + length // 8 * 17  # Z, P, FFR
            start = _SVE_HEADER.size
            records += _record(_SVE_MAGIC, _SVE_CONTEXT.pack(length) + self._vectors[start : start + size])
        records += _RECORD.pack(0, 0)
        if len(records) > _RECORDS_ROOM:
            raise Untracked(f"the vectors of process {self._pid} take {len(records)} bytes: too much for a frame")
        frame = _FRAME.pack(0, 0, 0, linux.NO_ALTSTACK, 0, 0, mask, 0, *self._registers) + records
        return (self.sp - len(frame)) // 16 * 16, frame

    def call(self, code: int, frame: int, back: int, number: int, argument: int) -> None:
        registers = list(self._registers)
        registers[0], registers[_X8], registers[_LR] = argument, number, back
        registers[_SP], registers[_PC] = frame, code
        registers[_PSTATE] &= ~_BTYPE
        linux.set_registers(self._thread, linux.NT_PRSTATUS, _PRSTATUS.pack(*registers))

    def result(self) -> int:
        return signed(_PRSTATUS.unpack(linux.get_registers(self._thread, linux.NT_PRSTATUS, _PRSTATUS.size))[0])

    def put_back(self) -> None:
        if self._vectors:
            linux.set_registers(self._thread, linux.NT_ARM_SVE, self._vectors)
        registers, number = list(self._registers), _NO_CALL
        if self.first_argument is not None:
            # Being detached wakes the thread as a signal does, so that the kernel takes the call up again, its timeout
            # as it was.
            number = registers[_X8] & 0xFFFFFFFF
            registers[0] = unsigned(-self._restart())
            registers[_PC] += _SVC_BYTES
        linux.set_registers(self._thread, linux.NT_ARM_SYSTEM_CALL, _SYSTEM_CALL.pack(number))
        linux.set_registers(self._thread, linux.NT_PRSTATUS, _PRSTATUS.pack(*registers))

    def _restart(self) -> int:
        """How the kernel takes its call up again."""
        number, (_, flags, _, timeout) = self._registers[_X8], self._registers[:4]
        code = _RESTARTS.get(number, _ERESTARTSYS)
        if number == _FUTEX:
            if flags & 0x7F not in (0, 9):  # FUTEX_WAIT, FUTEX_WAIT_BITSET
                code = _ERESTARTNOINTR
            elif timeout:
                code = _ERESTART_RESTARTBLOCK
        if number == _CLOCK_NANOSLEEP and flags & 1:  # TIMER_ABSTIME
            code = _ERESTARTNOHAND
        if code == _ERESTART_RESTARTBLOCK and self._waited_in(number) is None:
            # It may be about to make the call, with nothing in the block. Where it has begun, that was just now.
            code = _ERESTARTNOHAND
        return code


def _record(magic: int, body: bytes) -> bytes:
    size = -(-(_RECORD.size + len(body)) // 16) * 16
    return (_RECORD.pack(magic, size) + body).ljust(size, b"\0")
