"""Where in a stream we are and what may stand there: the table that reader and writer both walk (specs/stream.md §10).

A pair that is not in the table is an error.
"""

from __future__ import annotations

from enum import Enum

from remus_ckpt.wire.xen import events


class StreamState(Enum):
    """A place in the stream. FIRST is round 0; ARMED: it has had its ENABLE_COMPRESSION; PLAIN and COMPRESSED: later
    rounds, in format A and format B."""

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


class Kind(Enum):
    """What an event does to the place."""

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
"""Each body and the tail that closes it."""

TRANSITIONS: dict[tuple[StreamState, Kind], StreamState] = {
    (StreamState.FRONT, Kind.FILE_HEADER): StreamState.HEADER,
    (StreamState.FRONT, Kind.HEADER): StreamState.FIRST_BODY,
    (StreamState.HEADER, Kind.HEADER): StreamState.FIRST_BODY,
    **{(body, kind): body for body in BODIES for kind in (Kind.BATCH, Kind.INFO, Kind.LAST_CHECKPOINT)},
    **{(body, Kind.END_OF_BODY): tail for body, tail in BODIES.items()},
    (StreamState.FIRST_BODY, Kind.ENABLE_COMPRESSION): StreamState.ARMED_BODY,
    # Looked at only when round 0 ends: said twice or said later, it changes nothing.
    (StreamState.ARMED_BODY, Kind.ENABLE_COMPRESSION): StreamState.ARMED_BODY,
    (StreamState.PLAIN_BODY, Kind.ENABLE_COMPRESSION): StreamState.PLAIN_BODY,
    (StreamState.COMPRESSED_BODY, Kind.ENABLE_COMPRESSION): StreamState.COMPRESSED_BODY,
    (StreamState.COMPRESSED_BODY, Kind.COMPRESSED_DATA): StreamState.COMPRESSED_BODY,
    (StreamState.FIRST_TAIL, Kind.TAIL): StreamState.PLAIN_BODY,
    (StreamState.PLAIN_TAIL, Kind.TAIL): StreamState.PLAIN_BODY,
    (StreamState.ARMED_TAIL, Kind.TAIL): StreamState.COMPRESSED_BODY,
    (StreamState.COMPRESSED_TAIL, Kind.TAIL): StreamState.COMPRESSED_BODY,
    **{(tail, Kind.LAST_TAIL): StreamState.DONE for tail in BODIES.values()},
}

KINDS: dict[type[events.Event], Kind] = {
    events.FileHeader: Kind.FILE_HEADER,
    events.Header: Kind.HEADER,
    events.Batch: Kind.BATCH,
    events.CompressedData: Kind.COMPRESSED_DATA,
    events.VcpuInfo: Kind.INFO,
    events.HvmParam: Kind.INFO,
    events.TscInfo: Kind.INFO,
    events.Tmem: Kind.INFO,
    events.TmemExtra: Kind.INFO,
    events.Toolstack: Kind.INFO,
    events.EnableVerifyMode: Kind.INFO,
    events.LastCheckpoint: Kind.LAST_CHECKPOINT,
    events.EnableCompression: Kind.ENABLE_COMPRESSION,
    events.EndOfBody: Kind.END_OF_BODY,
    events.TailHvm: Kind.TAIL,
    events.TailPv: Kind.TAIL,
}


class Course:
    """Walks the table, and keeps what the layout of a tail hangs on."""

    def __init__(self) -> None:
        self.state = StreamState.FRONT
        self.last_checkpoint = False
        self.vcpus: tuple[int, ...] = (0,)
        """The virtual CPUs that the tail describes; {0} where VCPU_INFO never came."""
        self.extended_context = False
        self.xsave_bytes: int | None = None
        """xcnt of the header: 16 + the size of the extended state."""
        self.context_bytes = 0

    @property
    def in_compressed_body(self) -> bool:
        """Whether batches are in format B here."""
        return self.state is StreamState.COMPRESSED_BODY

    def step(self, event: events.Event) -> StreamState | None:
        """Go on by one event; None where it may not stand here."""
        kind = KINDS[type(event)]
        if kind is Kind.TAIL and self.last_checkpoint:
            kind = Kind.LAST_TAIL
        following = TRANSITIONS.get((self.state, kind))
        if following is None:
            return None
        if kind is Kind.LAST_CHECKPOINT:
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
