"""Streams as the grammar reads them, and as we do."""

from __future__ import annotations

import dataclasses
import json
import lzma
import re
import shlex
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from remus_ckpt import Limits, Sender
from remus_ckpt.pages import HAS_DATA, PAGE_SIZE, PageBatch
from remus_ckpt.wire.record import CheckpointRecord, Position
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.chunks import CHUNKS, MAX_P2M_SIZE, ChunkId, Layout, Signature
from remus_ckpt.wire.xen.dialect import Dialect
from remus_ckpt.wire.xen.reader import Reader
from remus_ckpt.wire.xen.writer import EventWriter

kaitaistruct = pytest.importorskip("kaitaistruct", reason="kaitaistruct is not installed: it is in the extra `test`")

ROOT = Path(__file__).resolve().parents[1]
SPECS = ROOT / "specs"
GRAMMAR = SPECS / "grammar" / "remus_stream.ksy"
TOOL = ROOT / "tools" / "grammar.py"
VECTORS = SPECS / "vectors"


NO_COMPILER = 3
"""What tools/grammar.py exits with where there is no compiler."""
REFUSALS = (kaitaistruct.KaitaiStructError, EOFError, ValueError)
"""What a compiled grammar raises: a rule that is broken, bytes that are missing, a negative length."""


def parse(grammar: Any, data: bytes, word: int, guest: str) -> Any:
    """The tree of a stream."""
    stream = kaitaistruct.KaitaiStream(kaitaistruct.BytesIO(data))
    return grammar(word, grammar.Guest[guest], stream)


# A tree as events


def events_of_tree(tree: Any, data: bytes) -> Iterator[events.Event]:
    """What the reader would say of it."""
    if tree.has_file_header:
        front = tree.file_header
        kind: Any = type(front).__name__.removesuffix("Header").lower()
        flags = {}
        if kind == "xl":
            flags = {"mandatory_flags": front.mandatory_flags, "optional_flags": front.optional_flags}
        yield events.FileHeader(kind=kind, data=getattr(front, "data", b""), offset=0, **flags)
    yield _header(tree)
    for checkpoint in tree.checkpoints:
        for chunk in checkpoint.chunks:
            yield _batch(chunk, tree.word) if chunk.id > 0 else _chunk(chunk)
        begin, end = checkpoint.chunks[-1].after.offset, checkpoint.after.offset
        make = _tail_hvm if tree.guest.name == "hvm" else _tail_pv
        yield make(checkpoint.tail, begin, end)
    trailing = len(tree.trailing)
    yield events.EndOfStream(complete=not trailing, trailing_bytes=trailing, offset=len(data))


def _header(tree: Any) -> events.Header:
    header = tree.header
    extended = frames = None
    if tree.guest.name == "pv":
        if header.pv.has_extended_info:
            # `_raw_data` is what the generated code keeps of a field that has a type.
            blocks = [(block.name.encode("latin-1"), block._raw_data) for block in header.pv.extended_info.blocks]
            extended = tuple(events.ExtendedInfo(id=name, data=content) for name, content in blocks)
        frames = np.array([header.pv.first, *(entry.value for entry in header.pv.rest)], dtype=np.uint64)
    return events.Header(
        word=tree.word,
        guest=tree.guest.name,
        p2m_size=header.p2m_size.value,
        extended_info=extended,
        p2m_frames=frames,
        offset=header.offset,
    )


def _batch(chunk: Any, word: int) -> events.Batch:
    entries = chunk.batch.entries
    data = None
    if chunk.batch.has_pages:
        data = np.frombuffer(b"".join(chunk.batch.pages), dtype=np.uint8).reshape(-1, PAGE_SIZE)
    return events.Batch(
        pfns=np.array([entry.pfn for entry in entries], dtype=np.uint64),
        types=np.array([entry.page_type for entry in entries], dtype=np.uint8),
        data=data,
        offset=chunk.offset,
    )


