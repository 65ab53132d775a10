"""The layout of memory that consists of a program's own buffers: names, dtypes, shapes, pages (specs/manifest.md).

The manifest is part of every checkpoint, so that a checkpoint describes itself (wire/parts.py says where it is stored).
A manifest that is read back is checked against the memory that it describes before it is used.
"""

from __future__ import annotations

import math
import operator
import reprlib
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import starmap
from typing import Any, Literal

import msgpack
import numpy as np
from numpy.typing import NDArray

from remus_ckpt.errors import NoCheckpoint
from remus_ckpt.limits import Limits
from remus_ckpt.pages import PAGE_SIZE, Pages, pages_for
from remus_ckpt.restorer import Checkpoint
from remus_ckpt.source.dtypes import MAX_BYTES, MAX_DIMENSIONS, dtype_form, field, is_size, malformed, read_dtype
from remus_ckpt.source.frames import Frame, faults, has_pandas, is_frame, join, places, put, read_frames, values_of

ARRAY, BYTES = "array", "bytes"
MAX_NAME_BYTES = 255


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One buffer.

    name: as the user gave it
    kind: "array" for numpy arrays, "bytes" for any other contiguous buffer (an mmap, a bytearray)
    dtype, shape, order: of an array; uint8, (nbytes,) and "C" for bytes
    page: the page at whose first byte it begins
    nbytes: its size; the rest of its last page is zeros
    """

    name: str
    kind: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: str
    page: int
    nbytes: int

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The buffers of a memory, in their order there.

    frames: DataFrames, whose columns are among the buffers
    Each buffer begins on a new page, directly after the pages of the one before. Raises ValueError if not, or if two
    have the same name.
    """

    entries: tuple[ManifestEntry, ...]
    frames: tuple[Frame, ...] = ()

    def __post_init__(self) -> None:
        names = set()
        page = 0
        for entry in self.entries:
            if entry.page != page:
                raise ValueError(f"{entry.name!r} at page {entry.page}; the pages before it end at {page}")
            if entry.name in names:
                raise ValueError(f"two buffers are named {entry.name!r}")
            names.add(entry.name)
            page += pages_for(entry.nbytes)
        for frame in self.frames:
            _check_name(frame.name)
            if frame.name in names:
                raise ValueError(f"two buffers are named {frame.name!r}")
            names.add(frame.name)

    @property
    def pages(self) -> int:
        """How many pages they take; memory has at least one."""
        last = self.entries[-1:]
        return max([1, *(entry.page + pages_for(entry.nbytes) for entry in last)])

    def pack(self) -> bytes:
        """The map. Raises ValueError if readers would refuse it."""
        rows = [
            {
                "name": entry.name,
                "kind": entry.kind,
                "dtype": dtype_form(entry.dtype),
                "shape": list(entry.shape),
                "order": entry.order,
                "page": entry.page,
                "bytes": entry.nbytes,
            }
            for entry in self.entries
        ]
        frames = {"frames": [frame.form() for frame in self.frames]} if self.frames else {}
        body = msgpack.packb({"buffers": rows} | frames)
        if len(body) > Limits().manifest_bytes:
            raise ValueError(f"the names of {len(rows)} buffers take {len(body):,} bytes, more than readers accept")
        return bytes(body)

    @staticmethod
    def unpack(body: bytes, *, pages: int) -> Manifest:
        """Read what `pack` wrote; the source is not trusted.

        pages: of the memory that it came with; nothing in it may lie beyond
        Raises Malformed; offsets count from the head in front of the map.
        """
        try:
            fields = msgpack.unpackb(body)
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
            raise malformed(f"not a msgpack map: {error}", "§2") from None
        manifest = _read(fields)
        used = max(0, *(entry.page + pages_for(entry.nbytes) for entry in manifest.entries)) if manifest.entries else 0
        if used > pages:
            raise malformed(f"buffers on {used} pages, in a memory of {pages}", "§3")
        return manifest

    def arrays(self, memory: Pages, *, copy: bool = False) -> dict[str, NDArray[Any]]:
        """The buffers by name, with dtype and shape.

        memory: uint8[≥ pages, 4096], C-contiguous
        copy: return new arrays; otherwise views of `memory`, writable if it is
        """
        if memory.dtype != np.uint8 or memory.shape[1:] != (PAGE_SIZE,) or not memory.flags.c_contiguous:
            raise ValueError(f"memory {memory.dtype}{memory.shape} must be uint8[n, {PAGE_SIZE}], C-contiguous")
        if self.pages > len(memory):
            raise ValueError(f"the buffers take {self.pages} pages, memory has {len(memory)}")
        found = {}
        for entry in self.entries:
            # An empty one may follow the last page.
            at = entry.page * PAGE_SIZE if entry.nbytes else 0
            order: Literal["C", "F"] = "F" if entry.order == "F" else "C"
            array: NDArray[Any] = np.ndarray(entry.shape, entry.dtype, memory.data, at, order=order)
            found[entry.name] = array.copy(order="A") if copy else array
        return found


