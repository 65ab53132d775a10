"""The primary's end of one session: what it sends, and a thread that hears what comes back (specs/session.md)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from remus_ckpt.errors import Fenced, LinkError, Malformed, Refused, RemusError, StreamError
from remus_ckpt.link.compression import Chooser
from remus_ckpt.link.connection import Connection
from remus_ckpt.link.flag import Flag
from remus_ckpt.pages import Buffer
from remus_ckpt.session.machine import Session
from remus_ckpt.session.messages import (
    MAX_EPOCH,
    MAX_LEASE_S,
    MIN_LEASE_S,
    Ack,
    Begin,
    Commit,
    Error,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Welcome,
)
from remus_ckpt.wire.record import Position

_FLUSH_BYTES = 1 << 20
_WELCOME_S = 30.0
_GOODBYE_S = 1.0
_LOOK_S = 0.25
"""So often who waits for a welcome looks whether it is still to be waited for."""


class Link:
    """One session with a backup, from its hello to its end.

    One thread makes it, sends and closes it. From `begin` on another one listens, calls back, and says that this side
    is there. Any thread may ask `check` and `peer`, look at `failed`, and `hang_up`.

    connection: to the backup, shaken hands
    hello: who we are
    on_ack: called for each acknowledgement, in the thread that hears it
    status: called for what goes with each heartbeat
    give_up: whether not to wait for the welcome any longer
    left_s: how many of so many seconds there are for who calls; by default all of them
    Raises Refused or Fenced if the backup will not have us, LinkError if it is lost, Malformed if it talks nonsense.
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
    ) -> None:
        session = Session("client")
        self._connection = connection
        self._on_ack = on_ack
        self._status = status
        self._left_s = left_s
        self._lease_s = _WELCOME_S  # until the welcome says better
        self._term = hello.term
        self._thread: threading.Thread | None = None
        # Who sends: the calling thread, but for what the listening one says between two frames.
        self._sending = threading.Lock()
        # Under it:
        self._outgoing = session.outgoing
        # Of the checkpoint that is being written: bytes, and seconds that sending them took.
        self._way_bytes, self._way_s = 0, 0.0
        # The calling thread's:
        self._pending: list[Buffer] = []
        self._pending_bytes = 0
        self._counted = 0
        # Who hears: the listening thread, once there is one.
        self._incoming = session.incoming
        self._heard = time.monotonic()
        # Written in one step by one thread, for the other to look at.
        # The last commit: the checkpoint's bytes, and when they would have begun if nothing but sending had taken time.
        self._probe: tuple[Position, int, float] | None = None
        self._closing = False
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

    def take_wire_bytes(self) -> int:
        """Bytes sent since this was asked last."""
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
                raise LinkError(f"{self.peer} took the connection and has not answered")
            else:
                self._receive(self._left_s(_LOOK_S))

    def _check_welcome(self, hello: Hello) -> None:
        """What no backup says that works: it is tried again, later. Raises Malformed."""
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

    # What goes out

    def begin(self, message: Begin) -> None:
        """Say what follows, and begin to listen."""
        self._post(message)
        thread = threading.Thread(target=self._listen, name=f"link to {self.peer}", daemon=True)
        try:
            self._thread = thread
            thread.start()
        except RuntimeError as error:  # there can be no more threads
            self._thread = None
            raise LinkError(f"{self.peer}: {error}") from error

    def write(self, buffers: list[Buffer]) -> None:
        """Bytes of the save stream, of a checkpoint whose commit follows. They are kept until then."""
        self._pending += buffers
        self._pending_bytes += sum(len(buffer) for buffer in buffers)
        if self._pending_bytes >= _FLUSH_BYTES:
            self._flush()

    def commit(self, message: Commit) -> None:
        """The end of a checkpoint."""
        self._flush(message)

    def _flush(self, commit: Commit | None = None) -> None:
        self.check()
        self._chooser.look(self._pending)
        with self._sending:
            try:
                frames = self._outgoing.send_data(self._pending, self._chooser.choose()) if self._pending else []
                if commit is not None:
                    frames += self._outgoing.send(commit)
            except ValueError:
                # The listening thread has read, since we checked, what ended the session, or has ended it.
                if self._outgoing.is_over:
                    raise self._reason(LinkError(f"{self.peer}: the session has ended")) from None
                raise
            begin = time.monotonic()
            self._way_bytes += sum(len(frame) for frame in frames)
            if commit is not None:
                # Before it is sent: the answer may be here before we are back.
                self._probe = commit.position, self._way_bytes, begin - self._way_s
            self._send(frames)
            self._way_s += time.monotonic() - begin
            if commit is not None:
                self._way_bytes, self._way_s = 0, 0.0
        self._pending = []
        self._pending_bytes = 0

    def _post(self, message: Message) -> None:
        with self._sending:
            self._send(self._outgoing.send(message))

    def _send(self, frames: list[Buffer]) -> None:
        try:
            self._connection.send(frames, self._left_s(self._lease_s))
        except LinkError as error:
            raise self._reason(error) from error

    def _reason(self, otherwise: LinkError) -> RemusError:
        """What the other side said before it closed, which is the better reason."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(self._left_s(1.0))
        return self._error or otherwise

    # What comes back

    def _receive(self, timeout_s: float) -> bool:
        """Take in what has come; whether anything has."""
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
        number = 0
        period = self._lease_s / 4
        beat = time.monotonic()
        try:
            while not self._closing:
                self._receive(max(beat - time.monotonic(), 0.0))
                while (event := self._incoming.next_event()) is not None:
                    self._take(event)
                now = time.monotonic()
                if now - self._heard > self._lease_s:
                    raise LinkError(f"{self.peer} has been silent for {now - self._heard:.1f} s")
                if now >= beat:
                    number += 1
                    # Behind data that do not move, a heartbeat would wait, and whoever wants to send wait for it.
                    if self._connection.is_writable() and self._sending.acquire(blocking=False):
                        try:
                            if not self._outgoing.is_over:  # behind a goodbye nothing follows
                                self._connection.send(
                                    self._outgoing.send(Heartbeat(number=number, status=self._status())),
                                    self._lease_s,
                                )
                        finally:
                            self._sending.release()
                    beat = now + period
        except StreamError as error:
            # Bytes may have changed on their way: another link may be well (specs/session.md §7).
            self._complain(error)
            self._fail(LinkError(f"{self.peer} sent what it must not: {error}"))
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
                # Who has taken over has a term that is not below ours: this one is mistaken, or lies.
                raise LinkError(f"{self.peer} refuses term {self._term} for the sake of term {event.term}")
            case Error():
                raise Refused(f"{self.peer}: {event.message}", code=event.code)
            case Goodbye():
                raise LinkError(f"{self.peer} has said goodbye: {event.reason}")

    def _complain(self, error: StreamError) -> None:
        """Tell the backup what was wrong with its bytes, where no other data stand in the way."""
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
        """Break it: who waits for the other side, in whatever thread, gets a LinkError."""
        self._connection.close()

    def check(self) -> None:
        """Raise what has ended the session, if anything has."""
        if self._error is not None:
            raise self._error

    def close(self, goodbye: str | None = None) -> None:
        """End the session; with a reason, tell the backup that this is no accident. May be called again."""
        if goodbye is not None and self._error is None and self._sending.acquire(timeout=self._left_s(_GOODBYE_S)):
            with suppress(RemusError, ValueError):  # it may be gone already
                try:
                    self._connection.send(self._outgoing.send(Goodbye(reason=goodbye)), self._left_s(_GOODBYE_S))
                finally:
                    self._sending.release()
                # Until it hangs up (specs/session.md §4): bytes that nobody reads here could undo the goodbye.
                if self._thread is not None and self._thread is not threading.current_thread():
                    self._thread.join(self._left_s(_GOODBYE_S))
        self._release()

    def _release(self) -> None:
        self._closing = True
        self._connection.close()
        # Alive: it may never have been started.
        if self._thread is not None and self._thread is not threading.current_thread() and self._thread.is_alive():
            self._thread.join(_GOODBYE_S)
        if self._thread in (None, threading.current_thread()) or not self._thread.is_alive():
            # Its traceback refers back to this link, whose buffers would stay until the next full garbage collection.
            self._error = None
            self._incoming.close()
        self.failed.close()