def _chunk(chunk: Any) -> events.Event:
    offset = chunk.offset
    if not chunk.id:
        return events.EndOfBody(offset=offset)
    number, payload = ChunkId(chunk.id), chunk.payload
    match CHUNKS[number].layout:
        case Layout.FLAG:
            flags: dict[ChunkId, type[events.Event]] = {
                ChunkId.ENABLE_VERIFY_MODE: events.EnableVerifyMode,
                ChunkId.LAST_CHECKPOINT: events.LastCheckpoint,
                ChunkId.ENABLE_COMPRESSION: events.EnableCompression,
            }
            assert type(payload).__name__ == "Flag"
            return flags[number](offset=offset)
        case Layout.PARAM:
            return events.HvmParam(id=number, value=payload.value, pad=payload.pad, offset=offset)
        case Layout.VCPU_INFO:
            online = struct.unpack(f"<{len(payload.map) // 8}Q", payload.map)
            return events.VcpuInfo(highest_id=payload.highest, online=online, offset=offset)
        case Layout.TSC_INFO:
            fields = {name: getattr(payload, name) for name in ("mode", "nsec", "khz", "incarnation")}
            return events.TscInfo(**fields, offset=offset)
        case Layout.BLOB:
            return events.Toolstack(data=payload.data, offset=offset)
        case Layout.COMPRESSED:
            return events.CompressedData(data=np.frombuffer(payload.data, dtype=np.uint8), offset=offset)
        case Layout.TMEM:
            fields = {name: getattr(payload, name) for name in ("version", "max_pools", "flags", "weight", "cap")}
            return events.Tmem(pools=tuple(_pool(pool) for pool in payload.pools[:-1]), **fields, offset=offset)
        case Layout.TMEM_EXTRA:
            keys = tuple((key.pool_id, tuple(key.object_id), key.index) for key in payload.keys[:-1])
            return events.TmemExtra(keys=keys, offset=offset)


def _pool(pool: Any) -> events.TmemPool:
    pages = getattr(pool, "pages", [])
    return events.TmemPool(
        id=pool.id,
        flags=pool.flags,
        announced_pages=pool.num_announced,
        uuid=tuple(pool.uuid),
        pages=tuple(
            events.TmemPage(object_id=tuple(page.object_id), index=page.index, data=page.data)
            for page in pages
            if not page.is_end
        ),
    )


def _tail_hvm(tail: Any, begin: int, end: int) -> events.TailHvm:
    state, record, signature = b"", None, tail.signature.encode()
    if tail.is_endless and tail.record.is_xenserver:
        state, signature = tail.record.data, signature + b"\n"
    elif tail.is_endless:
        state = tail.record.magic + tail.record.rest
    elif tail.is_own:
        fields = msgpack.unpackb(tail.record.body.own.map)
        before, after = fields["before"], fields["after"]
        record = CheckpointRecord(
            digest=fields.get("digest", "sha256"),
            epoch=fields["epoch"],
            time_ns=fields["time_ns"],
            codec=fields["codec"],
            before=None if before is None else Position(*before),
            after=Position(*after),
            device_state=fields["device_state"],
            memory_bytes=fields.get("memory_bytes"),
        )
    elif tail.signature == "RemusDeviceModelState":
        state = tail.record.body.xen_state
    else:
        state = tail.record.data
    return events.TailHvm(
        magic_pfns=tuple(tail.magic_pfns),
        context=tail.context,
        signature=Signature(signature),
        device_state=state,
        record=record,
        offset=begin,
        end=end,
    )


