"""One connection to a backup, from its first byte to its end: from a primary, a reader, or with control requests."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.errors import LimitExceeded, LinkError, Malformed, RemusError, StoreError, StreamError, UnknownFormat
from remus_ckpt.limits import Limits
from remus_ckpt.link.connection import Connection
from remus_ckpt.link.rights import Action
from remus_ckpt.observe.log import log
from remus_ckpt.pages import PAGE_SIZE, Buffer
from remus_ckpt.service.reader import Reader
from remus_ckpt.service.realtime import Realtime
from remus_ckpt.service.standby import Refusal, Standby
from remus_ckpt.session import frames, messages
from remus_ckpt.session.incoming import CheckpointReceived, DataReceived
from remus_ckpt.session.machine import Session
from remus_ckpt.session.messages import MAX_EPOCH, Role
from remus_ckpt.store import HistoryWriter, PeerIdentity
from remus_ckpt.version import __version__
from remus_ckpt.wire.record import Position
from remus_ckpt.wire.xen.whole import Whole

_HELLO_S = 5.0
_FRAME_S = 60.0
BEAT_S = 0.1
_END_S = 1.0
_RECEIVED_EVERY = 8
_REST_S = 0.02
"""How long the rest of a short checkpoint may take to come before its first part is looked at."""


Answer = Callable[[str, dict[str, Any]], dict[str, Any] | None]
"""The result of a method with its arguments, None if the method is unknown. Raises RemusError."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a backup offers to its peers.

    lease_s: the connection of a primary that is silent for twice this time is closed
    limits: what streams may claim
    report_phase: called with ("receiving" or "acknowledged", epoch)
    standby_of: lends the standby of a name for as long as its primary stays. Raises Refusal, StoreError
    reader_for: lends what answers a reader, by its address, for as long as it stays. Raises Refusal. It gets a function
        that raises Refusal for a name that this reader may not read
    note_refused: called with the name, the peer and the error when a primary is refused; returns whether that is news
    answer: the answer to a control request
    realtime: for threads that receive checkpoints, from the first commit on
    """

    lease_s: float
    limits: Limits
    report_phase: Callable[[str, int], None]
    standby_of: Callable[[str], AbstractContextManager[Standby]]
    reader_for: Callable[[str, Callable[[str], None]], AbstractContextManager[Reader]]
    note_refused: Callable[[str, str, Refusal | StoreError], bool]
    answer: Answer
    realtime: Realtime | None = None


def _result(answer: Answer, request: messages.Request) -> dict[str, Any]:
    try:
        result = answer(request.method, request.arguments)
    except RemusError as error:
        return {"error": str(error)}
    return {"error": f"there is no method {request.method!r} here"} if result is None else result


class _Silent(LinkError):
    """A peer that sends nothing; the peer is told why it is disconnected."""


def _code_of(error: StreamError) -> str:
    """The error code that a peer gets for a fault in its bytes (specs/session.md §7)."""
    if isinstance(error, UnknownFormat) and error.chunk == "HELLO":
        return "version"
    if isinstance(error, LimitExceeded):
        return "limit"
    return "malformed" if (error.section or "").startswith("session.md") else "stream"


class Peer:
    """One connection, from its handshake to its end, in a thread of its own.

    One other thread calls `beat`, any thread may call `end`; the rest runs in this connection's own thread. Only that
    thread writes the attributes that describe the peer; any thread may read them.
    """

    def __init__(self, offer: Offer, connection: Connection) -> None:
        self.connection = connection
        self.thread = threading.Thread(target=self._serve, name=f"peer {connection.peer}", daemon=True)
        self.is_evicted = False
        """Its place has been given to another peer; set by the accepting thread."""
        self.role: Role | None = None
        """What the peer is, by its hello; None before that."""
        self.run_id = b""
        self.status: dict[str, Any] = {}
        """What the primary last reported about itself."""
        self._offer = offer
        self._session: Session | None = None
        self._name = ""
        self._sending = threading.Lock()  # guards sending, and the next field
        self._beats = 0
        self._heard = time.monotonic()
        self._is_listening = True
        self._ended_with: str | None = None  # the code with which this side ended it
        self._counted = 0
        self._is_news = True  # whether the end of this session is worth a line in the log

    @property
    def identity(self) -> PeerIdentity:
        """Who the other side is, as its connection shows it."""
        connection = self.connection
        address = connection.address
        return PeerIdentity.shown(
            connection.peer, host=address.host, port=address.port, certificate=connection.certificate_name
        )

    @property
    def heard(self) -> float:
        """When anything last arrived; now, while this thread is not receiving: a slow disk here is not the peer's
        silence."""
        return self._heard if self._is_listening else time.monotonic()

    @property
    def session(self) -> Session:
        """The session. Raises ValueError before the handshake."""
        if self._session is None:
            raise ValueError("nothing can be said before the handshake")
        return self._session

    @property
    def _who(self) -> dict[str, Any]:
        """The log fields that identify the peer."""
        return {"peer": self.connection.peer} | ({"name": self._name} if self._name else {})

    # Called by others

    def beat(self) -> None:
        """Send a heartbeat, unless something else is being sent."""
        if self.role is None or not self._sending.acquire(blocking=False):
            return
        try:
            self._beats += 1
            message = messages.Heartbeat(number=self._beats, status={})
            # The accepting thread must not wait for a peer: a peer that cannot take even a heartbeat is gone.
            self.connection.send(self.session.send(message), BEAT_S)
        except (LinkError, TimeoutError):
            self.connection.close()  # the connection's own thread reports why
        except ValueError:
            pass  # too early or too late: no heartbeat may be sent before the welcome or after an error
        finally:
            self._sending.release()

    def end(self, code: str, message: str, term: int | None = None) -> None:
        """Tell the peer that the session is over, and why; its thread ends. Takes a moment at most."""
        self._ended_with = code
        self._try_say(messages.Error(code=code, message=message, term=term), _END_S)
        self.connection.close()

    # The thread

    def _serve(self) -> None:
        try:
            self.connection.handshake(_HELLO_S)
            self._session = Session("server")  # created late: no buffer for a peer that has not authenticated
            hello = self._await_hello()
            self.role = hello.role
            match hello.role:
                case "primary":
                    self._serve_primary(hello)
                case "reader":
                    self._demand("read")
                    with self._offer.reader_for(self.connection.peer, partial(self._demand, "read")) as reader:
                        self._serve_requests(reader.answer, _FRAME_S)
                case "control":
                    self._serve_requests(self._answer, self._offer.lease_s)
        except Refusal as error:
            self._say_goodbye(messages.Error(code=error.code, message=str(error), term=error.term))
            level = logging.WARNING if self._is_news else logging.DEBUG
            log("refused", level=level, **self._who, code=error.code, reason=str(error))
        except StreamError as error:
            code = _code_of(error)
            self._say_goodbye(messages.Error(code=code, message=str(error), offset=error.offset))
            # The session keeps the error; the traceback's frames would keep the checkpoint's memory and file alive.
            error.__traceback__ = None
            log("refused", level=logging.WARNING, **self._who, code=code, reason=str(error))
        except StoreError as error:
            self._say_goodbye(messages.Error(code="store", message=str(error)))
            level = logging.ERROR if self._is_news else logging.DEBUG
            log("store failed", level=level, **self._who, reason=str(error))
        except _Silent as error:
            self._say_goodbye(messages.Error(code="timeout", message=str(error)))
            log("connection lost", level=logging.WARNING, **self._who, reason=str(error))
        except (LinkError, TimeoutError) as error:
            if self._ended_with is not None:
                log("session ended", **self._who, code=self._ended_with)
            else:
                log("connection lost", level=logging.WARNING, **self._who, reason=str(error))
        except Exception as error:
            self._try_say(messages.Error(code="internal", message=f"{type(error).__name__}: {error}"))
            log("connection failed", level=logging.ERROR, error=error, **self._who)
        finally:
            self.connection.close()
            if self._session is not None:
                self._session.close()

    def _await_hello(self) -> messages.Hello:
        deadline = time.monotonic() + _HELLO_S
        while True:
            match self.session.next_event():
                case messages.Hello() as hello:
                    frames.negotiate(hello)
                    return hello
                case None:
                    self._receive(deadline - time.monotonic(), f"no hello in {_HELLO_S:g} s")

    def _receive(self, timeout_s: float, otherwise: str) -> None:
        self._heard, self._is_listening = time.monotonic(), True
        try:
            size = self.connection.recv_into(self.session.get_buffer(), max(timeout_s, 0.0))
        except TimeoutError:
            raise _Silent(otherwise) from None
        if not size:
            raise LinkError("the other side has closed the connection")
        incoming = self.session.incoming
        incoming.buffer_updated(size)
        if incoming.missing:
            # The rest of a checkpoint that has begun is about to come: it is cheaper to look at it as a whole.
            deadline = time.monotonic() + _REST_S
            while incoming.missing and (left_s := deadline - time.monotonic()) > 0:
                try:
                    size = self.connection.recv_into(incoming.get_buffer(), left_s)
                except TimeoutError:
                    break
                if not size:
                    break  # the next call says so
                incoming.buffer_updated(size)
        self._is_listening = False

    def say(self, message: messages.Message, timeout_s: float | None = None) -> None:
        """Send one message, within a lease by default. Raises TimeoutError; LinkError, also if the peer has been told
        that the session is over."""
        self._send(message, self._offer.lease_s if timeout_s is None else timeout_s)

    def _send(self, message: messages.Message | list[Buffer], timeout_s: float) -> None:
        """message: or its bytes"""
        if not self._sending.acquire(timeout=timeout_s):
            raise TimeoutError("the peer takes nothing")
        try:
            if self.session.last_sent is not None:
                raise LinkError("the session was ended here")
            buffers = message if isinstance(message, list) else self.session.send(message)
            self.connection.send(buffers, timeout_s)
        finally:
            self._sending.release()

    def _try_say(self, message: messages.Message, timeout_s: float | None = None) -> None:
        with suppress(LinkError, TimeoutError, ValueError):  # if it cannot be told, it cannot be told
            self.say(message, timeout_s)

    def _say_goodbye(self, message: messages.Message) -> None:
        self._try_say(message)
        # If we closed at once, data that the peer still sends would cause a reset, and destroy our last words unread.
        self.connection.finish(1.0)

    def _serve_requests(self, answer: Answer, timeout_s: float) -> None:
        """timeout_s: for the peer to take a reply"""
        self.say(messages.Welcome(program=f"remus_ckpt {__version__}", term=0, limits={}, lease_s=self._offer.lease_s))
        while True:
            match self.session.next_event():
                case messages.Request() as request:
                    self.say(messages.Reply(number=request.number, result=_result(answer, request)), timeout_s)
                case messages.Goodbye():
                    return
                case messages.Error() as error:
                    raise LinkError(error.message)
                case None:
                    self._receive(_FRAME_S, f"nothing was asked in {_FRAME_S:g} s")

    def _demand(self, action: Action, name: str | None = None) -> None:
        """Raises Refusal if the peer's certificate does not allow it (specs/keys.md §2). name: None for any one"""
        rights = self.connection.rights
        if not rights.allows(action, name):
            what = action if name is None else f"{action} for {name!r:.80}"
            text = f"the certificate {self.connection.certificate_name!r} does not allow {what}"
            raise Refusal("forbidden", f"{text}; it allows {rights} (remus-ckpt keys issue --may, --for-name)")

    def _answer(self, method: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
        if method == "failover":
            self._demand("failover", str(arguments.get("name")))
        elif method.startswith("disk-"):
            self._demand("protect", str(arguments.get("name")))
        elif method == "events":
            self._demand("read", str(arguments.get("name")))
        return self._offer.answer(method, arguments)

    def _serve_primary(self, hello: messages.Hello) -> None:
        self._demand("protect", hello.name)
        if hello.page_size != PAGE_SIZE:
            raise Refusal("limit", f"pages of {hello.page_size} bytes; here they have {PAGE_SIZE}")
        most = self._offer.limits.memory_bytes
        if hello.memory_pages * PAGE_SIZE > most:
            text = f"a memory of {hello.memory_pages * PAGE_SIZE:,} bytes; this backup takes {most:,} (--max-memory)"
            raise Refusal("limit", text)
        self.run_id = hello.run
        self._name = hello.name
        with ExitStack() as stack:
            try:
                self._host(stack.enter_context(self._offer.standby_of(hello.name)), hello)
            except (Refusal, StoreError) as error:
                # Noted before the standby is given back: an empty one is kept for a primary that tries again.
                self._is_news = self._offer.note_refused(hello.name, self.identity.text, error)
                raise

    def _host(self, standby: Standby, hello: messages.Hello) -> None:
        with standby.hosting(self, hello) as writer:
            self.say(standby.welcome(hello, self._offer.limits))
            last_frame = time.monotonic()
            while True:
                event = self.session.next_event()
                if event is not None:
                    last_frame = time.monotonic()
                match event:
                    case messages.Begin():
                        standby.begin(hello, event)
                        self.session.lender = writer
                        self.session.incoming.walk_whole()
                        log(
                            "receiving",
                            level=standby.log_level,
                            name=hello.name,
                            peer=self.connection.peer,
                            mode=event.mode,
                            position=event.position and str(event.position),
                        )
                    case DataReceived(size, data):
                        if data is None:
                            writer.buffer_updated(size)
                        else:
                            writer.feed(data)
                        self._offer.report_phase("receiving", 0)
                    case CheckpointReceived(whole):
                        self._offer.report_phase("receiving", 0)
                        if not self._commit_whole(standby, writer, whole):
                            self._commit(standby, writer, event.commit)
                    case messages.Commit():
                        self._commit(standby, writer, event)
                    case messages.Heartbeat():
                        self.status = event.status
                    case messages.Goodbye():
                        standby.said_goodbye(event.reason)
                        return
                    case messages.Error():
                        raise LinkError(f"it ended the session: {event.message}")
                    case None:
                        if time.monotonic() - last_frame > _FRAME_S:
                            raise _Silent(f"no whole frame in {_FRAME_S:g} s")
                        silence_s = 2 * self._offer.lease_s
                        self._receive(silence_s, f"silent for {silence_s:g} s")

    def _commit(self, standby: Standby, writer: HistoryWriter, commit: messages.Commit) -> None:
        begin = time.monotonic()
        if commit.position.epoch > MAX_EPOCH:
            raise Refusal("limit", f"epoch {commit.position.epoch}; there are {MAX_EPOCH}")
        staged = writer.check(commit.position)
        record = staged.record
        if record is None or record.before != commit.before or staged.page_count != commit.pages:
            raise Malformed(
                f"{commit.pages} pages behind {commit.before} are committed of a checkpoint of {staged.page_count} "
                f"behind {record and record.before}",
                offset=self.session.received_bytes,
                section="session.md §3.5",
                chunk="COMMIT",
            )
        standby.admit(record.device_state)
        is_base = (arriving := writer.arriving) is not None and arriving.is_base
        if self._tells_received(commit.position):
            self.say(messages.Ack(level="received", position=commit.position))
        writer.store()
        self.say(messages.Ack(level="durable", position=commit.position))
        changed = None if is_base else staged.pfns
        self._stored(standby, writer, commit.position, begin, commit.pages, commit.stream_bytes, changed)

    def _commit_whole(self, standby: Standby, writer: HistoryWriter, whole: Whole) -> bool:
        """Commit a checkpoint that has come as a whole; False if it has only been taken in, as all others are.

        The acknowledgement comes before all that can wait.
        """
        position, begin, faults = whole.after, time.monotonic(), list[Exception]()
        if position.epoch > MAX_EPOCH:
            writer.feed(whole.data)
            return False

        def try_to(act: Callable[[], Any]) -> Any:
            try:
                return None if faults else act()
            except (LinkError, TimeoutError) as error:
                faults.append(error)
            except ValueError as error:  # another thread has just ended the session
                faults.append(LinkError(str(error)))
            return None

        def on_staged() -> Callable[[], None]:
            if self._tells_received(position):
                try_to(lambda: self.say(messages.Ack(level="received", position=position)))
            frames = try_to(lambda: self.session.outgoing.send_durable(position))
            return lambda: try_to(lambda: self._send(frames, self._offer.lease_s))

        standby.admit(whole.device_state)
        if not writer.store_whole(whole, on_staged):
            return False
        if faults:
            raise faults.pop()  # not by a name: its traceback refers to this frame, which would keep the checkpoint
        self._stored(standby, writer, position, begin, len(whole.pfns), len(whole.data), whole.pfns)
        return True

    def _tells_received(self, position: Position) -> bool:
        # Each acknowledgement costs time here that the disk needs. Where `durable` says the same a little later,
        # `received` is sent only now and then, for those who measure the link by it.
        return self._wait == "received" or position.epoch % _RECEIVED_EVERY == 0

    @property
    def _wait(self) -> messages.Level:
        """The level at which the primary counts a checkpoint as committed."""
        return "durable" if self.session.begin is None else self.session.begin.wait

    def _stored(
        self,
        standby: Standby,
        writer: HistoryWriter,
        position: Position,
        begin: float,
        pages: int,
        stream_bytes: int,
        changed: NDArray[np.int64] | None,
    ) -> None:
        """What comes behind the acknowledgement. changed: its pages; None for a full copy"""
        self._offer.report_phase("acknowledged", position.epoch)
        before, self._counted = self._counted, self.connection.bytes_received
        standby.stored(
            position,
            time.monotonic() - begin,
            raw_bytes=pages * PAGE_SIZE,
            encoded_bytes=stream_bytes,
            wire_bytes=self._counted - before,
        )
        writer.apply()
        standby.applied()
        if changed is not None:
            standby.note_changed(changed)
        if self._offer.realtime is not None:
            self._offer.realtime.enter()
        if self._wait == "applied":
            self.say(messages.Ack(level="applied", position=position))
