"""What is told of an arm64 thread by its registers, on any machine: the kernel's answers are made up here."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from remus_ckpt.errors import Untracked
from remus_ckpt.source.track import linux
from remus_ckpt.source.track.arm64 import Arm64
from remus_ckpt.source.track.context import Again

SVC, NOP = b"\x01\x00\x00\xd4", b"\x1f\x20\x03\xd5"
CODE, STACK = 0x400000, 0x7FFFF0
EINTR = (1 << 64) - 4
FPSIMD = bytes(range(256)) * 2 + b"status.." + bytes(8)


def sve(vector: int, *, is_live: bool) -> bytes:
    body = bytes(vector * 32 + vector // 8 * 17)
    return struct.pack("=IIHHHH", 16 + len(body), 1 << 15, vector, vector, int(is_live), 0) + body


class Thread:
    """A stopped thread: its sets of registers, and eight bytes of code, the second half of which is at its pc."""

    def __init__(self, patch: pytest.MonkeyPatch, *registers: int, call: int, code: bytes, waits_in: str = "") -> None:
        words = [*registers, *[0] * (34 - len(registers))]
        words[8], words[31], words[32] = call, STACK, CODE + 4
        self.sets = {linux.NT_PRSTATUS: struct.pack("=34Q", *words), linux.NT_PRFPREG: FPSIMD}
        patch.setattr(linux, "get_registers", self.get)
        patch.setattr(linux, "set_registers", lambda _, kind, value: self.sets.__setitem__(kind, value))
        self.context = Arm64(os.getpid(), 1 << 30, lambda at, size: code[at - CODE :][:size])
        self.context.waits_in = waits_in.encode()

    def get(self, _: int, kind: int, room: int) -> bytes:
        if kind not in self.sets:
            raise OSError(errno.EINVAL, "no such set")
        return self.sets[kind][:room]

    def words(self) -> tuple[int, ...]:
        return struct.unpack("=34Q", self.sets[linux.NT_PRSTATUS])


@pytest.mark.parametrize(
    ("call", "arguments", "waits", "code"),
    [
        (63, (3, 0x1000, 10), True, 512),  # read
        (73, (0x1000, 1, 0x2000), True, 514),  # ppoll
        (101, (0x1000, 0x1000), True, 516),  # nanosleep
        (101, (0x1000, 0x1000), False, 514),
        (115, (1, 0, 0x1000), True, 516),  # clock_nanosleep
        (115, (1, 1, 0x1000), True, 514),  # until a time
        (98, (0x1000, 0x80, 1, 0), True, 512),  # futex: FUTEX_WAIT, private, without a timeout
        (98, (0x1000, 0x80, 1, 0x2000), True, 516),
        (98, (0x1000, 0x189, 1, 0x2000), True, 516),  # FUTEX_WAIT_BITSET
        (98, (0x1000, 0x86, 0, 0x2000), True, 513),  # FUTEX_LOCK_PI
    ],
)
def test_the_kernel_is_told_how_to_take_a_call_up_again(
    call: int, arguments: tuple[int, ...], waits: bool, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"{call} {' '.join(map(hex, (*arguments, 0, 0, 0, 0)[:6]))} 0x7ffff0 0x400008" if waits else "running"
    thread = Thread(monkeypatch, *arguments, call=call, code=NOP + SVC, waits_in=line)
    thread.context.load()
    assert thread.context.first_argument == arguments[0]
    assert not thread.context.is_ended_by_stop()
    thread.context.put_back()
    assert thread.sets[linux.NT_ARM_SYSTEM_CALL] == struct.pack("=I", call)
    words = thread.words()
    assert ((1 << 64) - words[0], words[1], words[32]) == (code, arguments[1], CODE + 8)


def test_computing_is_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its registers hold, even an error that would be taken for a restart."""
    before = Thread(monkeypatch, (1 << 64) - 512, 7, call=63, code=SVC + NOP)
    before.context.load()
    assert before.context.first_argument is None
    was = before.words()
    before.context.call(CODE, STACK - 64, 0x5000, 282, 1)
    assert before.words() != was
    before.context.put_back()
    assert before.words() == was
    assert before.sets[linux.NT_ARM_SYSTEM_CALL] == b"\xff" * 4


