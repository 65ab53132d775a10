"""A place between two checkpoints of a stream, and what a reader must know to continue there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from remus_ckpt.wire.digest import DigestName
from remus_ckpt.wire.record import Position
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.dialect import Dialect, StreamCodec, Word
from remus_ckpt.wire.xen.states import Course, StreamState


@dataclass(frozen=True, slots=True)
class Boundary:
    """A place between two checkpoints, and everything a reader must know to continue there.

    offset: of the place in the stream
    epoch: number of checkpoints of the stream before it
    digest: the one of the stream's records, None if it is not known
    """

    offset: int = 0
    epoch: int = 0
    dialect: Dialect = field(default_factory=Dialect)
    p2m_size: int = 0
    position: Position | None = None
    course: Course = field(default_factory=Course)
    is_foreign: bool = False
    """Whether a checkpoint before it had no record of ours."""
    digest: DigestName | None = None
    deviations: tuple[events.Deviation, ...] = ()

    @classmethod
    def of_ours(
        cls, *, offset: int, epoch: int, word: Word, codec: StreamCodec, p2m_size: int, position: Position
    ) -> Self:
        """The boundary after any checkpoint of a stream of our own (specs/stream.md §9.1)."""
        course = Course()
        course.state = StreamState.COMPRESSED_BODY
        dialect = Dialect(word=word, guest="hvm", codec=codec)
        return cls(offset=offset, epoch=epoch, dialect=dialect, p2m_size=p2m_size, position=position, course=course)
