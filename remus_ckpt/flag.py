"""A flag that a poll can see."""

from __future__ import annotations

import io
import os
import sys

_ONE = (1).to_bytes(8, sys.byteorder)  # what an eventfd is told by (eventfd(2))


class Descriptor(io.FileIO):
    """A descriptor that is closed with its last reference. A thread in the middle of a write has one: closed under it,
    the number could be another file's by then.

    A signal's handler may raise wherever Python code runs, also between a descriptor and its first name, which would
    lose it. So it is made by iterators in C, and comes out of them in the object that owns it:
    `next(map(Descriptor, map(open_it, (argument,)), ("r+",)))`.
    """

    __del__ = io.FileIO.close  # or it would warn that it was not closed; in C, where no signal's handler can raise


class Flag:
    """A flag whose descriptor is readable while it is set.

    Any thread may call any method; a signal handler may set it. In a forked child, where the descriptor is still the
    parent's, `set` and `clear` do not touch it. A flag without references frees its descriptor.
    Raises OSError if no more descriptors are available.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        numbers = map(os.eventfd, (0,), (os.EFD_CLOEXEC | os.EFD_NONBLOCK,))
        self._file: Descriptor | None = next(map(Descriptor, numbers, ("r+",)))

    def fileno(self) -> int:
        """The descriptor; -1 when closed."""
        file = self._file
        return -1 if file is None else file.fileno()

    def set(self) -> None:
        """Set the flag. May be called again, also during `close` and after it."""
        if (file := self._file) is not None and self._pid == os.getpid():
            file.write(_ONE)

    def clear(self) -> None:
        """Clear the flag. A thread that waits for work clears it before it looks for work, so no `set` is lost."""
        if (file := self._file) is not None and self._pid == os.getpid():
            file.read(len(_ONE))

    def close(self) -> None:
        """Close the descriptor. May be called again."""
        self._file = None
