"""The record in the tail of our own streams: number, position, time and checksum (specs/stream.md §9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgpack

from remus_ckpt.errors import Malformed, UnknownFormat
from remus_ckpt.wire.digest import DEFAULT_DIGEST, DIGEST_BYTES, DIGESTS, DigestName, digest_of
from remus_ckpt.wire.xen.dialect import STREAM_CODECS

if TYPE_CHECKING:
    from remus_ckpt.pages import Buffer

RECORD_MAGIC = b"\x89REMUSck"
VERSIONS: dict[DigestName, int] = {"sha256": 1, "blake3": 2}
"""The version of the record that is written with a digest. Version 1 has no other; later ones name theirs."""
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
        cls,
        before: Position | None,
        body_digest: bytes,
        device_state: bytes,
        *,
        first_epoch: int = 0,
        digest: DigestName = DEFAULT_DIGEST,
    ) -> Position:
        """The position that follows `before` (None: nothing), from what the checkpoint held when it was first written.

        body_digest: of the checkpoint's bytes up to the end of its body (specs/stream.md §9.3)
        first_epoch: the number of a checkpoint that follows none
        digest: the one of the stream, by which body_digest was made; that of `before` may be another
        """
        epoch = first_epoch if before is None else before.epoch + 1
        held = held_before(before, epoch, digest) + body_digest + digest_of(digest, device_state)
        return cls(epoch, digest_of(digest, held))


def held_before(before: Position | None, epoch: int, digest: DigestName) -> bytes:
    """What the digest of a position begins with, which is known before its checkpoint is (specs/stream.md §9.3)."""
    chain = bytes(DIGEST_BYTES) if before is None else before.digest
    return b"remus position %d\0" % VERSIONS[digest] + chain + epoch.to_bytes(8, "little")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """What the tail of one of our checkpoints says, without its digest.

    epoch: number of the checkpoint; time_ns: when it was taken, according to the caller, or None
    codec: of the compressed checkpoints of this stream
    before, after: the position that this checkpoint follows (None: nothing) and the one that it makes
    device_state: the user's own bytes
    memory_bytes: size of memory if it ends within its last page, else None
    digest: the name of the digest that follows the record, and that makes the positions of its stream
    """

    epoch: int
    time_ns: int | None
    codec: str
    before: Position | None
    after: Position
    device_state: bytes = b""
    memory_bytes: int | None = None
    digest: DigestName = DEFAULT_DIGEST

    def pack(self) -> bytes:
        """The record's bytes, without the digest that follows them."""
        version = VERSIONS[self.digest]
        fields = {
            "version": version,
            "epoch": self.epoch,
            "time_ns": self.time_ns,
            "codec": self.codec,
            "before": None if self.before is None else [self.before.epoch, self.before.digest],
            "after": [self.after.epoch, self.after.digest],
            "device_state": self.device_state,
        }
        if version > 1:
            fields["digest"] = self.digest
        if self.memory_bytes is not None:
            fields["memory_bytes"] = self.memory_bytes
        packed: bytes = msgpack.packb(fields, use_bin_type=True)
        return RECORD_MAGIC + packed

    def split(self) -> tuple[bytes, bytes]:
        """What `pack` returns, without the digest after, and without the name and the bytes of the device state: what
        precedes the digest, and follows the state. The state must be empty."""
        front, _, back = self.pack().rpartition(device_state_head(0))
        return front[:-DIGEST_BYTES], back

    @classmethod
    def unpack(cls, data: Buffer, offset: int) -> CheckpointRecord:
        """Read what `pack` wrote.

        offset: of the record in the stream
        Raises Malformed, or UnknownFormat for a later version.
        """
        view = memoryview(data).cast("B")
        if view[: len(RECORD_MAGIC)] != RECORD_MAGIC:
            raise Malformed("the record is neither QEMU's nor one of ours", offset=offset, section=RECORD_SECTION)
        try:
            fields: Any = msgpack.unpackb(view[len(RECORD_MAGIC) :], raw=False, strict_map_key=True)
            version = fields["version"]
            if type(version) is not int or version not in VERSIONS.values():
                raise UnknownFormat(
                    f"the checkpoint's record has version {version!r:.40}; this program reads up to "
                    f"{max(VERSIONS.values())}: use the one that wrote the stream, or a later one",
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
                digest=_digest_name(fields["digest"]) if version > 1 else "sha256",
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


def device_state_head(size: int) -> bytes:
    """What precedes a device state of this many bytes in a record: its name, and the head of MessagePack's `bin`."""
    number = size.bit_length()
    head = b"\xc4" if number <= 8 else b"\xc5" if number <= 16 else b"\xc6"
    return b"\xacdevice_state" + head + size.to_bytes(1 << (head[0] - 0xC4), "big")


def _digest_name(value: Any) -> DigestName:
    for name in DIGESTS:
        if value == name:
            return name
    raise ValueError(f"the digest {value!r:.40}; there are {' and '.join(DIGESTS)}")


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r:.40} in place of a value of type {kind.__name__}")
    return value
