"""What x86-64 has in a thread's registers and in a signal frame.

Source: Linux, arch/x86/kernel/signal_64.c and fpu/signal.c; arch/x86/include/uapi/asm/sigcontext.h.
"""

from __future__ import annotations

import struct

from remus_ckpt.errors import Untracked
from remus_ckpt.source.track import linux
from remus_ckpt.source.track.context import Again, Context, signed, unsigned

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
_RED_ZONE = 128
_USER_CS = 0x33
_NO_CALL = unsigned(-1)
_SYSCALL_BYTES = 2
_RESTART = {unsigned(-code) for code in (512, 513, 514, 516)}
"""What rax holds in an interrupted call: ERESTARTSYS, -NOINTR, -NOHAND, _RESTARTBLOCK."""
_EINTR = unsigned(-4)
_ENDED_BY_A_STOP = frozenset({65, 128, 208, 220, 232, 281, 333, 441})
"""Calls that the kernel does not take up again after a stop, but that can be made again with nothing lost: semop,
rt_sigtimedwait, io_getevents, semtimedop, epoll_wait, epoll_pwait, io_pgetevents, epoll_pwait2."""

_XSTATE_ROOM = 1 << 16
_FX_SW = struct.Struct("=IIQI")  # magic, size with the second magic, features, size
_FX_SW_AT = 464
_FX_FEATURES = struct.Struct("=Q")
_MAGIC1, _MAGIC2 = 0x46505853, struct.pack("=I", 0x46505845)
_AMX_AT, _AMX_FEATURES = 2752, 3 << 17
"""Where the tiles begin in the FPU's state. A thread that has not asked for them has no room for them in a frame."""


class X86(Context):
    """A thread of 64 bits."""

    code = b"\x0f\x05\xc3"  # syscall; ret
    signal_returns = (b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05", b"\xb8\x0f\x00\x00\x00\x0f\x05")
    """mov $15, %rax (%eax); syscall."""

    def load(self) -> None:
        packed = linux.get_registers(self._thread, linux.NT_PRSTATUS, 1024)
        if len(packed) != _PRSTATUS.size:
            raise Untracked(f"process {self._pid} is a 32-bit process")
        self._registers = dict(zip(_REGISTERS, _PRSTATUS.unpack(packed), strict=True))
        if self._registers["cs"] != _USER_CS:
            raise Again(f"thread {self._thread} of process {self._pid} runs 32-bit code")
        self.pc, self.sp = self._registers["rip"], self._registers["rsp"]

    def is_ended_by_stop(self) -> bool:
        return self._registers["orig_rax"] in _ENDED_BY_A_STOP and self._registers["rax"] == _EINTR

    def call_again(self) -> None:
        was = self._registers
        self._registers = was | {
            "rax": was["orig_rax"],
            "rip": was["rip"] - _SYSCALL_BYTES,
            "orig_rax": _NO_CALL,
        }

    def frame(self, mask: bytes, back: int) -> tuple[int, bytes]:
        was = dict(self._registers)
        if was["orig_rax"] >> 63 == 0 and was["rax"] in _RESTART:
            was["rax"] = was["orig_rax"]
            was["rip"] -= _SYSCALL_BYTES
        fpu = self._fpu()
        at_fpu = (self.sp - _RED_ZONE - len(fpu)) // 64 * 64
        at_frame = (at_fpu - _FRAME.size) // 16 * 16 - 8
        frame = _FRAME.pack(
            back,
            *(_UC_FLAGS, 0),
            *(0, linux.NO_ALTSTACK, 0, 0),
            *(was[name] for name in _CONTEXT),
            *(was[name] & 0xFFFF for name in ("cs", "gs", "fs", "ss")),
            *(0, 0, 0, 0),
            at_fpu,
            *[0] * 8,
            mask,
        )
        return at_frame, frame + bytes(at_fpu - at_frame - len(frame)) + fpu

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

    def call(self, code: int, frame: int, back: int, number: int, argument: int) -> None:
        to_call = {"rip": code, "rsp": frame, "orig_rax": _NO_CALL, "rax": number, "rdi": argument}
        self._set(self._registers | to_call)

    def result(self) -> int:
        packed = linux.get_registers(self._thread, linux.NT_PRSTATUS, _PRSTATUS.size)
        return signed(_PRSTATUS.unpack(packed)[_REGISTERS.index("rax")])

    def put_back(self) -> None:
        # Being detached wakes the thread as a signal does, so that the kernel takes an interrupted call up again, its
        # timeout as it was.
        self._set(self._registers)

    def _set(self, registers: dict[str, int]) -> None:
        packed = _PRSTATUS.pack(*(registers[name] for name in _REGISTERS))
        linux.set_registers(self._thread, linux.NT_PRSTATUS, packed)