def _check(entry: ManifestEntry) -> None:
    """Raise ValueError for an entry that breaks a rule of specs/manifest.md §3."""
    _check_name(entry.name)
    if entry.kind not in {ARRAY, BYTES} or entry.order not in {"C", "F"}:
        raise ValueError(f"{entry.name!r} is {entry.kind!r} in order {entry.order!r}")
    if entry.kind == BYTES and (entry.dtype != np.uint8 or entry.shape != (entry.nbytes,) or entry.order != "C"):
        raise ValueError(f"{entry.name!r} are bytes, and {entry.dtype}{entry.shape}")
    if len(entry.shape) > MAX_DIMENSIONS:
        raise ValueError(f"{entry.name!r} has {len(entry.shape)} dimensions; {MAX_DIMENSIONS} is the most")
    if min((0, entry.page, *entry.shape)) < 0:
        raise ValueError(f"{entry.name!r} has a negative number")
    # numpy multiplies the dimensions without the zeros among them.
    if math.prod(n for n in entry.shape if n) * max(entry.dtype.itemsize, 1) > MAX_BYTES:
        raise ValueError(f"{entry.name!r} of shape {entry.shape} is larger than any memory")
    if math.prod(entry.shape) * entry.dtype.itemsize != entry.nbytes:
        raise ValueError(f"{entry.name!r} has {entry.nbytes} bytes, but shape {entry.shape} of {entry.dtype}")


def _check_name(name: str) -> None:
    size = len(name.encode())  # a lone surrogate is a ValueError too
    if not 1 <= size <= MAX_NAME_BYTES:
        raise ValueError(f"a name of {size} bytes; it has 1…{MAX_NAME_BYTES}")


def _read(fields: object) -> Manifest:
    """The manifest in a decoded map. Raises Malformed."""
    if not isinstance(fields, dict) or not isinstance(rows := fields.get("buffers"), list):
        raise malformed("not a map with a list of buffers", "§2")
    entries = []
    for row in rows:
        if not isinstance(row, dict):
            raise malformed("a buffer is not a map", "§2")
        shape = field(row, "shape", list)
        if not all(is_size(number) for number in shape):
            raise malformed(f"{reprlib.repr(row['shape'])} is not a shape", "§3")
        dtype = read_dtype(row.get("dtype"), 0)
        name, kind, order = field(row, "name", str), field(row, "kind", str), field(row, "order", str)
        page, nbytes = field(row, "page", int), field(row, "bytes", int)
        try:
            entries.append(ManifestEntry(name, kind, dtype, tuple(shape), order, page, nbytes))
        except ValueError as error:
            raise malformed(str(error), "§3") from None
    arrays = {entry.name: (entry.dtype, entry.shape) for entry in entries if entry.kind == ARRAY}
    frames = read_frames(fields.get("frames", []), arrays)
    try:
        return Manifest(tuple(entries), frames)
    except ValueError as error:
        raise malformed(str(error), "§3") from None


def arrays_of(checkpoint: Checkpoint, into: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], bytes]:
    """What was given to `protect`, by name, and the device state that came with it.

    checkpoint: from a store or from any stream of such checkpoints
    into: existing arrays, buffers and DataFrames, exactly those that were protected, under the same names. The values
        are copied into them, and they are returned. Nothing may write to them meanwhile Arrays have their dtype and
        shape, and are views of the checkpoint's memory; an mmap, a bytearray or shared memory is uint8[n]. A DataFrame
        is a new one; without pandas, its columns are arrays. Raises NoCheckpoint if the checkpoint was not made by
        `protect`, Malformed if its manifest is damaged, and ValueError that lists every mismatch if `into` does not
        fit; nothing is copied then.
    """
    parts = checkpoint.parts
    if parts.manifest is None:
        raise NoCheckpoint(f"checkpoint {checkpoint.epoch} holds memory without names: it was not made by protect()")
    manifest = Manifest.unpack(parts.manifest, pages=len(checkpoint.memory))
    arrays = manifest.arrays(checkpoint.memory)
    frames = {frame.name: frame for frame in manifest.frames if has_pandas()}
    if into is not None:
        _copy_into(into, manifest, arrays, frames)
        return {name: into[name] for name in into}, parts.device_state
    found: dict[str, Any] = dict(arrays)
    for frame in frames.values():
        found[frame.name] = join(frame, arrays)
        for part in frame.parts:
            del found[part.buffer]
    return found, parts.device_state


