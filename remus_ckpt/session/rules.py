"""Who may send what and when (specs/session.md §4 to §6). One table says it, for both directions and both sides."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, NoReturn, cast

from remus_ckpt.session import frames
from remus_ckpt.session.frames import FrameType
from remus_ckpt.session.messages import Ack, Begin, Commit, Error, Goodbye, Hello, Message, Welcome
from remus_ckpt.wire.record import Position

ACKABLE = 4096
"""How many commits back an acknowledgement may reach."""

Side = Literal["client", "server"]


class SessionState(Enum):
    """A state of the session; both sides go through the same ones."""

    START = "start"
    PRIMARY_HELLO = "hello of a primary, unanswered"
    CONTROL_HELLO = "hello of a client that sends requests, unanswered"
    WELCOMED = "welcome"
    BETWEEN = "stream, between checkpoints"
    WITHIN = "stream, within a checkpoint"
    CONTROL = "requests and replies"


TRANSITIONS: dict[tuple[SessionState, Side, FrameType], SessionState] = {
    (SessionState.START, "client", FrameType.HELLO): SessionState.PRIMARY_HELLO,  # CONTROL_HELLO by its role
    (SessionState.PRIMARY_HELLO, "server", FrameType.WELCOME): SessionState.WELCOMED,
    (SessionState.CONTROL_HELLO, "server", FrameType.WELCOME): SessionState.CONTROL,
    (SessionState.WELCOMED, "client", FrameType.BEGIN): SessionState.BETWEEN,
    (SessionState.BETWEEN, "client", FrameType.DATA): SessionState.WITHIN,
    (SessionState.WITHIN, "client", FrameType.DATA): SessionState.WITHIN,
    (SessionState.WITHIN, "client", FrameType.COMMIT): SessionState.BETWEEN,
    (SessionState.BETWEEN, "server", FrameType.ACK): SessionState.BETWEEN,
    (SessionState.WITHIN, "server", FrameType.ACK): SessionState.WITHIN,
    (SessionState.CONTROL, "client", FrameType.REQUEST): SessionState.CONTROL,
    (SessionState.CONTROL, "server", FrameType.REPLY): SessionState.CONTROL,
    **{
        (state, side, FrameType.HEARTBEAT): state
        for state in (SessionState.WELCOMED, SessionState.BETWEEN, SessionState.WITHIN, SessionState.CONTROL)
        for side in cast(tuple[Side, ...], ("client", "server"))
    },
    **{
        (state, side, number): state
        for state in SessionState
        for side in cast(tuple[Side, ...], ("client", "server"))
        for number in (FrameType.ERROR, FrameType.GOODBYE)
    },
}
"""A pair that is not here is an error (specs/session.md §4). Only one side can leave a state, so that frames which
cross on the way mean the same to both."""

STREAM = (SessionState.BETWEEN, SessionState.WITHIN)
"""In these a client sends DATA and COMMIT, and a server ACK."""


def _both(state: SessionState) -> dict[Side, SessionState]:
    return {"client": state, "server": state}


@dataclass
class Common:
    """What both directions of a session share. Each change is one atomic dict operation, or sets one field.

    hello, welcome, begin: as they were sent or received; they do not change once the stream has begun
    states: the state of each speaking side
    ended: the Error or Goodbye with which each side has ended
    made: the newest positions of this session, oldest first, which an ack may name; added by the client's direction
    """

    hello: Hello | None = None
    welcome: Welcome | None = None
    begin: Begin | None = None
    states: dict[Side, SessionState] = field(default_factory=lambda: _both(SessionState.START))
    ended: dict[Side, Message] = field(default_factory=dict)
    made: dict[Position, None] = field(default_factory=dict)


class Direction:
    """What one side sends, and so what it may send next. Each session has two, and each may have its own thread.

    speaker: the side whose frames go this way

    Hello, Welcome and Begin change the state of both directions: until Begin is complete, one thread must own both,
    except that another may send heartbeats. After that, only its own frames change the state of a direction.
    """

    def __init__(self, speaker: Side, common: Common) -> None:
        self.speaker: Side = speaker
        self._listener: Side = "server" if speaker == "client" else "client"
        self._common = common
        self._stream_bytes = 0  # since the last commit
        self._position: Position | None = None  # of the last commit, or the one that Begin names

    @property
    def state(self) -> SessionState:
        return self._common.states[self.speaker]

    @property
    def ended_with(self) -> Message | None:
        """The Error or Goodbye that ended this direction."""
        return self._common.ended.get(self.speaker)

    @property
    def answered_with(self) -> Message | None:
        """The Error or Goodbye that ended the other direction."""
        return self._common.ended.get(self._listener)

    @property
    def is_over(self) -> bool:
        """Whether either side has ended the session."""
        return bool(self._common.ended)

    @property
    def _has_checksums(self) -> bool:
        """Whether uncompressed DATA frames have a checksum of their payload (§2.3)."""
        welcome = self._common.welcome
        return welcome is None or welcome.digest is None

    def _move(self, number: FrameType, message: Message | None, offset: int | None) -> None:
        """Advance by one frame. offset: where it was received; None: it is to be sent, and a fault is a ValueError."""
        following = TRANSITIONS.get((self.state, self.speaker, number))
        if following is None:
            self._refuse(number, offset)
        common = self._common
        match message:
            case Hello():
                common.hello = message
                if message.role != "primary":
                    following = SessionState.CONTROL_HELLO
            case Welcome():
                assert common.hello is not None
                if message.version not in common.hello.versions:
                    frames.refuse(f"version {message.version} was not in the hello", offset, "§3.2", number)
                strange = set(message.compressions) - set(common.hello.compressions)
                if strange:
                    frames.refuse(f"compressions {sorted(strange)} were not in the hello", offset, "§3.2", number)
                if message.digest is not None and message.digest not in common.hello.digests:
                    frames.refuse(f"the digest {message.digest!r} was not in the hello", offset, "§3.2", number)
                common.welcome = message
            case Begin():
                self._check_begin(message, offset)
                common.begin = message
                self._position = message.position
                if message.position is not None:
                    common.made[message.position] = None
            case Commit():
                self._check_commit(message, offset)
                self._stream_bytes = 0
                self._make(message.position)
            case Ack():
                if message.position not in common.made:
                    frames.refuse(f"{message.position} is no position of this session", offset, "§3.6", number)
            case Error() | Goodbye():
                self._common.ended[self.speaker] = message
        if isinstance(message, Hello | Welcome | Begin):
            self._common.states.update(_both(following))
        else:
            self._common.states[self.speaker] = following

    def _make(self, position: Position) -> None:
        """A commit has made a position."""
        made = self._common.made
        self._position = position
        made[position] = None
        if len(made) > ACKABLE:
            del made[next(iter(made))]

    def _refuse(self, number: FrameType, offset: int | None) -> NoReturn:
        frames.refuse(f"the {self.speaker} may not say it in the state {self.state.name}", offset, "§4", number)

    def _check_begin(self, begin: Begin, offset: int | None) -> None:
        """§5"""
        welcome = self._common.welcome
        assert welcome is not None
        if begin.term != welcome.term:
            frames.refuse(f"term {begin.term} in a session of term {welcome.term}", offset, "§6", FrameType.BEGIN)
        if begin.mode == "continue" and (welcome.stream is None or begin.position != welcome.position):
            frames.refuse(f"it cannot be continued at {begin.position}", offset, "§5", FrameType.BEGIN)

    def _check_commit(self, commit: Commit, offset: int | None) -> None:
        """§3.5"""
        if commit.stream_bytes != self._stream_bytes:
            text = f"{commit.stream_bytes} bytes are committed of {self._stream_bytes}"
            frames.refuse(text, offset, "§3.5", FrameType.COMMIT)
        # The Begin of a full copy need not say what it follows.
        if self._position is not None and commit.before != self._position:
            text = f"it follows {commit.before}, the one before made {self._position}"
            frames.refuse(text, offset, "§5", FrameType.COMMIT)
