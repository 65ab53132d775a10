"""What stands in the commit log: a record for each commit and each takeover (specs/fleet.md §3). No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgpack

from remus_ckpt.errors import Malformed
from remus_ckpt.fleet.engine import MAX_RECORD_BYTES
from remus_ckpt.wire.digest import DIGEST_BYTES
from remus_ckpt.wire.record import Position

VERSION = 1
WRITER_BYTES = 16
_WHERE_CHARS = 256
_MOST = (1 << 63) - 1


class Kind(StrEnum):
    """What a record says."""

    COMMIT = "commit"
    """Output up to this position may leave: a backup holds it."""
    TAKEOVER = "takeover"
    """A backup goes on from this position; the primary of every term below this one has ended."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a name.

    term: of the primary, or the new one of a takeover
    writer: 16 random bytes: of a primary's run, or of a store that takes over
    position: that is committed, or that work continues from
    where: who holds its bytes, for people
    time: when it was written, in seconds since 1970; for people too
    """

    kind: Kind
    term: int
    writer: bytes
    position: Position
    where: str = ""
    time: float = 0.0

    def pack(self) -> bytes:
        """Its bytes in the log."""
        fields = {
            "version": VERSION,
            "kind": str(self.kind),
            "term": self.term,
            "writer": self.writer,
            "epoch": self.position.epoch,
            "digest": self.position.digest,
            "where": self.where[:_WHERE_CHARS],
            "time": self.time,
        }
        packed: bytes = msgpack.packb(fields)
        return packed

    @staticmethod
    def unpack(data: bytes) -> Record:
        """The record in these bytes. Raises Malformed."""
        if len(data) > MAX_RECORD_BYTES:
            raise _malformed(f"{len(data):,} bytes; it has at most {MAX_RECORD_BYTES:,}")
        try:
            fields = msgpack.unpackb(data, max_map_len=64, max_array_len=64, max_ext_len=0)
        except Exception as error:  # msgpack raises ValueErrors of several kinds, and others
            raise _malformed(f"no map: {error}") from None
        if not isinstance(fields, dict):
            raise _malformed("no map")
        if fields.get("version") != VERSION:
            raise _malformed(f"version {fields.get('version')!r:.40}; {VERSION} is read here")
        try:
            kind = Kind(str(fields.get("kind")))
        except ValueError:
            raise _malformed(f"kind {fields.get('kind')!r:.40}") from None
        where, time = fields.get("where", ""), fields.get("time", 0.0)
        if not isinstance(where, str) or len(where) > _WHERE_CHARS or not isinstance(time, float | int):
            raise _malformed("where or time is of another type, or too long")
        position = Position(_whole(fields, "epoch"), _octets(fields, "digest", DIGEST_BYTES))
        return Record(
            kind, _whole(fields, "term"), _octets(fields, "writer", WRITER_BYTES), position, where, float(time)
        )


def _whole(fields: dict[Any, Any], key: str) -> int:
    value = fields.get(key)
    if type(value) is not int or not 0 <= value <= _MOST:
        raise _malformed(f"{key}: {value!r:.40} in place of a whole number")
    return value


def _octets(fields: dict[Any, Any], key: str, size: int) -> bytes:
    value = fields.get(key)
    if type(value) is not bytes or len(value) != size:
        raise _malformed(f"{key}: not {size} bytes")
    return value


def _malformed(text: str) -> Malformed:
    return Malformed(f"a record of the commit log: {text}", section="fleet.md §3")