def _copy_into(
    into: Mapping[str, Any], manifest: Manifest, arrays: dict[str, NDArray[Any]], frames: Mapping[str, Frame]
) -> None:
    """Copy arrays to where they are wanted, once all are known to fit. Raises ValueError."""
    in_frames = {part.buffer for frame in frames.values() for part in frame.parts}
    entries = {entry.name: entry for entry in manifest.entries if entry.name not in in_frames}
    wanted = frames.keys() | entries.keys()
    wrong = [
        f"{what}: {', '.join(sorted(map(repr, names)))}"
        for what, names in (
            ("missing", wanted - into.keys()),
            ("not in the checkpoint", into.keys() - wanted),
        )
        if names
    ]
    targets: dict[str, NDArray[Any]] = {}
    columns: dict[str, NDArray[Any]] = {}
    for name in sorted(wanted & into.keys()):
        if name in entries:
            try:
                targets[name] = _target(entries[name], into[name])
            except (TypeError, ValueError) as error:
                wrong.append(str(error))
        elif is_frame(into[name]):
            wrong += faults(frames[name], arrays, into[name])
            columns |= places(name, into[name])
        else:
            wrong.append(f"{name!r} is {type(into[name]).__name__}, and a DataFrame in the checkpoint")
    wrong += _overlaps(targets | columns)
    if wrong:
        raise ValueError(f"nothing was restored: {'; '.join(wrong)}")
    for values, target in [(values_of(frame, arrays), into[name]) for name, frame in frames.items()]:
        put(values, target)
    # No Python code runs in between, so that no signal handler can raise between two of them.
    deque(starmap(operator.setitem, [(targets[name], ..., arrays[name]) for name in targets]), maxlen=0)


def _target(entry: ManifestEntry, target: Any) -> NDArray[Any]:
    """A target of the same dtype and shape as a buffer, to be written to. Raises TypeError or ValueError."""
    if isinstance(target, np.ndarray):
        found = target.view(np.ndarray)
        if isinstance(target, np.ma.MaskedArray):
            raise TypeError(f"{entry.name!r} is a masked array")
    else:
        found = bytes_of(entry.name, target)
        if entry.kind == ARRAY:
            raise TypeError(f"{entry.name!r} is {type(target).__name__}, and an array in the checkpoint")
    if (found.dtype, found.shape) != (entry.dtype, entry.shape):
        raise ValueError(
            f"{entry.name!r} is {found.dtype}{found.shape}, and {entry.dtype}{entry.shape} in the checkpoint"
        )
    if not found.flags.writeable:
        raise ValueError(f"{entry.name!r} is read-only")
    return found


def _overlaps(targets: Mapping[str, NDArray[Any]]) -> Iterator[str]:
    """Which targets share memory: the second would overwrite the first."""
    spans = sorted((*_span(array), name) for name, array in targets.items() if array.nbytes)
    for number, (_, end, one) in enumerate(spans):
        for start, _, other in spans[number + 1 :]:
            if start >= end:
                break
            if np.shares_memory(targets[one], targets[other]):
                yield f"{one!r} and {other!r} share memory"


def _span(array: NDArray[Any]) -> tuple[int, int]:
    """From its lowest byte to just after its highest: views need not be contiguous."""
    start = end = array.__array_interface__["data"][0]
    for size, stride in zip(array.shape, array.strides, strict=True):
        reach = (size - 1) * stride
        start, end = start + min(reach, 0), end + max(reach, 0)
    return start, end + array.itemsize


def bytes_of(name: str, buffer: Any) -> NDArray[np.uint8]:
    """The bytes of a contiguous buffer (an mmap, a bytearray, shared memory) in place; read-only if the buffer is.

    Raises TypeError or ValueError.
    """
    shared = sys.modules.get("multiprocessing.shared_memory")  # whoever has one has loaded it
    if shared is not None and isinstance(buffer, shared.SharedMemory):
        if buffer.buf is None:
            raise ValueError(f"{name!r} is shared memory that has been closed")
        buffer = buffer.buf
    try:
        view = memoryview(buffer)
    except TypeError:
        raise TypeError(f"{name!r} is {type(buffer).__name__}, neither an array nor bytes") from None
    if not view.c_contiguous:
        raise ValueError(f"{name!r} is not contiguous")
    return np.frombuffer(view.cast("B"), dtype=np.uint8) if view.nbytes else np.empty(0, dtype=np.uint8)
