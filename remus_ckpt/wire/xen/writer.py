"""Events to bytes for the legacy save stream, by the same tables as `Reader` (specs/stream.md).

Each list of buffers is for one vectored send: payloads are passed on uncopied, nothing is joined.
"""

from __future__ import annotations

import struct
from copy import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.limits import MAX_BATCH_ENTRIES
from remus_ckpt.pages import Buffer
from remus_ckpt.wire.digest import DEFAULT_DIGEST, DIGEST_BYTES, DigestName, digest_of, new_digest
from remus_ckpt.wire.record import CheckpointRecord, Position, device_state_head, held_before
from remus_ckpt.wire.xen import chunks, events
from remus_ckpt.wire.xen.chunks import ChunkId, Signature
from remus_ckpt.wire.xen.dialect import FRONTS, Word
from remus_ckpt.wire.xen.states import BODIES, TRANSITIONS, Course, EventKind, StreamState

_JOINED_BYTES = 128 << 10
"""A device state of up to this many bytes is copied, so that the end of a checkpoint is one piece, which is cheaper."""
_END = chunks.I32.pack(chunks.END_OF_BODY)
_TAIL = chunks.HVM_MAGIC_PFNS.pack(0, 0, 0) + chunks.U32.pack(0) + Signature.REMUS.value
"""Of our own streams, in front of the record's length."""


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of a checkpoint of our own, as far as it can be made before its body.

    epoch: of the checkpoint; held: what the digest of its position begins with
    front, back: of its record, before the digest of its position and after its device state
    """

    epoch: int
    held: bytes
    front: bytes
    back: bytes


class EventWriter:
    """One stream, event by event. Raises ValueError for an event that may not come next.

    word: bytes of the toolstack's unsigned long
    digest: the one of its records, if it is a stream of our own
    """

    def __init__(self, word: Word = 8, digest: DigestName = DEFAULT_DIGEST) -> None:
        self.word = word
        self._digest: DigestName = digest
        self.offset = 0
        """Bytes written so far."""
        self._course = Course()
        self._hash = new_digest(self._digest)
        self._unhashed = memoryview(b"")
        self._border = copy(self._course)  # where the last checkpoint ended
        self._state = self._seen(b"")  # of the last end: it seldom changes

    def _seen(self, device_state: bytes) -> tuple[bytes, bytes, bytes]:
        """A device state, its digest, and what precedes it in a record."""
        return device_state, digest_of(self._digest, device_state), device_state_head(len(device_state))

    def abandon(self) -> None:
        """Forget what was written since the last tail: another checkpoint takes its place."""
        self._course = copy(self._border)
        self._hash = new_digest(self._digest)
        self._unhashed = memoryview(b"")

    @property
    def compressing(self) -> bool:
        """Whether batches are in format B now."""
        return self._course.in_compressed_body

    def write(self, event: events.Event) -> list[Buffer]:
        """The bytes of an event."""
        where = self._course.state
        if self._course.step(event) is None:
            raise ValueError(f"{type(event).__name__} may not stand in the {where.value}")
        self._hash_rest()
        buffers = self._layout(event)
        for buffer in buffers:
            self._hash.update(buffer)
        if isinstance(event, events.TailHvm) and event.record is not None:
            # The digest covers everything before it, including its own record.
            buffers.append(self._hash.digest())
        if isinstance(event, events.Tail):
            self._hash = new_digest(self._digest)
            self._border = copy(self._course)
        self.offset += sum(len(buffer) for buffer in buffers)
        return buffers

    def prepare_end(
        self, *, epoch: int, time_ns: int | None, codec: str, before: Position | None, memory_bytes: int | None
    ) -> Ending:
        """Prepare the part of our checkpoint's end that does not depend on its body, while nothing waits for it."""
        record = CheckpointRecord(
            epoch=epoch,
            time_ns=time_ns,
            codec=codec,
            before=before,
            after=Position(epoch, bytes(DIGEST_BYTES)),
            memory_bytes=memory_bytes,
            digest=self._digest,
        )
        return Ending(epoch, held_before(before, epoch, self._digest), *record.split())

    def end(self, ending: Ending, device_state: bytes, after: Position | None = None) -> tuple[list[Buffer], Position]:
        """The bytes that `write` would return for the end of the body and the tail, and the position that is in them.

        after: that position, if the checkpoint has one already
        """
        course = self._course
        following = course.state
        if following is not StreamState.COMPRESSED_BODY or course.last_checkpoint:
            tail, kind = BODIES.get(following), EventKind.LAST_TAIL if course.last_checkpoint else EventKind.TAIL
            if tail is None:
                raise ValueError(f"the end of a body may not stand in the {course.state.value}")
            following = TRANSITIONS[tail, kind]
        if device_state != self._state[0]:
            self._state = self._seen(device_state)
        _, state_digest, head = self._state
        running = self._hash
        self._hash_rest()
        running.update(_END)
        if after is None:
            after = Position(ending.epoch, digest_of(self._digest, ending.held + running.digest() + state_digest))
        size = len(ending.front) + len(head) + len(device_state) + len(ending.back) + 2 * DIGEST_BYTES
        # The digest covers everything before it, including its own record.
        front = b"".join((_TAIL, chunks.U32.pack(size), ending.front, after.digest, head))
        closing: list[Buffer]
        if len(device_state) <= _JOINED_BYTES:
            rest = b"".join((front, device_state, ending.back))
            running.update(rest)
            closing = [b"".join((_END, rest, running.digest()))]
        else:
            for piece in (front, device_state, ending.back):
                running.update(piece)
            closing = [_END + front, device_state, ending.back + running.digest()]
        course.state = following
        self._hash = new_digest(self._digest)
        self._border = course.__copy__()
        self.offset += sum(map(len, closing))
        return closing, after

    def laid_out_bytes(self, pages: int) -> int:
        """Bytes that `lay_out` needs for this many pages."""
        batches = -(-pages // MAX_BATCH_ENTRIES)
        return (batches + 1) * chunks.I32.size + (pages + 1) * self.word

    def lay_out(self, pfns: NDArray[np.int64], payload_bytes: int, out: NDArray[np.uint8]) -> None:
        """Lay out what `write` would return for normal pages in format B: their batches, and the head of the
        COMPRESSED_DATA that holds them (§5, §6.2). Nothing is written yet.

        out: uint8[laid_out_bytes]; the payload follows it
        """
        at, id_size = 0, chunks.I32.size
        for start in range(0, len(pfns), MAX_BATCH_ENTRIES):
            batch = pfns[start : start + MAX_BATCH_ENTRIES]
            stop = at + id_size + len(batch) * self.word
            out[at : at + id_size].data[:] = self._id(len(batch))
            out[at + id_size : stop].view(f"<u{self.word}")[:] = batch
            at = stop
        out[at:].data[:] = self._id(ChunkId.COMPRESSED_DATA) + self._word(payload_bytes)

    def write_laid_out(self, data: NDArray[np.uint8]) -> list[Buffer]:
        """Write what `lay_out` made, and the payload after it. Raises ValueError outside a compressed body.

        It is hashed when more is written, so that it can be sent before: it must not change until then.
        """
        if not self.compressing:
            raise ValueError(f"pages in format B may not stand in the {self._course.state.value}")
        self._hash_rest()
        self._unhashed = data.data
        self.offset += len(data)
        return [data.data]

    def _hash_rest(self) -> None:
        if len(self._unhashed):
            self._hash.update(self._unhashed)
            self._unhashed = memoryview(b"")

    def digest(self) -> bytes:
        """The digest of the current checkpoint so far."""
        self._hash_rest()
        return self._hash.digest()

    def _layout(self, event: events.Event) -> list[Buffer]:
        match event:
            case events.FileHeader():
                return self._file_header(event)
            case events.Header():
                return self._header(event)
            case events.Batch():
                return self._batch(event)
            case events.CompressedData():
                return [self._id(ChunkId.COMPRESSED_DATA) + self._word(len(event.data)), _flat(event.data)]
            case events.VcpuInfo():
                count = event.highest_id // 64 + 1
                return [self._id(ChunkId.VCPU_INFO) + struct.pack(f"<i{count}Q", event.highest_id, *event.online)]
            case events.HvmParam():
                return [self._id(event.id) + chunks.PARAM.pack(event.pad, event.value)]
            case events.TscInfo():
                return [
                    self._id(ChunkId.TSC_INFO)
                    + chunks.TSC_INFO.pack(event.mode, event.nsec, event.khz, event.incarnation)
                ]
            case events.Toolstack():
                return [self._id(ChunkId.TOOLSTACK) + chunks.U32.pack(len(event.data)), event.data]
            case events.Tmem():
                return self._tmem(event)
            case events.TmemExtra():
                keys = [chunks.U32.pack(p) + chunks.TMEM_OID.pack(*o) + chunks.U32.pack(i) for p, o, i in event.keys]
                return [self._id(ChunkId.TMEM_EXTRA) + b"".join(keys) + chunks.U32.pack(chunks.TMEM_ALL_ONES)]
            case events.EnableVerifyMode():
                return [self._id(ChunkId.ENABLE_VERIFY_MODE)]
            case events.LastCheckpoint():
                return [self._id(ChunkId.LAST_CHECKPOINT)]
            case events.EnableCompression():
                return [self._id(ChunkId.ENABLE_COMPRESSION)]
            case events.EndOfBody():
                return [self._id(chunks.END_OF_BODY)]
            case events.TailHvm():
                return self._tail_hvm(event)
            case events.TailPv():
                return self._tail_pv(event)
        raise TypeError(f"{type(event).__name__} does not belong in a stream")

    @staticmethod
    def _id(number: int) -> bytes:
        return chunks.I32.pack(number)

    def _word(self, value: int) -> bytes:
        return value.to_bytes(self.word, "little")

    def _file_header(self, event: events.FileHeader) -> list[Buffer]:
        """§2"""
        length = len(event.data)
        head = {
            "xl": struct.pack("<4I", 0x01020304, event.mandatory_flags, event.optional_flags, length),
            "xend": struct.pack(">i", length),
            "libvirt": chunks.LIBVIRT_HEADER.pack(1, length),
            "xenserver": b"",
        }
        return [FRONTS[event.kind].magic + head[event.kind], event.data]

    def _header(self, event: events.Header) -> list[Buffer]:
        """§3"""
        parts = [self._word(event.p2m_size)]
        if event.guest == "pv":
            if event.extended_info is not None:
                blocks = [struct.pack("<4sI", block.id, len(block.data)) + block.data for block in event.extended_info]
                parts.append(self._word(chunks.EXTENDED_INFO_MARK[self.word]))
                parts.append(chunks.U32.pack(sum(map(len, blocks))))
                parts += blocks
            assert event.p2m_frames is not None
            parts.append(event.p2m_frames.astype(f"<u{self.word}").tobytes())
        return [b"".join(parts)]

    def _batch(self, event: events.Batch) -> list[Buffer]:
        """§5"""
        if self.compressing != (event.data is None):
            raise ValueError(f"a batch {'with' if self.compressing else 'without'} data in the {self._course.state}")
        entries = event.pfns | event.types.astype(np.uint64) << np.uint64(chunks.TYPE_SHIFT)
        head: list[Buffer] = [self._id(len(entries)) + entries.astype(f"<u{self.word}").tobytes()]
        if event.data is not None and len(event.data):
            head.append(_flat(event.data))
        return head

    def _tmem(self, event: events.Tmem) -> list[Buffer]:
        """§4.4"""
        ones = chunks.TMEM_ALL_ONES
        head = chunks.TMEM_HEADER.pack(event.version, event.max_pools, ones, event.flags, event.weight, event.cap, ones)
        parts: list[Buffer] = [self._id(ChunkId.TMEM) + head]
        for pool in event.pools:
            parts.append(chunks.TMEM_POOL.pack(pool.id, pool.flags, pool.announced_pages, *pool.uuid))
            for page in pool.pages:
                parts += [chunks.TMEM_OID.pack(*page.object_id) + chunks.U32.pack(page.index), page.data]
            if len(pool.pages) < pool.announced_pages:
                parts.append(chunks.TMEM_OID.pack(*chunks.TMEM_NO_OBJECT))
        parts.append(chunks.U32.pack(ones))
        return parts

    def _tail_hvm(self, event: events.TailHvm) -> list[Buffer]:
        """§7.1, §7.2"""
        if event.record is None:
            state, size = event.device_state, len(event.device_state)
        else:
            if event.record.digest != self._digest:
                raise ValueError(f"a record with {event.record.digest} in a stream with {self._digest}")
            state = event.record.pack()
            size = len(state) + DIGEST_BYTES
        head = chunks.HVM_MAGIC_PFNS.pack(*event.magic_pfns) + chunks.U32.pack(len(event.context)) + event.context
        head += event.signature.value
        if event.signature is not Signature.QEMU:
            head += (chunks.U32_BE if event.signature is Signature.XENSERVER else chunks.U32).pack(size)
        return [head, state]

    def _tail_pv(self, event: events.TailPv) -> list[Buffer]:
        """§7.3"""
        parts = [chunks.U32.pack(len(event.unmapped)) + event.unmapped.astype(f"<u{self.word}").tobytes()]
        for vcpu in event.vcpus:
            parts.append(vcpu.context)
            if vcpu.extended is not None:
                parts.append(vcpu.extended)
            if vcpu.xsave_mask is not None and vcpu.xsave_size is not None:
                parts.append(chunks.XSAVE_HEADER.pack(vcpu.xsave_mask, vcpu.xsave_size) + vcpu.xsave)
        parts.append(event.shared_info)
        return [b"".join(parts)]


def _flat(data: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> memoryview:
    return memoryview(np.ascontiguousarray(data).reshape(-1))
