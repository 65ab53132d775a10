"""What tests of QEMU's streams share: the vectors, and the writer that makes them."""

from __future__ import annotations

import functools
import importlib.util
import json
import lzma
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from shared import VECTORS

from remus_ckpt.limits import Limits
from remus_ckpt.wire.qemu import events
from remus_ckpt.wire.qemu.reader import Reader

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "specs" / "vectors" / "qemu"
REAL = VECTORS / "qemu"
needs_qemu = pytest.mark.skipif(
    not (REAL / "manifest.json").exists(),
    reason="no vectors/qemu: name the directory of the shared vectors in REMUS_CKPT_SHARED, or put it beside the "
    "repository",
)


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tools_qemu_vectors", ROOT / "tools" / "qemu_vectors.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tool = _tool()
ROWS: list[dict[str, Any]] = json.loads((FOLDER / "manifest.json").read_text())["vectors"]
GOOD = [row for row in ROWS if "error" not in row]
BAD = [row for row in ROWS if "error" in row]


def row_of(name: str) -> dict[str, Any]:
    (row,) = [row for row in ROWS if row["id"] == name]
    return row


@functools.lru_cache(maxsize=8)
def contents(name: str) -> tuple[bytes, ...]:
    """The files of a vector."""
    return tuple(lzma.decompress((FOLDER / one["file"]).read_bytes()) for one in row_of(name)["files"])


def unpacked(name: str, folder: Path) -> list[str]:
    """The files of a vector, decompressed, in a folder: their paths."""
    paths = []
    for one, data in zip(row_of(name)["files"], contents(name), strict=True):
        path = folder / one["file"].removesuffix(".xz")
        path.write_bytes(data)
        paths.append(str(path))
    return paths


@functools.cache
def real_manifest() -> dict[str, dict[str, Any]]:
    """The manifest of the streams that QEMU itself wrote; empty where they are not there."""
    path = REAL / "manifest.json"
    return {row["id"]: row for row in json.loads(path.read_text())} if path.exists() else {}


def real_files(name: str, folder: Path) -> list[str]:
    """The files of such a stream, decompressed, in a folder: their paths."""
    paths = []
    for one in real_manifest()[name]["files"]:
        path = folder / one["file"].removesuffix(".xz")
        if not path.exists():
            path.write_bytes(lzma.decompress((REAL / one["file"]).read_bytes()))
        paths.append(str(path))
    return paths


def spelled(event: events.Event, size: int = 4096) -> list[Any]:
    """An event as plain values; of pages, which have that size, what they hold, in the order of the stream."""
    if not isinstance(event, events.Pages):
        return [event]
    page_at = [bytes(event.data[place : place + size]) for place in event.places.tolist()]
    found: list[Any] = [(event.block, "full", *pair) for pair in zip(event.full.tolist(), page_at, strict=True)]
    found += [(event.block, "zero", *pair) for pair in zip(event.zero.tolist(), event.fills.tolist(), strict=True)]
    at = 0
    for number, offset in zip(event.encoded.tolist(), event.frame_offsets.tolist(), strict=True):
        end = at + 3 + int.from_bytes(event.frames[at + 1 : at + 3], "big")
        found.append((event.block, "encoded", number, offset, event.frames[at:end]))
        at = end
    return sorted(found, key=lambda one: one[2])


def read_all(data: bytes, pieces: list[int] | None = None, **known: Any) -> list[Any]:
    """What a reader says of a stream that comes in pieces of these sizes, by default as a whole."""
    reader = Reader(limits=known.pop("limits", None) or Limits(), **known)
    view, at = memoryview(data), 0
    sizes = iter(pieces or [])
    found: list[Any] = []
    while True:
        event = reader.next_event()
        if event is not None:
            found += spelled(event, reader.page_size or 0)
            if isinstance(event, events.EndOfStream):
                return found
            continue
        room = reader.get_buffer()
        size = min(next(sizes, len(view)), len(view) - at, len(room))
        room[:size] = view[at : at + size]
        at += size
        reader.buffer_updated(size)
        if not size:
            reader.feed_eof()


def zeros_but(pages: int, **kept: bytes) -> np.ndarray[Any, Any]:
    """Memory of zeros, but for pages given as p3=b"…"."""
    memory = np.zeros((pages, 4096), dtype=np.uint8)
    for name, data in kept.items():
        memory[int(name[1:])] = np.frombuffer(data, dtype=np.uint8)
    return memory
