"""The grammar in specs/grammar and the reader see the same in every stream, each from its own description of it."""

from __future__ import annotations

import dataclasses
import json
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grammar_trees import (
    END,
    ROOT,
    batch,
    compare,
    examples,
    page,
    sent,
    tail_hvm,
    vector_bytes,
    vectors,
    written,
)

from remus_ckpt.pages import PageType
from remus_ckpt.wire.xen import events
from remus_ckpt.wire.xen.chunks import CHUNKS, Layout, Signature
from remus_ckpt.wire.xen.dialect import Dialect

SHARED = Path(os.environ.get("REMUS_CKPT_SHARED") or ROOT.parent / "shared") / "vectors" / "xen"


SMALL = 4 << 20
"""The real streams up to this size are compared; the generated code is slow."""


# Streams


def compressed_data(data: bytes) -> events.CompressedData:
    return events.CompressedData(data=np.frombuffer(data, dtype=np.uint8))


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
