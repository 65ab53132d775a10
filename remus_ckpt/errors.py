"""Every error that this package raises on purpose.

    RemusError                   exit code 1
    ├── StreamError              the bytes of a peer or of a file are at fault; nothing was applied
    │   ├── Malformed            20  the bytes break a rule of the format
    │   │   ├── LimitExceeded    20  they claim more than a named limit allows
    │   │   └── BadCheckpoint    20  a checkpoint in a store has changed or is gone; an earlier one is offered
    │   └── UnknownFormat        21  not a format that is read here, or one that is refused by name
    ├── NoCheckpoint             1   not the checkpoint that was asked for
    │   └── NothingToRestore     20  none at all: the stream or store holds no complete checkpoint
    ├── SourceError              1   the memory being recorded cannot be stopped, read or followed
    │   ├── PauseBroken          1   a writer ran during a pause: what was copied is not of one instant
    │   ├── Untracked            1   the kernel cannot say which pages were written; a comparison can
    │   └── VmError              1   QEMU refuses or is gone, or a guest cannot be protected or started
    ├── StoreError               1   a store cannot be opened, read or written; what was committed is untouched
    ├── LinkError                1   no connection to the other side, or none any longer
    │   └── Refused              1   the other side refuses, and says why
    │       └── Fenced           22  another side has taken over: this side must stop
    ├── LogError                 1   the commit log does not answer, or cannot be relied on for commits
    │   └── Overtaken            1   another record came first: this one is not in the log, and never will be
    ├── BridgeError              1   a guest's network cannot be bridged, or its bridge is gone
    └── KernelUnavailable        1   the requested kernel is not available here; also a ValueError

A caller's own mistake (a wrong shape, a read-only array) is a ValueError or TypeError as everywhere in Python.
"""

from __future__ import annotations


class RemusError(Exception):
    """The root: catch this to catch everything that is not a bug."""

    exit_code = 1


class StreamError(RemusError):
    """Bytes from outside are at fault.

    offset: position of the fault in the stream (or in the encoded bytes, for a codec), None if it has none
    section: of the broken rule, such as "stream.md §5.1"
    chunk: name of the chunk that was being read, None outside one
    """

    def __init__(
        self, message: str, *, offset: int | None = None, section: str | None = None, chunk: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.offset = offset
        self.section = section
        self.chunk = chunk

    def __str__(self) -> str:
        where = " ".join(
            part for part in (self.chunk, None if self.offset is None else f"at byte {self.offset}") if part
        )
        text = f"{where}: {self.message}" if where else self.message
        return f"{text} ({self.section})" if self.section else text


class Malformed(StreamError):
    """The bytes break a rule of the format."""

    exit_code = 20


class LimitExceeded(Malformed):
    """The bytes claim more than a limit allows; `limit` is its name in `Limits`."""

    def __init__(self, message: str, *, limit: str, offset: int, section: str, chunk: str | None = None) -> None:
        super().__init__(message, offset=offset, section=section, chunk=chunk)
        self.limit = limit


class BadCheckpoint(Malformed):
    """A checkpoint in a store cannot be read back.

    segment: the file that `offset` refers to
    epoch: of the checkpoint, None if unknown
    good: the newest good epoch before the one asked for, None if there is none
    """

    def __init__(
        self, message: str, *, segment: str, epoch: int | None, good: int | None, offset: int, section: str | None
    ) -> None:
        super().__init__(message, offset=offset, section=section, chunk=segment)
        self.segment = segment
        self.epoch = epoch
        self.good = good


class UnknownFormat(StreamError):
    """Not a legacy save stream, or one of a kind that is refused by name."""

    exit_code = 21


class NoCheckpoint(RemusError):
    """The stream or store does not hold the checkpoint that was asked for."""


class NothingToRestore(NoCheckpoint):
    """It holds no complete checkpoint at all. A backup or copy script must not take that for success."""

    exit_code = 20


class SourceError(RemusError):
    """The memory being recorded cannot be stopped, read or followed any longer."""


class PauseBroken(SourceError):
    """A writer ran during a pause, so what was copied is not of one instant. Another pause may succeed."""


class Untracked(SourceError):
    """The kernel cannot say which pages of this memory were written; the message says why. A comparison can."""


class VmError(SourceError):
    """QEMU refuses, does not answer or is gone; or a guest cannot be protected here, or started."""


class StoreError(RemusError):
    """A store cannot be opened, read or written. What was committed is untouched."""


class LinkError(RemusError):
    """The other side cannot be reached, or is gone."""


class Refused(LinkError):
    """The other side has ended the session and said why; `code` is a name in specs/session.md §7."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class Fenced(Refused):
    """Another side has taken over under the higher `term`; output that this side holds back must never be released."""

    exit_code = 22

    def __init__(self, message: str, *, term: int) -> None:
        super().__init__(message, code="fenced")
        self.term = term


class LogError(RemusError):
    """The commit log does not answer, refuses, or cannot be relied on for commits. If a record was being appended, it
    is unknown whether the log has it."""


class Overtaken(LogError):
    """Another record came first: the one to be appended is not in the log, and never will be."""


class BridgeError(RemusError):
    """The bridge between a guest and its network cannot be started, is gone, or refuses. What it held has not left."""


class KernelUnavailable(RemusError, ValueError):
    """The kernel that the caller or REMUS_CKPT_KERNEL requests does not exist or cannot run here."""
