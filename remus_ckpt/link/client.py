"""The primary's end of one session: what it sends, and a thread that listens for the replies (specs/session.md)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from remus_ckpt.errors import Fenced, LinkError, Malformed, Refused, RemusError, StreamError
from remus_ckpt.flag import Flag
from remus_ckpt.link.compression import Chooser
from remus_ckpt.link.connection import Connection
from remus_ckpt.pages import Buffer
from remus_ckpt.session.machine import Session
from remus_ckpt.session.messages import (
    MAX_EPOCH,
    MAX_LEASE_S,
    MIN_LEASE_S,
    Ack,
    Begin,
    Compression,
    Error,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Welcome,
)
from remus_ckpt.wire.record import Position

_FLUSH_BYTES = 256 << 10
"""This many bytes of a checkpoint are sent while more of it is made, so that the backup stores them in the meantime."""
_WELCOME_S = 30.0
_GOODBYE_S = 1.0
_LOOK_S = 0.25
"""How often a wait for the welcome checks whether to give up."""
_TRUST_S = 1.0
"""How often an open session checks whether the backup's certificate has been revoked."""


class Link:
    """One session with a backup, from its hello to its end.

    One thread creates, uses and closes the link. From `begin` on, another thread listens, calls the callbacks and sends
    heartbeats. Any thread may call `check` and `hang_up`, and read `peer` and `failed`.

    connection: to the backup, with its handshake done
    hello: who we are
    on_ack: called for each acknowledgement, in the listening thread
    status: returns what goes with each heartbeat
    give_up: whether to stop waiting for the welcome
    left_s: how many of the given seconds the current call may still use; by default all of them
    on_listening: called in the listening thread as it starts
    Raises Refused or Fenced if the backup rejects us, LinkError if it is lost, Malformed if its bytes are invalid.
    """

    def __init__(
        self,
        connection: Connection,
        hello: Hello,
        *,
        on_ack: Callable[[Ack], None],
        status: Callable[[], dict[str, Any]],
        give_up: Callable[[], bool] = lambda: False,
        left_s: Callable[[float], float] = lambda seconds: seconds,
        compression: str = "auto",
        on_listening: Callable[[], None] = lambda: None,
    ) -> None:
        session = Session("client")
        self._connection = connection
        self._on_ack = on_ack
        self._status = status
        self._left_s = left_s
        self._on_listening = on_listening
        self._lease_s = _WELCOME_S  # until the welcome names the real one
        self._term = hello.term
        self._thread: threading.Thread | None = None
        # Held to send: by the calling thread, or by the listening thread for a message between two frames.
        self._sending = threading.Lock()
        # Guarded by it:
        self._outgoing = session.outgoing
        # Of the checkpoint that is being written: bytes, and seconds that sending them took.
        self._way_bytes, self._way_s = 0, 0.0
        self._beats = 0
        # Owned by the calling thread:
        self._pending: list[Buffer] = []
        self._pending_bytes = 0
        self._counted = 0
        # Owned by the listening thread, once there is one.
        self._incoming = session.incoming
        self._heard = time.monotonic()
        # Written in one step by one thread, read by the other.
        # The last commit: the checkpoint's bytes, and when they would have begun if nothing but sending had taken time.
        self._probe: tuple[Position, int, float] | None = None
        self._closing = False
        self._is_beat_owed = False  # a heartbeat could not be sent when it was due
        self._error: RemusError | None = None
        try:
            self.failed = Flag()
        except OSError as error:
            raise LinkError(f"{self.peer}: {error.strerror}") from error
        """Set once the session has failed."""
        try:
            self._post(hello)
            self.welcome = self._await_welcome(give_up)
            self._check_welcome(hello)
        except BaseException:
            self._release()
            raise
        self._lease_s = self.welcome.lease_s
        self._term = self.welcome.term
        self._chooser = Chooser(compression, self.welcome.compressions)

    @property
    def peer(self) -> str:
        """Address and name of the backup."""
        return self._connection.peer

    @property
    def compression(self) -> Compression:
        """What data are compressed with now."""
        return self._chooser.choice

    @property
    def compression_why(self) -> str:
        """Why, in words."""
        return "; ".join(self._chooser.reasons)

    def take_wire_bytes(self) -> int:
        """Bytes sent since the last call."""
        before, self._counted = self._counted, self._connection.bytes_sent
        return self._counted - before

    def _await_welcome(self, give_up: Callable[[], bool]) -> Welcome:
        deadline = time.monotonic() + _WELCOME_S
        while True:
            event = self._incoming.next_event()
            if isinstance(event, Welcome):
                return event
            if event is not None:
                self._take(event)
            elif time.monotonic() > deadline or give_up():
                raise LinkError(f"{self.peer} accepted the connection but has not answered")
            else:
                self._receive(self._left_s(_LOOK_S))

    def _check_welcome(self, hello: Hello) -> None:
        """Refuse a welcome that no working backup sends; the primary tries again later. Raises Malformed."""
        welcome = self.welcome
        fault = None
        if hello.term is not None and welcome.term != hello.term:
            fault = f"a welcome under term {welcome.term} for a primary of term {hello.term} (§6)"
        elif not MIN_LEASE_S <= welcome.lease_s <= MAX_LEASE_S:
            fault = f"a lease of {welcome.lease_s:g} s; it has {MIN_LEASE_S:g}…{MAX_LEASE_S:g}"
        elif max(welcome.highest_epoch or 0, welcome.position.epoch if welcome.position else 0) > MAX_EPOCH:
            fault = f"epochs above {MAX_EPOCH}"
        if fault is not None:
            raise Malformed(f"{self.peer}: {fault}", section="session.md §3.2", chunk="WELCOME")

    # Sending

    def begin(self, message: Begin) -> None:
        """Announce what follows, and start to listen."""
        self._post(message)
        thread = threading.Thread(target=self._listen, name=f"link to {self.peer}", daemon=True)
        try:
            self._thread = thread
            thread.start()
        except RuntimeError as error:  # no more threads are allowed
            self._thread = None
            raise LinkError(f"{self.peer}: {error}") from error

    def write(self, buffers: list[Buffer]) -> None:
        """Send bytes of a checkpoint in the save stream; the buffers are kept until its commit."""
        self._pending += buffers
        self._pending_bytes += sum(len(buffer) for buffer in buffers)
        if self._pending_bytes >= _FLUSH_BYTES:
            self._flush()

    def commit(self, position: Position, before: Position | None, stream_bytes: int, pages: int) -> None:
        """Send the end of a checkpoint; the fields of `Commit`."""
        self._flush(position, before, stream_bytes, pages)

    def _flush(
        self, commit: Position | None = None, before: Position | None = None, stream_bytes: int = 0, pages: int = 0
    ) -> None:
        self.check()
        self._chooser.look(self._pending)
        with self._sending:
            try:
                # During a first copy, the listening thread rarely finds the way free.
                frames = self._heartbeat() if self._is_beat_owed else []
                pending, way = self._pending, self._chooser.choose()
                if commit is not None:
                    frames += self._outgoing.send_end(
                        pending, way, position=commit, before=before, stream_bytes=stream_bytes, pages=pages
                    )
                else:
                    frames += self._outgoing.send_data(pending, way)
            except ValueError:
                # Since our check, the listening thread has read the message that ended the session, or has ended it.
                if self._outgoing.is_over:
                    raise self._reason(LinkError(f"{self.peer}: the session has ended")) from None
                raise
            begin = time.monotonic()
            self._way_bytes += sum(len(frame) for frame in frames)
            if commit is not None:
                # Set this before sending: the answer may arrive before `send` returns.
                self._probe = commit, self._way_bytes, begin - self._way_s
            self._send(frames)
            self._way_s += time.monotonic() - begin
            if commit is not None:
                self._way_bytes, self._way_s = 0, 0.0
        self._pending = []
        self._pending_bytes = 0

    def _heartbeat(self) -> list[Buffer]:
        self._is_beat_owed = False
        self._beats += 1
        return self._outgoing.send(Heartbeat(number=self._beats, status=self._status()))

    def _post(self, message: Message) -> None:
        with self._sending:
            self._send(self._outgoing.send(message))

    def _send(self, frames: list[Buffer]) -> None:
        try:
            self._connection.send(frames, self._left_s(self._lease_s))
        except LinkError as error:
            raise self._reason(error) from error

    def _reason(self, otherwise: LinkError) -> RemusError:
        """The reason the other side gave before it closed, or else `otherwise`."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(self._left_s(1.0))
        return self._error or otherwise

    # Receiving

    def _receive(self, timeout_s: float) -> bool:
        """Take in what has arrived; returns whether anything has."""
        try:
            size = self._connection.recv_into(self._incoming.get_buffer(), timeout_s)
        except TimeoutError:
            return False
        if not size:
            raise LinkError(f"{self.peer} has closed the connection")
        self._heard = time.monotonic()
        self._incoming.buffer_updated(size)
        return True

    def _listen(self) -> None:
        period = self._lease_s / 4
        beat = check = looked_at = time.monotonic()
        try:
            self._on_listening()
            while not self._closing:
                self._receive(max(min(beat, check) - time.monotonic(), 0.0))
                while (event := self._incoming.next_event()) is not None:
                    self._take(event)
                now = time.monotonic()
                if now - looked_at > self._lease_s / 2:
                    self._heard = now  # this thread stood still: that is not the backup's silence
                looked_at = now
                if now - self._heard > self._lease_s:
                    raise LinkError(f"{self.peer} has been silent for {now - self._heard:.1f} s")
                if now >= check:
                    check = now + _TRUST_S
                    if (fault := self._connection.distrust()) is not None:
                        raise LinkError(f"{self.peer}: its certificate {fault}")
                if now >= beat:
                    # If the connection is stalled, a heartbeat would wait, and hold up other senders.
                    if self._connection.is_writable() and self._sending.acquire(blocking=False):
                        try:
                            if not self._outgoing.is_over:  # nothing may follow a goodbye
                                self._connection.send(self._heartbeat(), self._lease_s)
                        finally:
                            self._sending.release()
                    else:
                        self._is_beat_owed = True
                    beat = now + period
        except StreamError as error:
            # Bytes may have been corrupted in transit: another link may work (specs/session.md §7).
            self._complain(error)
            self._fail(LinkError(f"{self.peer} broke the protocol: {error}"))
        except RemusError as error:
            self._fail(error)
        except Exception as error:
            if self._outgoing.is_over:  # a heartbeat was due when we had just said goodbye
                self._fail(LinkError(f"{self.peer}: the session has ended"))
                return
            self._fail(LinkError(f"the link to {self.peer} broke: {type(error).__name__}: {error}"))
            raise

    def _take(self, event: object) -> None:
        match event:
            case Ack():
                position, size, begin = self._probe or (None, 0, 0.0)
                if event.level == "received" and event.position == position:
                    self._chooser.received(size, time.monotonic() - begin)
                self._on_ack(event)
            case Error(code="fenced", term=int() as term) if self._term is None or term >= self._term:
                raise Fenced(event.message, term=term)
            case Error(code="fenced"):
                # A side that has taken over has a term not below ours: this one is mistaken, or lies.
                raise LinkError(f"{self.peer} refuses term {self._term}: term {event.term} has taken its place")
            case Error():
                raise Refused(f"{self.peer}: {event.message}", code=event.code)
            case Goodbye():
                raise LinkError(f"{self.peer} has said goodbye: {event.reason}")

    def _complain(self, error: StreamError) -> None:
        """Tell the backup what was wrong with its bytes, if no other data block the way."""
        if self._sending.acquire(blocking=False):
            try:
                with suppress(RemusError, ValueError):
                    message = Error(code="malformed", message=str(error), offset=error.offset)
                    self._connection.send(self._outgoing.send(message), 1.0)
            finally:
                self._sending.release()

    def _fail(self, error: RemusError) -> None:
        if self._error is None and not self._closing:
            self._error = error
            self.failed.set()
        self._connection.close()

    def hang_up(self) -> None:
        """Break the link: any thread that waits for the other side gets a LinkError."""
        self._connection.close()

    def check(self) -> None:
        """Raise the error that has ended the session, if there is one."""
        if self._error is not None:
            raise self._error

    def close(self, goodbye: str | None = None) -> None:
        """End the session; with a reason, tell the backup that this is intended. May be called again."""
        if goodbye is not None and self._error is None and self._sending.acquire(timeout=self._left_s(_GOODBYE_S)):
            with suppress(RemusError, ValueError):  # it may be gone already
                try:
                    self._connection.send(self._outgoing.send(Goodbye(reason=goodbye)), self._left_s(_GOODBYE_S))
                finally:
                    self._sending.release()
                # Wait until the backup hangs up (specs/session.md §4): unread bytes here could destroy the goodbye.
                if self._thread is not None and self._thread is not threading.current_thread():
                    self._thread.join(self._left_s(_GOODBYE_S))
        self._release()

    def _release(self) -> None:
        self._closing = True
        self._connection.close()
        # `is_alive`, since the thread may never have been started.
        if self._thread is not None and self._thread is not threading.current_thread() and self._thread.is_alive():
            self._thread.join(_GOODBYE_S)
        if self._thread in (None, threading.current_thread()) or not self._thread.is_alive():
            # Its traceback refers back to this link, whose buffers would stay until the next full garbage collection.
            self._error = None
            self._incoming.close()
        self.failed.close()