@pytest.mark.parametrize(
    ("code", "x0", "waits_in", "is_made_again"),
    [
        (SVC + NOP, EINTR, "22 0x5 0x1000 0x1 0x4 0x0 0x8 0x7ffff0 0x400004", True),
        (SVC + NOP, EINTR, "73 0x5 0x1000 0x1 0x4 0x0 0x8 0x7ffff0 0x400004", False),
        (SVC + NOP, EINTR, "running", False),
        (SVC + NOP, EINTR, "", False),
        (SVC + NOP, 1, "22 0x5 0x1000 0x1 0x4 0x0 0x8 0x7ffff0 0x400004", False),
        (NOP + NOP, EINTR, "22 0x5 0x1000 0x1 0x4 0x0 0x8 0x7ffff0 0x400004", False),
    ],
)
def test_epoll_wait_is_made_again_where_its_argument_is_known(
    code: bytes, x0: int, waits_in: str, is_made_again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = Thread(monkeypatch, x0, 0x1000, call=22, code=code, waits_in=waits_in)
    thread.context.load()
    assert thread.context.is_ended_by_stop() == is_made_again
    if is_made_again:
        thread.context.call_again()
        thread.context.put_back()
        assert (thread.words()[0], thread.words()[1], thread.words()[32]) == (5, 0x1000, CODE)


@pytest.mark.parametrize("vector", [0, 16, 32, 64])
def test_a_frame_lies_below_the_stack_and_has_all_registers(vector: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The offsets are those of struct rt_sigframe."""
    thread = Thread(monkeypatch, *range(100, 108), call=1000, code=NOP + NOP)
    if vector:
        thread.sets[linux.NT_ARM_SVE] = sve(vector, is_live=True)
    thread.context.load()
    at, frame = thread.context.frame(b"maskmask", CODE)
    assert at % 16 == 0 and at + len(frame) <= STACK
    assert frame[168:176] == b"maskmask"
    assert struct.unpack_from("=34Q", frame, 312) == thread.words()
    assert struct.unpack_from("=II8s512s", frame, 592) == (0x46508001, 528, b"status..", FPSIMD[:512])
    end = 592 + 528
    if vector:
        magic, size, length = struct.unpack_from("=IIH", frame, end)
        assert (magic, length) == (0x53564501, vector)
        assert size % 16 == 0 and size >= 16 + vector * 32 + vector // 8 * 17
        end += size
    assert frame[end:] == bytes(8)


def test_vectors_that_are_not_live_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_live in (False, True):
        thread = Thread(monkeypatch, call=0, code=NOP + NOP)
        saved = thread.sets[linux.NT_ARM_SVE] = sve(32, is_live=is_live)
        thread.context.load()
        thread.sets[linux.NT_ARM_SVE] = b"cleared"
        thread.context.put_back()
        assert thread.sets[linux.NT_ARM_SVE] == (saved if is_live else b"cleared")


def test_what_cannot_be_put_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, value, error in (
        (linux.NT_PRSTATUS, bytes(72), Untracked),  # of 32 bits
        (linux.NT_ARM_GCS, struct.pack("=3Q", 1, 0, 0x1000), Untracked),
        (linux.NT_ARM_SSVE, sve(32, is_live=True), Again),
    ):
        thread = Thread(monkeypatch, call=0, code=NOP + NOP)
        thread.sets[kind] = value
        with pytest.raises(error):
            thread.context.load()
    thread = Thread(monkeypatch, call=0, code=NOP + NOP)
    thread.sets[linux.NT_ARM_SVE] = sve(256, is_live=True)
    thread.context.load()
    with pytest.raises(Untracked, match="vectors"):
        thread.context.frame(bytes(8), CODE)
