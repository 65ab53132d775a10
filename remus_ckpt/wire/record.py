"""The record in the tail of our own streams: number, position, time and checksum (specs/stream.md §9)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import msgpack

from remus_ckpt.errors import Malformed, UnknownFormat
from remus_ckpt.wire.xen.dialect import STREAM_CODECS

RECORD_MAGIC = b"\x89REMUSck"
RECORD_VERSION = 1
DIGEST_BYTES = 32
RECORD_SECTION = "stream.md §9.2"


@dataclass(frozen=True, slots=True)
class Position:
    """Names a state by its number and a chain of digests. It survives re-encoding, which a digest of bytes does not.

    epoch: number of the checkpoint, 0 for the first
    digest: 32 bytes
    """

    epoch: int
    digest: bytes

    def __post_init__(self) -> None:
        if not (isinstance(self.epoch, int) and 0 <= self.epoch < 1 << 63):
            raise ValueError(f"epoch {self.epoch!r} is not the number of a checkpoint")
        if not (isinstance(self.digest, bytes) and len(self.digest) == DIGEST_BYTES):
            raise ValueError(f"a digest has {DIGEST_BYTES} bytes")

    def __str__(self) -> str:
        return f"{self.epoch}:{self.digest.hex()[:16]}"

    @classmethod
    def after(
        cls, before: Position | None, body_digest: bytes, device_state: bytes, *, first_epoch: int = 0
    ) -> Position:
        """The position that follows `before` (None: nothing), from what the checkpoint held when it was first written.

        body_digest: SHA-256 of the checkpoint's bytes up to the end of its body (specs/stream.md §9.3)
        first_epoch: the number of a checkpoint that follows none
        """
        epoch = first_epoch if before is None else before.epoch + 1
        chain = hashlib.sha256(b"remus position 1\0")
        chain.update(bytes(DIGEST_BYTES) if before is None else before.digest)
        chain.update(epoch.to_bytes(8, "little"))
        chain.update(body_digest)
        chain.update(hashlib.sha256(device_state).digest())
        return cls(epoch, chain.digest())


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """What the tail of one of our checkpoints says, without its checksum.

    epoch: number of the checkpoint; time_ns: when it was taken, according to the caller, or None
    codec: of the compressed checkpoints of this stream
    before, after: the position that this checkpoint follows (None: nothing) and the one that it makes
    device_state: the user's own bytes
    memory_bytes: size of memory if it ends within its last page, else None
    """

    epoch: int
    time_ns: int | None
    codec: str
    before: Position | None
    after: Position
    device_state: bytes = b""
    memory_bytes: int | None = None

    def pack(self) -> bytes:
        """The record's bytes, without the SHA-256 that follows them."""
        fields = {
            "version": RECORD_VERSION,
            "epoch": self.epoch,
            "time_ns": self.time_ns,
            "codec": self.codec,
            "before": None if self.before is None else [self.before.epoch, self.before.digest],
            "after": [self.after.epoch, self.after.digest],
            "device_state": self.device_state,
        }
        if self.memory_bytes is not None:
            fields["memory_bytes"] = self.memory_bytes
        packed: bytes = msgpack.packb(fields, use_bin_type=True)
        return RECORD_MAGIC + packed

    @classmethod
    def unpack(cls, data: bytes, offset: int) -> CheckpointRecord:
        """Read what `pack` wrote.

        offset: of the record in the stream
        Raises Malformed, or UnknownFormat for a later version.
        """
        if not data.startswith(RECORD_MAGIC):
            raise Malformed("the record is neither QEMU's nor one of ours", offset=offset, section=RECORD_SECTION)
        try:
            fields: Any = msgpack.unpackb(data[len(RECORD_MAGIC) :], raw=False, strict_map_key=True)
            if fields["version"] != RECORD_VERSION:
                raise UnknownFormat(
                    f"the checkpoint's record has version {fields['version']!r}; this program reads {RECORD_VERSION}: "
                    "use the one that wrote the stream, or a later one",
                    offset=offset,
                    section=RECORD_SECTION,
                )
            before = fields["before"]
            record = cls(
                epoch=_typed(fields["epoch"], int),
                time_ns=None if fields["time_ns"] is None else _typed(fields["time_ns"], int),
                codec=_typed(fields["codec"], str),
                before=None if before is None else Position(*before),
                after=Position(*fields["after"]),
                device_state=_typed(fields["device_state"], bytes),
                memory_bytes=_typed(fields["memory_bytes"], int) if "memory_bytes" in fields else None,
            )
        except UnknownFormat:
            raise
        except (ValueError, TypeError, KeyError, msgpack.UnpackException, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise Malformed(
                f"the checkpoint's record cannot be read ({reason})", offset=offset, section=RECORD_SECTION
            ) from error
        if record.codec not in STREAM_CODECS:
            raise Malformed(f"the record names the codec {record.codec!r}", offset=offset, section=RECORD_SECTION)
        if record.after.epoch != record.epoch:
            raise Malformed(
                f"the record of epoch {record.epoch} leads to the position {record.after}",
                offset=offset,
                section=RECORD_SECTION,
            )
        if record.before is not None and record.before.epoch + 1 != record.epoch:
            raise Malformed(
                f"the record of epoch {record.epoch} follows the position {record.before}",
                offset=offset,
                section=RECORD_SECTION,
            )
        return record


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r:.40} in place of a value of type {kind.__name__}")
    return value
