"""One connection between a primary, or a control client, and a backup (specs/session.md). No I/O, no clock.

Bytes come in by `get_buffer` and `buffer_updated`, and come out of `next_event` as messages; `send` and `send_data`
make the bytes for the other side.
"""

from __future__ import annotations

from collections.abc import Iterable

from remus_ckpt.pages import Buffer
from remus_ckpt.session.incoming import CheckpointReceived, DataReceived, Incoming, Lender
from remus_ckpt.session.messages import Begin, Compression, Message
from remus_ckpt.session.outgoing import Outgoing
from remus_ckpt.session.rules import Common, SessionState, Side


class Session:
    """One connection, from its preface to its end, in two directions.

    side: which of the two sides this is

    `incoming` and `outgoing` may have a thread each (`Direction` says from when on). What follows is for who has both.
    """

    def __init__(self, side: Side) -> None:
        self.common = Common()
        self.outgoing = Outgoing(side, self.common)
        self.incoming = Incoming("server" if side == "client" else "client", self.common)

    @property
    def state(self) -> SessionState:
        """Where the session is: in the stream, the client's frames alone move it."""
        return self.common.states["client"]

    @property
    def begin(self) -> Begin | None:
        """As it was sent or received."""
        return self.common.begin

    @property
    def last_sent(self) -> Message | None:
        """The Error or Goodbye that this side ended with."""
        return self.outgoing.ended_with

    @property
    def last_received(self) -> Message | None:
        """The Error or Goodbye that the other side ended with."""
        return self.incoming.ended_with

    @property
    def ended(self) -> bool:
        """Whether Error or Goodbye has been sent or received."""
        return bool(self.common.ended)

    @property
    def received_bytes(self) -> int:
        """As of `Incoming`; so what follows, and `send` and `send_data` as of `Outgoing`."""
        return self.incoming.received_bytes

    @property
    def lender(self) -> Lender | None:
        return self.incoming.lender

    @lender.setter
    def lender(self, lender: Lender | None) -> None:
        self.incoming.lender = lender

    def get_buffer(self) -> memoryview:
        return self.incoming.get_buffer()

    def buffer_updated(self, size: int) -> None:
        self.incoming.buffer_updated(size)

    def feed_eof(self) -> None:
        self.incoming.feed_eof()

    def close(self) -> None:
        self.incoming.close()

    def next_event(self) -> Message | DataReceived | CheckpointReceived | None:
        return self.incoming.next_event()

    def send(self, message: Message) -> list[Buffer]:
        return self.outgoing.send(message)

    def send_data(self, buffers: Iterable[Buffer], compression: Compression = "none") -> list[Buffer]:
        return self.outgoing.send_data(buffers, compression)
