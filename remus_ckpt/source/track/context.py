"""A traced thread's registers, which must come back as they were: what `foreign` does differently on each machine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

Read = Callable[[int, int], bytes]
"""Memory of the process: address, size."""


class Again(Exception):
    """Another thread or another moment may work; the message says why this one did not."""


class Context(ABC):
    """A thread's registers and FPU state. Made while the thread runs; everything else needs it stopped.

    code: a system call and a return, as one finds them in memory
    signal_returns: the same of rt_sigreturn, which whatever handles signals has
    pc, sp: where it stopped
    first_argument: if the kernel is to take up its system call again, and keeps that call's first argument where no
        tracer can write: the argument. The last call before `put_back` must have it. Otherwise None
    """

    code: ClassVar[bytes]
    signal_returns: ClassVar[tuple[bytes, ...]]
    pc: int
    sp: int
    first_argument: int | None = None

    def __init__(self, pid: int, thread: int, read: Read) -> None:
        self._pid = pid
        self._thread = thread
        self._read = read

    @abstractmethod
    def load(self) -> None:
        """Note all that it has. Raises Untracked if that cannot be put back, Again if it can at another moment."""

    @abstractmethod
    def is_ended_by_stop(self) -> bool:
        """Whether its system call is about to report an interruption, which may be our stop."""

    @abstractmethod
    def call_again(self) -> None:
        """Let it make that call again in the end."""

    @abstractmethod
    def frame(self, mask: bytes, back: int) -> tuple[int, bytes]:
        """A signal frame to lay on its stack, and where, from which rt_sigreturn at `back` restores all. Raises
        Untracked."""

    @abstractmethod
    def call(self, code: int, frame: int, back: int, number: int, argument: int) -> None:
        """Have it execute `code` next, a system call, and then return to `back` with the stack at `frame`."""

    @abstractmethod
    def result(self) -> int:
        """What the call returned: negative for an error."""

    @abstractmethod
    def put_back(self) -> None:
        """Give it what it had."""


def signed(word: int) -> int:
    """A register as a signed number."""
    return word - (1 << 64) if word >> 63 else word


def unsigned(number: int) -> int:
    """A number as a register holds it."""
    return number & 0xFFFFFFFFFFFFFFFF
