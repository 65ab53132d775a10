"""Where a stream is, and what may come next: the table that `Reader` and `EventWriter` both walk (specs/stream.md §10).

A pair that is not in the table is an error.
"""

from __future__ import annotations

from enum import Enum

from remus_ckpt.wire.xen import events


class StreamState(Enum):
    """A place in the stream. FIRST is round 0, ARMED the same after its ENABLE_COMPRESSION; PLAIN and COMPRESSED are
    later rounds, in format A and format B."""

    FRONT = "front"
    HEADER = "header"
    FIRST_BODY = "body of the first checkpoint"
    ARMED_BODY = "body of the first checkpoint, compression enabled"
    PLAIN_BODY = "body of an uncompressed checkpoint"
    COMPRESSED_BODY = "body of a compressed checkpoint"
    FIRST_TAIL = "tail of the first checkpoint"
    ARMED_TAIL = "tail of the first checkpoint, compression enabled"
    PLAIN_TAIL = "tail of an uncompressed checkpoint"
    COMPRESSED_TAIL = "tail of a compressed checkpoint"
    DONE = "end of the stream"


class EventKind(Enum):
    """How an event moves the stream from one place to the next."""

    FILE_HEADER = "file header"
    HEADER = "header"
    BATCH = "batch"
    COMPRESSED_DATA = "COMPRESSED_DATA"
    INFO = "metadata"
    LAST_CHECKPOINT = "LAST_CHECKPOINT"
    ENABLE_COMPRESSION = "ENABLE_COMPRESSION"
    END_OF_BODY = "end of body"
    TAIL = "tail"
    LAST_TAIL = "tail of the last checkpoint"


BODIES = {
    StreamState.FIRST_BODY: StreamState.FIRST_TAIL,
    StreamState.ARMED_BODY: StreamState.ARMED_TAIL,
    StreamState.PLAIN_BODY: StreamState.PLAIN_TAIL,
    StreamState.COMPRESSED_BODY: StreamState.COMPRESSED_TAIL,
}
"""Each body, and the tail that closes it."""

TRANSITIONS: dict[tuple[StreamState, EventKind], StreamState] = {
    (StreamState.FRONT, EventKind.FILE_HEADER): StreamState.HEADER,
    (StreamState.FRONT, EventKind.HEADER): StreamState.FIRST_BODY,
    (StreamState.HEADER, EventKind.HEADER): StreamState.FIRST_BODY,
    **{(body, kind): body for body in BODIES for kind in (EventKind.BATCH, EventKind.INFO, EventKind.LAST_CHECKPOINT)},
    **{(body, EventKind.END_OF_BODY): tail for body, tail in BODIES.items()},
    (StreamState.FIRST_BODY, EventKind.ENABLE_COMPRESSION): StreamState.ARMED_BODY,
    # It counts only when round 0 ends: a second one, or a later one, changes nothing.
    (StreamState.ARMED_BODY, EventKind.ENABLE_COMPRESSION): StreamState.ARMED_BODY,
    (StreamState.PLAIN_BODY, EventKind.ENABLE_COMPRESSION): StreamState.PLAIN_BODY,
    (StreamState.COMPRESSED_BODY, EventKind.ENABLE_COMPRESSION): StreamState.COMPRESSED_BODY,
    (StreamState.COMPRESSED_BODY, EventKind.COMPRESSED_DATA): StreamState.COMPRESSED_BODY,
    (StreamState.FIRST_TAIL, EventKind.TAIL): StreamState.PLAIN_BODY,
    (StreamState.PLAIN_TAIL, EventKind.TAIL): StreamState.PLAIN_BODY,
    (StreamState.ARMED_TAIL, EventKind.TAIL): StreamState.COMPRESSED_BODY,
    (StreamState.COMPRESSED_TAIL, EventKind.TAIL): StreamState.COMPRESSED_BODY,
    **{(tail, EventKind.LAST_TAIL): StreamState.DONE for tail in BODIES.values()},
}

KINDS: dict[type[events.Event], EventKind] = {
    events.FileHeader: EventKind.FILE_HEADER,
    events.Header: EventKind.HEADER,
    events.Batch: EventKind.BATCH,
    events.CompressedData: EventKind.COMPRESSED_DATA,
    events.VcpuInfo: EventKind.INFO,
    events.HvmParam: EventKind.INFO,
    events.TscInfo: EventKind.INFO,
    events.Tmem: EventKind.INFO,
    events.TmemExtra: EventKind.INFO,
    events.Toolstack: EventKind.INFO,
    events.EnableVerifyMode: EventKind.INFO,
    events.LastCheckpoint: EventKind.LAST_CHECKPOINT,
    events.EnableCompression: EventKind.ENABLE_COMPRESSION,
    events.EndOfBody: EventKind.END_OF_BODY,
    events.TailHvm: EventKind.TAIL,
    events.TailPv: EventKind.TAIL,
}


class Course:
    """Walks the table, and keeps what determines the layout of a tail."""

    def __init__(self) -> None:
        self.state = StreamState.FRONT
        self.last_checkpoint = False
        self.vcpus: tuple[int, ...] = (0,)
        """The virtual CPUs that the tail describes; {0} if VCPU_INFO never came."""
        self.extended_context = False
        self.xsave_bytes: int | None = None
        """xcnt of the header: 16 + the size of the extended state."""
        self.context_bytes = 0

    def __copy__(self) -> Course:
        made = Course.__new__(Course)  # once a checkpoint: the usual way takes ten times as long
        made.__dict__.update(self.__dict__)
        return made

    @property
    def in_compressed_body(self) -> bool:
        """Whether batches are in format B here."""
        return self.state is StreamState.COMPRESSED_BODY

    def step(self, event: events.Event) -> StreamState | None:
        """Advance by one event; returns None if it is not allowed here."""
        kind = KINDS[type(event)]
        if kind is EventKind.TAIL and self.last_checkpoint:
            kind = EventKind.LAST_TAIL
        following = TRANSITIONS.get((self.state, kind))
        if following is None:
            return None
        if kind is EventKind.LAST_CHECKPOINT:
            self.last_checkpoint = True
        elif isinstance(event, events.VcpuInfo):
            self.vcpus = tuple(event.ids())
        elif isinstance(event, events.Header):
            for block in event.extended_info or ():
                if block.id == b"extv":
                    self.extended_context = True
                elif block.id == b"xcnt":
                    self.xsave_bytes = int.from_bytes(block.data[:4], "little")
                elif block.id == b"vcpu":
                    self.context_bytes = len(block.data)
        self.state = following
        return following
