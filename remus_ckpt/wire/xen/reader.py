"""Bytes to events for the legacy save stream (specs/stream.md). No I/O, no clock.

A payload is received in place: nothing is copied twice.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Generator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.errors import Malformed, UnknownFormat
from remus_ckpt.limits import MAX_BATCH_ENTRIES, Limits
from remus_ckpt.pages import HAS_DATA, KNOWN_TYPE, PAGE_SIZE, pages_for
from remus_ckpt.wire.digest import DIGEST_BYTES, DigestName, NewDigest, Sums, new_digest
from remus_ckpt.wire.inbox import End, Inbox
from remus_ckpt.wire.record import RECORD_MAGIC, CheckpointRecord, Position
from remus_ckpt.wire.stream_reader import NEED_DATA
from remus_ckpt.wire.xen import chunks, events
from remus_ckpt.wire.xen.boundary import Boundary
from remus_ckpt.wire.xen.chunks import ChunkId, ChunkKind, Layout, Signature
from remus_ckpt.wire.xen.dialect import (
    CODEC_BYTES,
    FRONT_BYTES,
    FRONTS,
    V2_MAGIC,
    Dialect,
    detect_codec,
)
from remus_ckpt.wire.xen.headers import HeaderReader, Parser
from remus_ckpt.wire.xen.states import BODIES, StreamState
from remus_ckpt.wire.xen.whole import Whole

_BUFFER_BYTES = 1 << 18
_FIRST_BYTES = 8 << 20


class Reader(HeaderReader):
    """One stream, from its first byte to its last.

    dialect: what is known of the stream; the rest is detected
    limits: what the stream may claim
    strict: refuse deviations that are otherwise accepted and named in specs/permissive.md
    digest: the one of the stream's records, if that is known; otherwise the first record shows which it is, and until
        then each is computed
    new_digest: makes the digest of a checkpoint

    After `next_event` has raised Malformed or UnknownFormat, it raises the same error until `rewind`.
    """

    def __init__(
        self,
        dialect: Dialect | None = None,
        *,
        limits: Limits | None = None,
        strict: bool = False,
        digest: DigestName | None = None,
        new_digest: NewDigest = new_digest,
    ) -> None:
        inbox = Inbox(_BUFFER_BYTES, first_bytes=_FIRST_BYTES, on_consumed=self._take_digest)
        super().__init__(dialect or Dialect(), limits or Limits(), strict, inbox)
        self.new_digest = new_digest
        self.epoch = 0
        """The number of the checkpoint being read, counted from the beginning of this stream."""
        self.checkpoint_end = 0
        """The first byte after the last complete checkpoint."""
        self.takes_second_record = False
        """Whether libxl's second device model's record may follow the last checkpoint (specs/errata.md, E22)."""
        self._digest = digest
        self._sums: Sums | None = self._new_sums()
        self._position: Position | None = None  # from our last record
        self._opening = b""  # the first bytes of the checkpoint's compressed data
        self._parser = self._stream()

    @property
    def saw_last_checkpoint(self) -> bool:
        """Whether the stream has announced its last checkpoint."""
        return self._course.last_checkpoint

    @property
    def compressing(self) -> bool:
        """Whether batches are in format B now."""
        return self._course.in_compressed_body

    def boundary(self) -> Boundary:
        """The reader's place: the beginning, or after the tail that `next_event` has just returned."""
        if self._offset != self.checkpoint_end:
            raise ValueError("the reader is in the middle of a checkpoint")
        return Boundary(
            offset=self._offset,
            epoch=self.epoch,
            dialect=self.dialect,
            p2m_size=self._p2m_size,
            position=self._position,
            course=copy.copy(self._course),
            is_foreign=self._sums is None,
            digest=self._digest,
            deviations=tuple(map(copy.copy, self.deviations.values())),
        )

    def rewind(self, boundary: Boundary) -> None:
        """Drop everything after a boundary, including an error, and continue there: the bytes after it must be fed
        (again)."""
        self.dialect = boundary.dialect
        self.deviations = {deviation.name: copy.copy(deviation) for deviation in boundary.deviations}
        self.epoch = boundary.epoch
        self.checkpoint_end = boundary.offset
        self._course = copy.copy(boundary.course)
        self._parser.close()  # it may be in the middle of a payload that the inbox has lent
        self.inbox.reset(boundary.offset)
        self._error = None
        self._digest = boundary.digest
        self._sums = None if boundary.is_foreign else self._new_sums()
        self._position = boundary.position
        self._p2m_size = boundary.p2m_size
        self._opening = b""
        self._parser = self._stream() if self._course.state is StreamState.FRONT else self._checkpoints()

    @property
    def digest(self) -> DigestName | None:
        """The name of the digest of the stream's records; None while it is unknown."""
        return self._digest

    def fits(self, whole: Whole) -> bool:
        """Whether a walked checkpoint follows the last one read, and passes every check of this reader, except for its
        pages."""
        inbox, dialect, digest = self.inbox, self.dialect, self._digest
        base = inbox.offset
        if (
            digest is None
            or dialect.codec is None
            or self._position is None
            or self._error is not None
            or self.strict
            or inbox.buffered
            or base != self.checkpoint_end
            or self._course.state is not StreamState.COMPRESSED_BODY
            or self._course.last_checkpoint
            or (whole.word, whole.p2m_size) != (dialect.word, self._p2m_size)
            or max(size for _, size, _ in whole.chunks) > self.limits.compressed_chunk_bytes
            or len(whole.data) - whole.record_at > self.limits.device_state_bytes
            or not whole.is_intact()
        ):
            return False
        try:
            self._check_record(whole.record, digest, base + whole.record_at)
        except Malformed:
            return False
        return True

    def take_whole(self, whole: Whole) -> events.TailHvm:
        """Take a checkpoint that `fits`: the next bytes are those after it."""
        inbox, base = self.inbox, self.inbox.offset
        inbox.settle()
        inbox.received(len(whole.data))
        self._position = whole.after
        self.checkpoint_end = inbox.offset
        self.epoch += 1
        self._sums = self._new_sums()
        self._parser.close()  # it waits for the first chunk of the checkpoint that has just been taken
        self._parser = self._checkpoints()
        return events.TailHvm(
            magic_pfns=(0, 0, 0),
            context=b"",
            signature=Signature.REMUS,
            device_state=b"",
            record=whole.record,
            offset=base + whole.tail,
            end=inbox.offset,
        )

    def _take_digest(self, consumed: memoryview) -> None:
        if self._sums is not None:
            self._sums.update(consumed)

    def _new_sums(self) -> Sums:
        return Sums(self._digest, self.new_digest)

    # The grammar from the first chunk on, in the order of the specification

    def _stream(self) -> Parser:
        front = yield from self.inbox.peek(FRONT_BYTES)
        if front == V2_MAGIC:
            raise UnknownFormat(
                "this is a Xen v2 stream (from 4.6 on); only the legacy stream is read here",
                offset=0,
                section="stream.md §2.3",
            )
        for kind, (magic, section) in FRONTS.items():
            if front and magic.startswith(front):
                yield from self._file_header(kind, magic, section)
                break
        yield from self._header()
        yield from self._checkpoints()

    def _checkpoints(self) -> Parser:
        while self._course.state is not StreamState.DONE:
            if self.takes_second_record and self.epoch and (yield from self._second_record()):
                return
            while self._course.state in BODIES:
                yield from self._chunk()
            yield from self._tail()

    def _second_record(self) -> Generator[events.Event | None, None, bool]:
        """Errata E22: passes over the record, with which the stream ends. Returns whether there is one."""
        signature = Signature.XL.value
        if self.dialect.guest != "hvm" or self._position is not None:
            return False
        front = yield from self.inbox.peek(4)
        if len(front) < 4 or not signature.startswith(front):
            return False
        front = yield from self.inbox.peek(len(signature))
        if front != signature:
            if signature.startswith(front):
                raise End
            return False
        start = self._offset
        self.inbox.skip(len(signature))
        (size,) = yield from self.inbox.unpack(chunks.U32)
        self.limit(size, "device_state_bytes", start, "the device state's length", "stream.md §7.2", "tail")
        yield from self.inbox.array(size)
        self.checkpoint_end = self._offset
        self._course.last_checkpoint = True
        return True

    def _chunk(self) -> Parser:
        """§4.1"""
        start = self._offset
        (number,) = yield from self.inbox.unpack(chunks.I32)
        if number > MAX_BATCH_ENTRIES:
            self.refuse(
                f"a batch of {number} entries; it has at most {MAX_BATCH_ENTRIES}", start, "stream.md §5", "batch"
            )
        if number > 0:
            yield from self._batch(number, start)
            return
        if number == chunks.END_OF_BODY:
            yield from self._emit(events.EndOfBody(offset=start), "stream.md §4.1", "end of body")
            return
        kind = chunks.CHUNKS.get(number)
        if kind is None:
            self.refuse(f"there is no chunk {number}", start, "stream.md §4.1", f"chunk {number}")
        name = f"chunk {number} {kind.name}"
        if self._course.state is StreamState.ARMED_BODY:
            self.deviate("enable-compression-out-of-place", start, "stream.md §6.1", name)
        event = yield from self._read_chunk(kind, name, start)
        yield from self._emit(event, kind.section, name)

    def _read_chunk(self, kind: ChunkKind, name: str, start: int) -> Generator[events.Event | None, None, events.Event]:
        match kind.layout:
            case Layout.FLAG:
                return self._flag(kind, name, start)
            case Layout.PARAM:
                pad, value = yield from self.inbox.unpack(chunks.PARAM)
                if pad:
                    self.deviate("nonzero-pad", start, kind.section, name)
                return events.HvmParam(id=kind.id, value=value, pad=pad, offset=start)
            case Layout.TSC_INFO:
                mode, nsec, khz, incarnation = yield from self.inbox.unpack(chunks.TSC_INFO)
                return events.TscInfo(mode=mode, nsec=nsec, khz=khz, incarnation=incarnation, offset=start)
            case Layout.VCPU_INFO:
                return (yield from self._vcpu_info(kind, name, start))
            case Layout.BLOB:
                (size,) = yield from self.inbox.unpack(chunks.U32)
                self.limit(size, "toolstack_bytes", start, "its length", kind.section, name)
                data = yield from self.inbox.array(size)
                return events.Toolstack(data=data.tobytes(), offset=start)
            case Layout.COMPRESSED:
                return (yield from self._compressed_data(kind, name, start))
            case Layout.TMEM:
                return (yield from self._tmem(kind, name, start))
            case Layout.TMEM_EXTRA:
                return (yield from self._tmem_extra(kind, name, start))

    def _flag(self, kind: ChunkKind, name: str, start: int) -> events.Event:
        """§4.7"""
        if kind.id is ChunkId.LAST_CHECKPOINT:
            return events.LastCheckpoint(offset=start)
        if kind.id is ChunkId.ENABLE_VERIFY_MODE:
            return events.EnableVerifyMode(offset=start)
        # A second one in round 0 has already been noted by `_chunk`.
        if self._course.state not in (StreamState.FIRST_BODY, StreamState.ARMED_BODY):
            self.deviate("enable-compression-out-of-place", start, "stream.md §6.1", name)
        return events.EnableCompression(offset=start)

    def _batch(self, count: int, start: int) -> Parser:
        """§5"""
        if self._course.state is StreamState.ARMED_BODY:
            self.deviate("enable-compression-out-of-place", start, "stream.md §6.1", "batch")
        raw = yield from self.inbox.array(count * (self.dialect.word or 8))
        entries = raw.view(f"<u{self.dialect.word}")
        if int(entries.max()) < self._p2m_size:
            # All are normal pages of this memory, as in nearly every batch: there are no types to split off.
            pfns, types = entries.astype(np.uint64, copy=False), np.zeros(count, dtype=np.uint8)
            yield from self._batch_data(pfns, types, count, start)
            return
        if self.dialect.word == 8 and (entries >> 32).any():
            self.deviate("entry-high-bits", start, "stream.md §5.1", "batch")
        pfns = (entries & chunks.PFN_MASK).astype(np.uint64)
        types = (entries >> chunks.TYPE_SHIFT & 0xF).astype(np.uint8)
        if not KNOWN_TYPE[types].all():
            at = int((~KNOWN_TYPE[types]).argmax())
            self.refuse(f"entry {at} has the unknown page type {types[at]:#x}", start, "stream.md §5.2", "batch")
        with_data = HAS_DATA[types]
        beyond = with_data & (pfns >= self._p2m_size)
        if beyond.any():
            at = int(beyond.argmax())
            self.refuse(
                f"entry {at} is PFN {pfns[at]:#x}, memory has {self._p2m_size:#x} pages",
                start,
                "stream.md §5.1",
                "batch",
            )
        yield from self._batch_data(pfns, types, int(np.count_nonzero(with_data)), start)

    def _batch_data(self, pfns: NDArray[np.uint64], types: NDArray[np.uint8], pages: int, start: int) -> Parser:
        data = None
        if not self._course.in_compressed_body:
            flat = yield from self.inbox.array(pages * PAGE_SIZE)
            data = flat.reshape(-1, PAGE_SIZE)
        yield from self._emit(events.Batch(pfns=pfns, types=types, data=data, offset=start), "stream.md §5", "batch")

    def _vcpu_info(self, kind: ChunkKind, name: str, start: int) -> Generator[events.Event | None, None, events.Event]:
        """§4.2"""
        (highest,) = yield from self.inbox.unpack(chunks.I32)
        if highest < 0:
            self.refuse(f"the highest virtual CPU is {highest}", start, kind.section, name)
        self.limit(highest + 1, "vcpus", start, "the number of virtual CPUs", kind.section, name)
        data = yield from self.inbox.array((highest // 64 + 1) * 8)
        return events.VcpuInfo(highest_id=highest, online=tuple(data.view("<u8").tolist()), offset=start)

    def _compressed_data(
        self, kind: ChunkKind, name: str, start: int
    ) -> Generator[events.Event | None, None, events.Event]:
        """§6.2"""
        size = yield from self._word()
        if self._course.state is not StreamState.COMPRESSED_BODY:
            # Refuse it before reading its bytes: in round 0, Xen takes this chunk for the end of the body.
            self.refuse(f"it may not stand in the {self._course.state.value}", start, kind.section, name)
        self.limit(size, "compressed_chunk_bytes", start, "its length", kind.section, name)
        if not size:
            self.deviate("empty-compressed-data", start, kind.section, name)
        data = yield from self.inbox.array(size)
        if len(self._opening) < CODEC_BYTES:
            self._opening += data[: CODEC_BYTES - len(self._opening)].tobytes()
        return events.CompressedData(data=data, offset=start)

    def _tmem(self, kind: ChunkKind, name: str, start: int) -> Generator[events.Event | None, None, events.Event]:
        """§4.4"""
        version, max_pools, ones, flags, weight, cap, ones_too = yield from self.inbox.unpack(chunks.TMEM_HEADER)
        if (ones, ones_too) != (chunks.TMEM_ALL_ONES,) * 2:
            self.refuse("its head lacks the two words of ones", start, kind.section, name)
        pools = []
        while True:
            self.limit(self._offset - start, "tmem_bytes", start, "its length", kind.section, name)
            (pool_id,) = yield from self.inbox.unpack(chunks.U32)
            if pool_id == chunks.TMEM_ALL_ONES:
                break
            pool_flags, announced, *uuid = yield from self.inbox.unpack(struct.Struct("<2I2Q"))
            pages: list[events.TmemPage] = []
            while len(pages) < announced:
                oid = yield from self.inbox.unpack(chunks.TMEM_OID)
                if oid == chunks.TMEM_NO_OBJECT:
                    break
                (index,) = yield from self.inbox.unpack(chunks.U32)
                size = chunks.tmem_page_bytes(pool_flags)
                length = self._offset - start + size
                self.limit(length, "tmem_bytes", start, "its length", kind.section, name)
                data = yield from self.inbox.array(size)
                pages.append(events.TmemPage(object_id=oid, index=index, data=data.tobytes()))
            pools.append(
                events.TmemPool(
                    id=pool_id,
                    flags=pool_flags,
                    announced_pages=announced,
                    uuid=(uuid[0], uuid[1]),
                    pages=tuple(pages),
                )
            )
        return events.Tmem(
            version=version, max_pools=max_pools, flags=flags, weight=weight, cap=cap, pools=tuple(pools), offset=start
        )

    def _tmem_extra(self, kind: ChunkKind, name: str, start: int) -> Generator[events.Event | None, None, events.Event]:
        """§4.4"""
        keys: list[tuple[int, tuple[int, int, int], int]] = []
        while True:
            (pool_id,) = yield from self.inbox.unpack(chunks.U32)
            if pool_id == chunks.TMEM_ALL_ONES:
                return events.TmemExtra(keys=tuple(keys), offset=start)
            oid = yield from self.inbox.unpack(chunks.TMEM_OID)
            (index,) = yield from self.inbox.unpack(chunks.U32)
            self.limit(self._offset - start, "tmem_bytes", start, "its length", kind.section, name)
            keys.append((pool_id, oid, index))

    def _tail(self) -> Parser:
        """§7"""
        if self.dialect.codec is None and self._opening:
            self.dialect = replace(self.dialect, codec=detect_codec(self._opening))
        self._opening = b""
        if self.dialect.guest == "hvm":
            event = yield from self._tail_hvm()
        else:
            event = yield from self._tail_pv()
        self.checkpoint_end = self._offset
        self.epoch += 1
        if self._sums is not None:
            self.inbox.settle()
            self._sums = self._new_sums()
        yield from self._emit(event, "stream.md §7", "tail")

    def _tail_hvm(self) -> Generator[events.Event | None, None, events.Event]:
        """§7.1, §7.2"""
        start = self._offset
        magic_pfns = yield from self.inbox.unpack(chunks.HVM_MAGIC_PFNS)
        here = self._offset
        (size,) = yield from self.inbox.unpack(chunks.U32)
        self.limit(size, "hvm_context_bytes", here, "the HVM context's length", "stream.md §7.1", "tail")
        context = yield from self.inbox.array(size)
        here = self._offset
        yield from self.inbox.have(chunks.SIGNATURE_BYTES)
        raw = bytes(self.inbox.front(chunks.SIGNATURE_BYTES))
        try:
            signature = Signature(raw)
        except ValueError:
            self.refuse(f"the device model's record has the signature {raw!r}", here, "stream.md §7.2", "tail")
        self.inbox.skip(chunks.SIGNATURE_BYTES)
        if signature is Signature.QEMU and (yield from self.inbox.peek(1)) == b"\n":
            signature = Signature.XENSERVER
            self.inbox.skip(1)
        here = self._offset
        record = None
        if signature is Signature.QEMU:
            state = yield from self._rest(here)
            if len(state) < len(chunks.QEMU_MAGIC) and chunks.QEMU_MAGIC.startswith(state):
                raise End
            if not state.startswith(chunks.QEMU_MAGIC):
                self.refuse("the device state does not begin with QEVM", here, "stream.md §7.2", "tail")
            # The state ends where the bytes end, and so does the stream.
            self._course.last_checkpoint = True
        else:
            (size,) = yield from self.inbox.unpack(chunks.U32_BE if signature is Signature.XENSERVER else chunks.U32)
            self.limit(size, "device_state_bytes", here, "the device state's length", "stream.md §7.2", "tail")
            if signature is Signature.REMUS:
                has_our_shape = not any(magic_pfns) and not len(context)
                state, record = yield from self._remus_state(size, has_our_shape)
            else:
                state = (yield from self.inbox.array(size)).tobytes()
                self._course.last_checkpoint |= signature is Signature.XENSERVER
        if record is None:
            if self._position is not None:
                self.refuse("a checkpoint without a record follows one that has it", here, "stream.md §9.2", "tail")
            self._sums = None  # not one of ours: its digest is not needed
        return events.TailHvm(
            magic_pfns=magic_pfns,
            context=context.tobytes(),
            signature=signature,
            device_state=state,
            record=record,
            offset=start,
            end=self._offset,
        )

    def _rest(self, here: int) -> Generator[events.Event | None, None, bytes]:
        """All bytes up to the end of the stream (§7.2)."""
        parts = bytearray()
        while True:
            try:
                yield from self.inbox.have(1)
            except End:
                return bytes(parts)
            data = self.inbox.front(_BUFFER_BYTES)
            parts += data
            self.inbox.skip(len(data))
            self.limit(len(parts), "device_state_bytes", here, "the device state's length", "stream.md §7.2", "tail")

    def _remus_state(
        self, size: int, has_our_shape: bool
    ) -> Generator[events.Event | None, None, tuple[bytes, CheckpointRecord | None]]:
        """§9.2. A record of this signature is Xen's, or ours and right."""
        start = self._offset
        packed = yield from self.inbox.array(max(size - DIGEST_BYTES, 0))
        if packed[: len(RECORD_MAGIC)].tobytes() != RECORD_MAGIC:
            data = packed.tobytes()
            data += (yield from self.inbox.array(size - len(data))).tobytes()
            # Xen's tail is never of our shape, so that in this shape a damaged record of ours is none of Xen's.
            is_short = data.startswith(RECORD_MAGIC)
            if data.startswith(chunks.QEMU_MAGIC) or not (has_our_shape or is_short):
                return data, None
            self.refuse("the record is neither QEMU's nor one of ours", start, "stream.md §9.2", "tail")
        if self._sums is None:
            self.refuse("a checkpoint with a record behind one without it", start, "stream.md §9.2", "tail")
        self.inbox.settle()
        sums = self._sums.values()
        stated = (yield from self.inbox.array(DIGEST_BYTES)).tobytes()
        # The digest first: what it does not cover is not worth reading.
        found = next((name for name, value in sums.items() if value == stated), None)
        if found is None:
            self.refuse(
                f"the checkpoint's digest ({' or '.join(sums)}) is not the one it carries: bytes in it have changed",
                start,
                "stream.md §9.4",
                "tail",
            )
        record = CheckpointRecord.unpack(packed, start)
        self._check_record(record, found, start)
        self._position, self._digest = record.after, found
        return b"", record

    def _check_record(self, record: CheckpointRecord, digest: DigestName, start: int) -> None:
        """§9.2 to §9.4. digest: the one that the record carries; start: its offset"""
        if record.digest != digest:
            self.refuse(
                f"the record names the digest {record.digest} and carries {digest}", start, "stream.md §9.4", "tail"
            )
        if self._position is not None and record.before != self._position:
            self.refuse(
                f"the record follows position {record.before}, the checkpoint before made {self._position}",
                start,
                "stream.md §9.3",
                "tail",
            )
        if record.memory_bytes is not None and pages_for(record.memory_bytes) != self._p2m_size:
            self.refuse(
                f"the record speaks of {record.memory_bytes} bytes, which do not end in the last of "
                f"{self._p2m_size} pages",
                start,
                "stream.md §9.2",
                "tail",
            )
        if self.dialect.codec not in (None, record.codec):
            self.refuse(
                f"the record names the codec {record.codec!r}, the data are {self.dialect.codec!r}",
                start,
                "stream.md §9.2",
                "tail",
            )

    def _tail_pv(self) -> Generator[events.Event | None, None, events.Event]:
        """§7.3"""
        start = self._offset
        section = "stream.md §7.3"
        (count,) = yield from self.inbox.unpack(chunks.U32)
        if count > self._p2m_size:
            self.refuse(f"{count} PFNs are unmapped of {self._p2m_size}", start, section, "tail")
        word = self.dialect.word or 8
        unmapped = (yield from self.inbox.array(count * word)).view(f"<u{word}").astype(np.uint64)
        size = self._course.context_bytes or {8: 5168, 4: 2800}[word]
        vcpus = []
        for vcpu in self._course.vcpus:
            context = (yield from self.inbox.array(size)).tobytes()
            extended = None
            if self._course.extended_context:
                extended = (yield from self.inbox.array(chunks.EXTENDED_CONTEXT_BYTES)).tobytes()
            mask = xsave_size = None
            xsave = b""
            if self._course.xsave_bytes is not None:
                here = self._offset
                mask, xsave_size = yield from self.inbox.unpack(chunks.XSAVE_HEADER)
                expected = self._course.xsave_bytes - chunks.XSAVE_HEADER.size
                if xsave_size != expected:
                    self.deviate("xsave-size", here, section, "tail")
                xsave = (yield from self.inbox.array(expected)).tobytes()
            vcpus.append(
                events.VcpuContext(
                    id=vcpu, context=context, extended=extended, xsave_mask=mask, xsave_size=xsave_size, xsave=xsave
                )
            )
        shared_info = (yield from self.inbox.array(PAGE_SIZE)).tobytes()
        self._sums = None
        return events.TailPv(
            unmapped=unmapped, vcpus=tuple(vcpus), shared_info=shared_info, offset=start, end=self._offset
        )

    def _drain(self) -> Parser:
        """After the last checkpoint, or after a cut: count the rest without reading it."""
        for _ in self.inbox.drain():
            if not self.inbox.is_over:
                yield NEED_DATA
                continue
            trailing = self._offset - self.checkpoint_end
            complete = self.checkpoint_end > 0 and trailing == 0
            yield events.EndOfStream(complete=complete, trailing_bytes=trailing, offset=self._offset)
