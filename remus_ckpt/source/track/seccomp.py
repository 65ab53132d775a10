"""Whether a process's seccomp filters allow a system call, found by reading them: trying it could kill the process.

Source: Linux, Documentation/userspace-api/seccomp_filter.rst; include/uapi/linux/bpf_common.h, seccomp.h.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable

_INSTRUCTION = struct.Struct("=HBBI")  # code, jump if true, jump if false, constant
_DATA = struct.Struct("=iIQ6Q")
"""struct seccomp_data: number, architecture, instruction pointer, arguments."""
_WORD = struct.Struct("=I")
_SCRATCH_WORDS = 16

ALLOW = 0x7FFF0000
LOG = 0x7FFC0000
"""The actions that let a call pass. Any other answers for the kernel, asks someone, or kills."""
KILL = 0
_ACTION = 0xFFFF0000

# Classes, in the lowest three bits of a code.
_LD, _LDX, _ST, _STX, _ALU, _JMP, _RET, _MISC = range(8)
_IMM, _ABS, _MEM, _LEN = 0x00, 0x20, 0x60, 0x80
_X = 0x08
_ARITHMETIC: dict[int, Callable[[int, int], int]] = {
    0x00: operator.add,
    0x10: operator.sub,
    0x20: operator.mul,
    0x30: operator.floordiv,
    0x40: operator.or_,
    0x50: operator.and_,
    0x60: operator.lshift,
    0x70: operator.rshift,
    0x80: lambda a, _: -a,
    0xA0: operator.xor,
}
_COMPARE: dict[int, Callable[[int, int], int]] = {
    0x10: operator.eq,
    0x20: operator.gt,
    0x30: operator.ge,
    0x40: operator.and_,
}


def allows(program: bytes, audit: int, number: int, arguments: tuple[int, ...] = ()) -> bool:
    """Whether a filter lets a system call pass.

    program: instructions of classic BPF, 8 bytes each
    audit: AUDIT_ARCH_* of the caller
    number: of the call
    A program that cannot be interpreted counts as refusing.
    """
    padded = (*arguments, *[0] * (6 - len(arguments)))
    return verdict(program, _DATA.pack(number, audit, 0, *padded)) & _ACTION in (ALLOW, LOG)


def verdict(program: bytes, data: bytes) -> int:
    """What a filter returns for a struct seccomp_data; KILL for an invalid program.

    Jumps go forward only, so it takes no more steps than there are instructions.
    """
    code = [*_INSTRUCTION.iter_unpack(program[: len(program) // 8 * 8])]
    a = x = at = 0
    memory = [0] * _SCRATCH_WORDS
    while at < len(code):
        op, if_true, if_false, k = code[at]
        at += 1
        kind, mode = op & 0x07, op & 0xF0
        try:
            if kind == _RET:
                return a if op & 0x18 == 0x10 else k
            if kind in (_LD, _LDX):
                value = _load(op & 0xE0, k, data, memory)
                a, x = (value, x) if kind == _LD else (a, value)
            elif kind in (_ST, _STX):
                memory[k] = a if kind == _ST else x
            elif kind == _ALU:
                operand = x if op & _X else k
                if mode in (0x60, 0x70) and operand >= 32:  # a shift that no filter has
                    return KILL
                a = _ARITHMETIC[mode](a, operand) & 0xFFFFFFFF
            elif kind == _JMP:
                if mode == 0:
                    at += k
                else:
                    at += if_true if _COMPARE[mode](a, x if op & _X else k) else if_false
            else:
                a, x = (a, a) if op & 0xF8 == 0 else (x, x)
        except (KeyError, IndexError, ZeroDivisionError, struct.error):
            return KILL
    return KILL


def _load(mode: int, k: int, data: bytes, memory: list[int]) -> int:
    if mode == _IMM:
        return k
    if mode == _MEM:
        return memory[k]
    if mode == _LEN:
        return len(data)
    if mode != _ABS:
        raise KeyError(mode)
    word: int = _WORD.unpack_from(data, k)[0]
    return word