def _tail_pv(tail: Any, begin: int, end: int) -> events.TailPv:
    vcpus = []
    for place in tail.vcpus:
        if place.is_online:
            state, xsave = place.state, getattr(place.state, "xsave", None)
            vcpus.append(
                events.VcpuContext(
                    id=place.number,
                    context=state.context,
                    extended=getattr(state, "extended_context", None),
                    xsave_mask=None if xsave is None else xsave.mask,
                    xsave_size=None if xsave is None else xsave.size,
                    xsave=b"" if xsave is None else xsave.data,
                )
            )
    return events.TailPv(
        unmapped=np.array([entry.value for entry in tail.unmapped], dtype=np.uint64),
        vcpus=tuple(vcpus),
        shared_info=tail.shared_info,
        offset=begin,
        end=end,
    )


def plain(value: Any) -> Any:
    """Something that == compares, arrays with their type and shape."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, events.Event):
        return type(value).__name__, {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


def read(data: bytes, dialect: Dialect) -> tuple[list[events.Event], Reader]:
    """What the reader says of a stream that ends here. Raises StreamError."""
    reader = Reader(dialect, limits=Limits(memory_bytes=(MAX_P2M_SIZE + 1) * PAGE_SIZE))
    reader.feed(data)
    reader.feed_eof()
    found: list[events.Event] = []
    while not (found and isinstance(found[-1], events.EndOfStream)):
        event = reader.next_event()
        assert event is not None
        found.append(event)
    return found, reader


def compare(grammar: Any, data: bytes, dialect: Dialect | None = None) -> list[events.Event]:
    """Both see the same in a stream, field by field. Returns what they see.

    Where it is cut, the grammar misses bytes, and sees the same in what stands before the cut.
    """
    found, reader = read(data, dialect or Dialect())
    # Where the bytes end before the dialect can be told, it makes no difference.
    word, guest = reader.dialect.word or 8, reader.dialect.guest or "hvm"
    *said, end = found
    assert isinstance(end, events.EndOfStream)
    if not end.complete and not (reader.saw_last_checkpoint and isinstance(said[-1], events.Tail)):
        # A file header is recognised by 12 bytes; fewer are taken for p2m_size.
        with pytest.raises(EOFError if len(data) >= 12 else REFUSALS):
            parse(grammar, data, word, guest)
        if not reader.checkpoint_end:
            return found
        data = data[: reader.checkpoint_end]
        found, _ = read(data, reader.dialect)
    tree = parse(grammar, data, word, guest)
    seen = list(events_of_tree(tree, data))
    assert [type(event).__name__ for event in seen] == [type(event).__name__ for event in found]
    for ours, reads in zip(seen, found, strict=True):
        assert plain(ours) == plain(reads)
    _compare_counts(tree, found)
    return found


def _compare_counts(tree: Any, found: list[events.Event]) -> None:
    """The entries with data that each body announces."""
    counts, count = [], 0
    for event in found:
        if isinstance(event, events.Batch):
            count += int(HAS_DATA[event.types].sum())
        elif isinstance(event, events.EndOfBody):
            counts.append(count)
            count = 0
    assert [checkpoint.after.announced_pages for checkpoint in tree.checkpoints] == counts


# Streams


def page(fill: int) -> bytes:
    return bytes([fill]) * PAGE_SIZE


def sent(word: int, codec: str, checkpoints: int = 3) -> bytes:
    """A stream of ours: page tables and entries without data among the pages, batches cut by the page buffer."""
    sender = Sender(64, codec=codec, word=word, buffer_pages=5)
    random = np.random.default_rng(word)
    out = bytearray()
    for number in range(checkpoints):
        scan = []
        for first in (0, 20, 40):
            pfns = np.arange(first, first + 9, dtype=np.uint64)
            types = np.array([0, 0, 0xF, 1, 0, 0xE, 0x9, 0, 0xD], dtype=np.uint8)
            data = np.zeros((int(HAS_DATA[types].sum()), PAGE_SIZE), dtype=np.uint8)
            data[:, : 64 * number] = random.integers(0, 255, 64 * number)
            scan.append(PageBatch(pfns, types, data))
        for buffers in sender.checkpoint(scan, device_state=b"device" * number, time_ns=number or None):
            for buffer in buffers:
                out += buffer
    return bytes(out)


def written(word: int, *items: events.Event) -> bytes:
    """A stream out of events."""
    writer = EventWriter(word)
    return b"".join(bytes(buffer) for item in items for buffer in writer.write(item))


def batch(*entries: tuple[int, int], compressed: bool = False) -> events.Batch:
    """A batch out of (PFN, type), each page filled with its PFN."""
    pages = [page(pfn) for pfn, kind in entries if HAS_DATA[kind]]
    data = np.frombuffer(b"".join(pages), dtype=np.uint8).reshape(-1, PAGE_SIZE)
    return events.Batch(
        pfns=np.array([pfn for pfn, _ in entries], dtype=np.uint64),
        types=np.array([kind for _, kind in entries], dtype=np.uint8),
        data=None if compressed else data,
    )


def tail_hvm(signature: Signature = Signature.XL, state: bytes = b"QEVM state") -> events.TailHvm:
    return events.TailHvm(magic_pfns=(1, 2, 3), context=b"context", signature=signature, device_state=state)


END = events.EndOfBody()


def vectors() -> list[dict[str, Any]]:
    """The streams of specs/vectors; specs/conformance.md describes the manifest."""
    path = VECTORS / "manifest.json"
    if not path.exists():
        return []
    rows = json.loads(path.read_text())["vectors"]
    rows = [json.loads((VECTORS / row).read_text()) if isinstance(row, str) else row for row in rows]
    return [row for row in rows if row["kind"] == "decode"]


def vector_bytes(row: dict[str, Any]) -> bytes:
    data = (VECTORS / row["file"]).read_bytes()
    return lzma.decompress(data) if row["file"].endswith(".xz") else data


def examples(*kinds: str) -> list[Any]:
    """The streams that stand in the specification (specs/README.md): (attributes, bytes)."""
    found = []
    for path in sorted(SPECS.glob("*.md")):
        for info, body in re.findall(r"^```hex (\S[^\n]*)\n(.*?)^```$", path.read_text(), re.M | re.S):
            attributes = dict(item.partition("=")[::2] for item in shlex.split(info))
            if attributes.get("stream") in kinds:
                lines = (re.sub(r"^[0-9a-f]+:|#.*", "", line.partition("#")[0]) for line in body.splitlines())
                parts = (line.partition("*") for line in lines)
                data = b"".join(bytes.fromhex(part) * int(count or 1) for part, _, count in parts)
                found.append(pytest.param(attributes, data, id=attributes["name"]))
    return found or [pytest.param(None, b"", marks=pytest.mark.skip("no example stands in specs/*.md"))]


@dataclasses.dataclass
class Field:
    """A parameter, field or instance. path: as the generated code names it in an error."""

    path: str
    name: str
    text: str = ""

    def sections(self) -> set[str]:
        (cited,) = re.findall(r"^ *doc-ref: (.*)$", self.text, re.M)
        return {f"stream.md §{number}" for number in re.findall(r"§([0-9.]+)", cited)}


def fields() -> list[Field]:
    found: list[Field] = []
    kind, section, section_depth, number = "", "", -1, 0
    for line in GRAMMAR.read_text().splitlines():
        depth = len(line) - len(line.lstrip())
        if match := re.fullmatch(r"  (\w+):", line):
            kind, section = f"/types/{match[1]}", ""
        if match := re.fullmatch(r"\s*(seq|params|instances):", line):
            section, section_depth, number = match[1], depth, 0
        elif line.strip() and depth <= section_depth:
            section, section_depth = "", -1
        elif section:
            match = re.fullmatch(r"\s*(?:- id: (\w+)|(\w+):)", line)
            if match and depth == section_depth + 2 and bool(match[1]) == (section != "instances"):
                found.append(Field(f"{kind}/{section}/{number}", match[1] or match[2]))
                number += 1
            else:
                found[-1].text += f"{line}\n"
    return found
