"""The grammar in specs/grammar and the reader see the same in every stream, each from its own description of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import lzma
import os
import re
import shlex
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from remus_ckpt import Limits, Sender
from remus_ckpt.errors import StreamError
from remus_ckpt.pages import HAS_DATA, PAGE_SIZE, PageBatch, PageType
from remus_ckpt.wire.record import DIGEST_BYTES, RECORD_MAGIC, CheckpointRecord, Position
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.chunks import CHUNKS, MAX_P2M_SIZE, ChunkId, Layout, Signature
from remus_ckpt.wire.xen.dialect import Dialect, detect_header
from remus_ckpt.wire.xen.reader import Reader
from remus_ckpt.wire.xen.writer import EventWriter

kaitaistruct = pytest.importorskip("kaitaistruct", reason="kaitaistruct is not installed: it is in the extra `test`")

ROOT = Path(__file__).resolve().parents[2]
SPECS = ROOT / "specs"
GRAMMAR = SPECS / "grammar" / "remus_stream.ksy"
TOOL = ROOT / "tools" / "grammar.py"
VECTORS = SPECS / "vectors"
SHARED = Path(os.environ.get("REMUS_CKPT_SHARED") or ROOT.parent / "shared") / "vectors" / "xen"

NO_COMPILER = 3
"""What tools/grammar.py exits with where there is no compiler."""
REFUSALS = (kaitaistruct.KaitaiStructError, EOFError, ValueError)
"""What a compiled grammar raises: a rule that is broken, bytes that are missing, a negative length."""
SMALL = 4 << 20
"""The real streams up to this size are compared; the generated code is slow."""


@pytest.fixture(scope="session")
def grammar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The class that the grammar compiles to."""
    out = tmp_path_factory.mktemp("grammar")
    ran = subprocess.run([sys.executable, str(TOOL), str(out)], capture_output=True, text=True, check=False)
    if ran.returncode == NO_COMPILER:
        pytest.skip(ran.stderr.strip())
    assert ran.returncode == 0, ran.stderr
    spec = importlib.util.spec_from_file_location("remus_stream", out / "remus_stream.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module.RemusStream
    del sys.modules[spec.name]


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


def compressed_data(data: bytes) -> events.CompressedData:
    return events.CompressedData(data=np.frombuffer(data, dtype=np.uint8))


def tail_hvm(signature: Signature = Signature.XL, state: bytes = b"QEVM state") -> events.TailHvm:
    return events.TailHvm(magic_pfns=(1, 2, 3), context=b"context", signature=signature, device_state=state)


END = events.EndOfBody()
LAST = events.LastCheckpoint()
TMEM = events.Tmem(
    version=1,
    max_pools=2,
    flags=3,
    weight=4,
    cap=5,
    pools=(
        events.TmemPool(id=0, flags=0, announced_pages=0, uuid=(1, 2), pages=()),
        events.TmemPool(
            id=1,
            flags=1 << 4,
            announced_pages=2,
            uuid=(3, 4),
            pages=tuple(events.TmemPage(object_id=(n, 5, 6), index=n, data=page(n) * 2) for n in (7, 8)),
        ),
        events.TmemPool(
            id=2,
            flags=0,
            announced_pages=9,
            uuid=(5, 6),
            pages=(events.TmemPage(object_id=((1 << 64) - 1, 0, 0), index=1, data=page(9)),),
        ),
    ),
)
EVERY_CHUNK: tuple[events.Event, ...] = (
    TMEM,
    events.TscInfo(mode=1, nsec=2, khz=3, incarnation=4),
    batch((1, PageType.NOTAB), (0, PageType.XTAB), (2, PageType.XALLOC), (3, PageType.NOTAB_PINNED)),
    events.TmemExtra(keys=((0, (1, 2, 3), 4), (5, (6, 7, 8), 9))),
    batch((0, PageType.XTAB)),
    events.EnableVerifyMode(),
    events.VcpuInfo(highest_id=70, online=(5, 64)),
    *(
        events.HvmParam(id=kind.id, value=(1 << 63) - kind.id, pad=-kind.id)
        for kind in CHUNKS.values()
        if kind.layout is Layout.PARAM
    ),
    events.Toolstack(data=b""),
    events.Toolstack(data=b"tools"),
)


def hvm_every_chunk(word: int) -> bytes:
    """Three rounds of an HVM guest, the later ones compressed, and bytes behind the last."""
    return (
        written(
            word,
            events.Header(word=word, guest="hvm", p2m_size=4),
            *EVERY_CHUNK,
            events.EnableCompression(),
            END,
            tail_hvm(Signature.REMUS),
            compressed_data(b"\0"),
            batch((1, 0), (0, PageType.XTAB), (2, 4), compressed=True),
            events.EnableCompression(),
            compressed_data(b""),
            compressed_data(b"\x80" + page(5)),
            END,
            tail_hvm(),
            LAST,
            END,
            tail_hvm(state=b""),
        )
        + b"behind it"
    )


def hvm_uncompressed(word: int) -> bytes:
    """ENABLE_COMPRESSION in round 1 changes nothing; the last device state reaches to the end."""
    return written(
        word,
        events.FileHeader(kind="xl", mandatory_flags=1, optional_flags=7, data=b"\2\0\0\0{}"),
        events.Header(word=word, guest="hvm", p2m_size=4),
        batch((1, 0)),
        END,
        tail_hvm(),
        events.EnableCompression(),
        batch((1, 0), (2, 0)),
        END,
        tail_hvm(),
        batch((3, 0)),
        END,
        tail_hvm(Signature.QEMU),
    )


def pv_header(word: int, *blocks: tuple[bytes, bytes], p2m_size: int = 1200, guest_word: int) -> events.Header:
    frames = -(-p2m_size // (4096 // guest_word))
    return events.Header(
        word=word,
        guest="pv",
        p2m_size=p2m_size,
        extended_info=tuple(events.ExtendedInfo(id=name, data=data) for name, data in blocks) if blocks else None,
        p2m_frames=np.arange(3, 3 + frames, dtype=np.uint64),
    )


def tail_pv(context: int, ids: list[int], *, extended: bool = False, xsave: int | None = None) -> events.TailPv:
    return events.TailPv(
        unmapped=np.array([9, 8, 7], dtype=np.uint64),
        vcpus=tuple(
            events.VcpuContext(
                id=number,
                context=bytes([number]) * context,
                extended=bytes([number]) * 128 if extended else None,
                xsave_mask=None if xsave is None else 7,
                xsave_size=None if xsave is None else xsave + 1,
                xsave=bytes(xsave or 0),
            )
            for number in ids
        ),
        shared_info=page(0xA5),
    )


def pv_extended(word: int) -> bytes:
    """All that the extended info can announce; the map of virtual CPUs changes with the rounds."""
    blocks = [
        (b"what", b"ever"),
        (b"vcpu", bytes(2800)),
        (b"extv", b""),
        (b"vcpu", bytes(5168)),
        (b"xcnt", b"\x18\0\0\0"),
    ]
    tails = {"extended": True, "xsave": 8}
    return written(
        word,
        events.FileHeader(kind="xend", data=b"(vm)"),
        pv_header(word, *blocks, guest_word=8),
        # It does not change its own body.
        events.EnableCompression(),
        batch((1, 0), (2, 1), (3, 9)),
        events.VcpuInfo(highest_id=66, online=(0b1001, 0b110)),
        END,
        tail_pv(5168, [0, 3, 65, 66], **tails),
        batch((4, 0), compressed=True),
        compressed_data(b"\0"),
        END,
        tail_pv(5168, [0, 3, 65, 66], **tails),
        # Bits above the highest mean nothing.
        events.VcpuInfo(highest_id=1, online=(0b1110,)),
        END,
        tail_pv(5168, [1], **tails),
    )


def pv_other_word(word: int) -> bytes:
    """A guest whose word is not the toolstack's, and whose p2m fills its frames."""
    guest_word, context = (4, 2800) if word == 8 else (8, 5168)
    header = pv_header(word, (b"vcpu", bytes(context)), p2m_size=2048, guest_word=guest_word)
    return written(word, header, batch((1, 0)), events.VcpuInfo(highest_id=0, online=(1,)), END, tail_pv(context, [0]))


def pv_bare(word: int) -> bytes:
    """No extended info and no VCPU_INFO."""
    return written(word, pv_header(word, guest_word=word), LAST, END, tail_pv({8: 5168, 4: 2800}[word], [0]))


def pv_empty_info(word: int) -> bytes:
    """Extended info without a block."""
    header = dataclasses.replace(pv_header(word, guest_word=word), extended_info=())
    return written(word, header, END, tail_pv({8: 5168, 4: 2800}[word], [0]))


STREAMS: dict[str, tuple[Callable[[int], bytes], str]] = {
    "every-chunk": (hvm_every_chunk, "hvm"),
    "uncompressed": (hvm_uncompressed, "hvm"),
    "pv-extended": (pv_extended, "pv"),
    "pv-other-word": (pv_other_word, "pv"),
    "pv-bare": (pv_bare, "pv"),
    "pv-empty-info": (pv_empty_info, "pv"),
}


@pytest.mark.node
@pytest.mark.parametrize("word", [8, 4])
@pytest.mark.parametrize("codec", ["delta", "rle"])
def test_streams_of_the_sender(grammar: Any, codec: str, word: int) -> None:
    found = compare(grammar, sent(word, codec), Dialect(word, "hvm", codec))
    assert sum(isinstance(event, events.Tail) for event in found) == 3
    assert any(isinstance(event, events.CompressedData) for event in found)


@pytest.mark.node
@pytest.mark.parametrize("word", [8, 4])
@pytest.mark.parametrize("name", STREAMS)
def test_streams_with_everything(grammar: Any, name: str, word: int) -> None:
    make, guest = STREAMS[name]
    compare(grammar, make(word), Dialect(word, guest))


@pytest.mark.node
def test_many_chunks_need_no_deep_stack(grammar: Any) -> None:
    items = [events.Header(word=8, guest="hvm", p2m_size=4), *[LAST] * (2 * sys.getrecursionlimit()), END, tail_hvm()]
    compare(grammar, written(8, *items), Dialect(8, "hvm"))


@pytest.mark.node
@pytest.mark.parametrize("word", [8, 4])
def test_every_cut_of_a_stream(grammar: Any, word: int) -> None:
    data = written(
        word,
        events.Header(word=word, guest="hvm", p2m_size=4),
        events.EnableCompression(),
        END,
        tail_hvm(),
        batch((1, 0), compressed=True),
        compressed_data(b"\0"),
        END,
        tail_hvm(Signature.REMUS),
    )
    for size in range(len(data) + 1):
        compare(grammar, data[:size], Dialect(word, "hvm", "rle"))


# Streams from elsewhere


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


GOOD_VECTORS = [pytest.param(row, id=row["id"]) for row in vectors() if "error" not in row] or [
    pytest.param(None, marks=pytest.mark.skip("no specs/vectors/manifest.json"))
]


@pytest.mark.node
@pytest.mark.parametrize("row", GOOD_VECTORS)
def test_vectors(grammar: Any, row: dict[str, Any]) -> None:
    dialect = {name: row["dialect"][name] for name in ("word", "guest", "codec")}
    compare(grammar, vector_bytes(row), Dialect(**dialect))


@pytest.mark.node
@pytest.mark.parametrize(("attributes", "data"), examples("valid", "accepted", "cut"))
def test_examples_of_the_specification(grammar: Any, attributes: dict[str, str], data: bytes) -> None:
    compare(grammar, data)


def real_streams() -> list[Any]:
    path = SHARED / "manifest.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    return [pytest.param(row, id=row["id"]) for row in rows if row["bytes"] <= SMALL] or [
        pytest.param(None, marks=pytest.mark.skip("no vectors/xen: name the shared vectors in REMUS_CKPT_SHARED"))
    ]


@pytest.mark.node
@pytest.mark.parametrize("row", real_streams())
def test_real_streams(grammar: Any, row: dict[str, Any]) -> None:
    data = lzma.decompress((SHARED / row["file"]).read_bytes())
    found = compare(grammar, data, Dialect(row["toolstack_word"], row["guest"]))
    assert [event.end for event in found if isinstance(event, events.Tail)] == row["checkpoint_end"]


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


# What the grammar refuses, and what it cannot


def _patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def _i32(value: int) -> bytes:
    return struct.pack("<i", value)


HVM = written(8, events.Header(word=8, guest="hvm", p2m_size=4))
END_AND_TAIL = _i32(0) + written(8, events.Header(word=8, guest="hvm", p2m_size=4), END, tail_hvm())[12:]
XL = written(8, events.FileHeader(kind="xl", data=b""))
PV = (1200).to_bytes(8, "little")


def _info(*blocks: bytes, total: int | None = None) -> bytes:
    joined = b"".join(blocks)
    return PV + b"\xff" * 8 + struct.pack("<I", len(joined) if total is None else total) + joined + bytes(30000)


def _block(name: bytes, data: bytes, size: int | None = None) -> bytes:
    return name + struct.pack("<I", len(data) if size is None else size) + data


def _hvm_body(*chunks: bytes) -> bytes:
    return HVM + b"".join(chunks) + END_AND_TAIL


def _with_record(state: bytes) -> bytes:
    record = b"RemusDeviceModelState" + struct.pack("<I", len(state)) + state
    return HVM + _i32(0) + bytes(28) + record


def _without_record() -> bytes:
    """A stream of ours, and a checkpoint of Xen's behind it."""
    return sent(8, "delta", 1) + END_AND_TAIL


def _with_record_late() -> bytes:
    first = HVM + struct.pack("<i", -13) + END_AND_TAIL
    body = _i32(0) + bytes(28)
    return first + body + _with_record(RECORD_MAGIC + bytes(60))[len(HVM) + len(body) :]


REFUSED: dict[str, tuple[str, bytes]] = {
    "p2m-size-0": ("hvm", _patched(_hvm_body(), 0, bytes(8))),
    "p2m-size-29-bits": ("hvm", _patched(_hvm_body(), 0, (1 << 28).to_bytes(8, "little"))),
    "xl-magic": ("hvm", _patched(XL, 27, b"\r") + _hvm_body()),
    "xl-byte-order": ("hvm", _patched(XL, 32, b"\1\2\3\4") + _hvm_body()),
    "xl-v2": ("hvm", _patched(XL, 36, b"\2") + _hvm_body()),
    "xl-mandatory-flag": ("hvm", _patched(XL, 36, b"\4") + _hvm_body()),
    "v2-behind-xl": ("hvm", XL + b"\xff" * 8 + b"XENF" + bytes(40)),
    "xend-negative": ("hvm", b"LinuxGuestRecord" + b"\xff" * 4 + _hvm_body()),
    "block-beyond-total": ("pv", _info(_block(b"what", bytes(8), size=9))),
    "block-head-cut": ("pv", _info(_block(b"what", b"") + bytes(7))),
    "vcpu-size": ("pv", _info(_block(b"vcpu", bytes(2801)))),
    "extv-size": ("pv", _info(_block(b"extv", bytes(1)))),
    "xcnt-size": ("pv", _info(_block(b"xcnt", bytes(8)))),
    "xcnt-15": ("pv", _info(_block(b"xcnt", _i32(15)))),
    "unmapped-beyond-memory": ("pv", PV + bytes(3 * 8) + _i32(0) + _i32(1201) + bytes(30000)),
    "count-1025": ("hvm", _hvm_body(_i32(1025), bytes(1025 * 8))),
    "chunk-22": ("hvm", _hvm_body(_i32(-22))),
    "vcpu-negative": ("hvm", _hvm_body(_i32(-2), _i32(-1), bytes(8))),
    "tmem-first-ones": ("hvm", _hvm_body(_i32(-5), struct.pack("<8I", 1, 1, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF))),
    "tmem-second-ones": ("hvm", _hvm_body(_i32(-5), struct.pack("<8I", 1, 1, 0xFFFFFFFF, 0, 0, 0, 0, 0xFFFFFFFF))),
    "compressed-in-round-0": ("hvm", _hvm_body(_i32(-12), bytes(8))),
    "compressed-in-plain-round": ("hvm", _hvm_body() + _i32(-13) + _i32(-12) + bytes(8) + END_AND_TAIL),
    "type-5": ("hvm", _hvm_body(_i32(1), struct.pack("<Q", 5 << 28), page(1))),
    "type-7": ("hvm", _hvm_body(_i32(1), struct.pack("<Q", 7 << 28), page(1))),
    "pfn-beyond-memory": ("hvm", _hvm_body(_i32(1), struct.pack("<Q", 4), page(1))),
    "signature": ("hvm", HVM + _i32(0) + bytes(28) + b"DeviceModelRecord0003" + bytes(4)),
    "not-qemu": ("hvm", HVM + _i32(0) + bytes(28) + b"QemuDeviceModelRecordQEVN"),
    "record-empty": ("hvm", _with_record(b"")),
    "record-of-nobody": ("hvm", _with_record(bytes(80))),
    "record-too-short": ("hvm", _with_record(RECORD_MAGIC + bytes(DIGEST_BYTES - 1))),
    "no-record-behind-record": ("hvm", _without_record()),
    "record-behind-no-record": ("hvm", _with_record_late()),
}

WITHOUT_RULE = {"block-beyond-total", "block-head-cut", "record-empty", "record-too-short"}
"""Refused because there are too few bytes, not by a rule."""

_OWN = sent(8, "delta", 2)
ACCEPTED: dict[str, bytes] = {
    "digest": _patched(_OWN, len(_OWN) - 1, bytes([_OWN[-1] ^ 1])),
    "map": _patched(_OWN, _OWN.index(RECORD_MAGIC) + len(RECORD_MAGIC), b"\xc1"),
    "limit": _hvm_body(_i32(-2), _i32(8192), bytes(8 * 129)),
}


@pytest.mark.node
@pytest.mark.parametrize("name", REFUSED)
def test_what_breaks_a_rule_is_refused_by_both(grammar: Any, name: str) -> None:
    guest, data = REFUSED[name]
    with pytest.raises(StreamError) as ours:
        read(data, Dialect(8, guest))
    with pytest.raises(REFUSALS) as theirs:
        parse(grammar, data, 8, guest)
    if name in WITHOUT_RULE:
        assert not isinstance(theirs.value, kaitaistruct.ValidationFailedError)
    else:
        # Not only both, but by the same section.
        (field,) = (field for field in fields() if field.path == theirs.value.src_path)
        assert ours.value.section in field.sections()


@pytest.mark.node
@pytest.mark.parametrize("name", ACCEPTED)
def test_what_the_grammar_cannot_say(grammar: Any, name: str) -> None:
    with pytest.raises(StreamError):
        read(ACCEPTED[name], Dialect(8, "hvm"))
    parse(grammar, ACCEPTED[name], 8, "hvm")


@pytest.mark.node
@pytest.mark.parametrize("p2m_size", [1, MAX_P2M_SIZE])
def test_edges_of_memory(grammar: Any, p2m_size: int) -> None:
    items = [events.Header(word=8, guest="hvm", p2m_size=p2m_size), batch((p2m_size - 1, PageType.XALLOC), (0, 0))]
    compare(grammar, written(8, *items, END, tail_hvm()), Dialect(8, "hvm"))


@pytest.mark.node
def test_largest_batch(grammar: Any) -> None:
    items = [events.Header(word=8, guest="hvm", p2m_size=4), batch(*[(0, PageType.XTAB)] * 1024)]
    compare(grammar, written(8, *items, END, tail_hvm()), Dialect(8, "hvm"))


@pytest.mark.node
def test_dialect_is_one_of_four(grammar: Any) -> None:
    with pytest.raises(kaitaistruct.ValidationExprError):
        parse(grammar, _hvm_body(), 2, "hvm")


def verdict(grammar: Any, data: bytes, word: int | None, guest: str | None) -> str:
    """What the grammar says of a malformed stream: why it refuses it, or "accepted"."""
    try:
        known = detect_header(Dialect(word, guest), data[:16], 0)
    except StreamError:
        known = Dialect(word or 8, guest or "hvm")
    try:
        parse(grammar, data, known.word, known.guest)
    except REFUSALS as error:
        return f"{type(error).__name__} {getattr(error, 'src_path', None) or ''}".strip()
    return "accepted"


CANNOT_SAY = {f"stream.md §{number}" for number in ("1.2", "2.3", "6.2", "6.4", "9.2", "9.3", "9.4")}
"""Sections with a rule that the grammar's README lists as one that Kaitai cannot say."""


@pytest.mark.node
def test_table_of_malformed_streams(grammar: Any) -> None:
    """Prints what the grammar refuses by itself (pytest -rP). What it accepts, its README has a reason for."""
    rows = []
    for row in vectors():
        if "error" in row:
            dialect, section = row["dialect"], row["error"]["section"]
            reason = "strict" if row["strict"] else row["error"]["kind"]
            rows.append(
                (row["id"], section, reason, verdict(grammar, vector_bytes(row), dialect["word"], dialect["guest"]))
            )
    for parameter in examples("refused"):
        attributes, data = parameter.values
        if attributes is not None:
            kind = attributes.get("error", "")
            rows.append((attributes["name"], attributes["refused"], kind, verdict(grammar, data, None, None)))
    if not rows:
        pytest.skip("no specs/vectors/manifest.json, and no example in specs/*.md")
    for name, section, reason, said in rows:
        print(f"{name:40} {section:16} {reason:16} {said}")
    accepted = [row for row in rows if row[3] == "accepted"]
    print(f"{len(rows) - len(accepted)} of {len(rows)} refused by the grammar itself")
    assert not [
        (name, section)
        for name, section, reason, _ in accepted
        if section.startswith("stream.md") and section not in CANNOT_SAY and reason not in ("strict", "limit")
    ]


# The text of the grammar


@pytest.mark.node
@pytest.mark.parametrize("language", ["cpp_stl", "go", "java", "javascript", "rust"])
def test_compiles_to_other_languages(grammar: Any, tmp_path: Path, language: str) -> None:
    ran = subprocess.run([sys.executable, str(TOOL), str(tmp_path), "--language", language], check=False)
    assert ran.returncode == 0
    assert list(tmp_path.rglob("*remus_stream*")) or list(tmp_path.rglob("*RemusStream*"))


@pytest.mark.node
def test_program_of_the_readme(grammar: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = (GRAMMAR.parent / "README.md").read_text()
    (program,) = re.findall(r"^    from kaitaistruct.*?(?=^\S)", text, re.M | re.S)
    exec(textwrap.dedent(program), {"data": _hvm_body(_i32(-9))})
    assert capsys.readouterr().out == "8 -9\n12 0\n"


def test_every_field_names_its_section() -> None:
    every = fields()
    assert len(every) > 150
    assert not [field for field in every if "doc-ref: specs/stream.md §" not in field.text]


def test_every_section_named_is_there() -> None:
    prose = SPECS / "stream.md"
    if not prose.exists():
        pytest.skip("no specs/stream.md")
    headings = set(re.findall(r"^#+ (\d+(?:\.\d+)*)\.? ", prose.read_text(), re.M))
    cited = set(re.findall(r"§(\d+(?:\.\d+)*)", GRAMMAR.read_text()))
    assert cited and not cited - headings


@pytest.mark.node
def test_names_are_those_of_the_code(grammar: Any) -> None:
    assert {chunk.name.upper(): chunk.value for chunk in grammar.ChunkId} == {c.name: c.value for c in ChunkId}
    assert {kind.name.upper(): kind.value for kind in grammar.PageType} == {t.name: t.value for t in PageType}
