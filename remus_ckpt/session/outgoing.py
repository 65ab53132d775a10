"""Messages to bytes (specs/session.md §1 and §2), by the rules of `rules`."""

from __future__ import annotations

from collections.abc import Iterable

from remus_ckpt.pages import Buffer
from remus_ckpt.session import frames
from remus_ckpt.session.frames import FrameType
from remus_ckpt.session.messages import Ack, Commit, Compression, Error, Message
from remus_ckpt.session.rules import STREAM, Common, Direction, SessionState, Side
from remus_ckpt.wire.record import Position
from remus_ckpt.wire.xen.whole import HAS_NATIVE, ack_frame, end_frames


class Outgoing(Direction):
    """Messages to bytes. Send the returned bytes before you ask for more: only the order of the frames says which
    follows which. Several sending threads must take turns."""

    def __init__(self, speaker: Side, common: Common) -> None:
        super().__init__(speaker, common)
        self.sent_bytes = 0
        self._packing = frames.Packing()
        self._prefaced = False

    def send(self, message: Message) -> list[Buffer]:
        """The bytes of a message; the first is preceded by the preface.

        Raises ValueError if the message is not allowed now, or if this side has ended the session, or the other side
        has by an Error. Error may be sent in every state, also after `next_event` has raised.
        """
        self._may_send()
        number = frames.TYPES[type(message)]
        payload = frames.pack(message)
        self._move(number, message, None)
        return self._out([frames.head(number, 0, len(payload), frames.extend(0, payload)) + payload])

    def send_durable(self, position: Position) -> list[Buffer]:
        """`send` of an Ack for a durable checkpoint, for those who cannot wait: its bytes without the message."""
        self._may_send()
        if not HAS_NATIVE or position not in self._common.made or not self._prefaced:
            return self.send(Ack(level="durable", position=position))
        return self._out([ack_frame(position)])

    def send_data(self, buffers: Iterable[Buffer], compression: Compression = "none") -> list[Buffer]:
        """DATA frames with the stream's next bytes; without compression, the given buffers are returned uncopied.

        buffers: as the sender of the stream yields them; they must not change before they are sent
        compression: not applied to a frame that it would not make shorter
        """
        self._may_send()
        welcome = self._common.welcome
        if compression != "none" and (welcome is None or compression not in welcome.compressions):
            raise ValueError(f"{compression} has not been agreed on")
        out: list[Buffer] = []
        for parts in frames.portions(buffers):
            self._move(FrameType.DATA, None, None)
            size = sum(len(part) for part in parts)
            self._stream_bytes += size
            packed = None if compression == "none" else self._packing.pack(compression, parts, size)
            if packed is not None:
                out += [
                    frames.head(FrameType.DATA, frames.FLAGS[compression], len(packed), frames.extend(0, packed)),
                    packed,
                ]
                continue
            crc = 0
            if self._has_checksums:
                for part in parts:
                    crc = frames.extend(crc, part)
            out.append(frames.head(FrameType.DATA, 0, size, crc))
            out += parts
        return self._out(out)

    def send_end(
        self,
        buffers: list[Buffer],
        compression: Compression = "none",
        *,
        position: Position,
        before: Position | None,
        stream_bytes: int,
        pages: int,
    ) -> list[Buffer]:
        """`send_data` of the last bytes of a checkpoint, if any are left, and `send` of its Commit, with these fields.

        buffers: each of single bytes in one dimension
        """
        common, size = self._common, sum(map(len, buffers))
        if (
            HAS_NATIVE
            and compression == "none"
            and 0 < size <= frames.DATA_BYTES
            and self._stream_bytes + size == stream_bytes
            and before is not None
            and before == self._position
            and before.epoch + 1 == position.epoch
            and common.states[self.speaker] in STREAM
        ):
            self._may_send()
            crc = 0
            if self._has_checksums:
                for buffer in buffers:
                    crc = frames.extend(crc, buffer)
            framed = end_frames(size, crc, position, before, stream_bytes, pages)
            common.states[self.speaker] = SessionState.BETWEEN
            self._stream_bytes = 0
            self._make(position)
            return self._out([framed[: frames.HEADER_BYTES], *buffers, framed[frames.HEADER_BYTES :]])
        commit = Commit(position=position, before=before, stream_bytes=stream_bytes, pages=pages)
        return (self.send_data(buffers, compression) if buffers else []) + self.send(commit)

    def _may_send(self) -> None:
        if self.ended_with is not None:
            raise ValueError(f"this side has ended the session: {self.ended_with}")
        if isinstance(self.answered_with, Error):
            raise ValueError(f"the other side has ended the session: {self.answered_with}")

    def _out(self, buffers: list[Buffer]) -> list[Buffer]:
        if buffers and not self._prefaced:
            self._prefaced = True
            buffers.insert(0, frames.PREFACE)
        self.sent_bytes += sum(len(buffer) for buffer in buffers)
        return buffers
