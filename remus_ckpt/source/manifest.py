"""The layout of memory that consists of a program's own buffers: names, dtypes, shapes, pages (specs/manifest.md).

The manifest is part of every checkpoint, so that a checkpoint describes itself (wire/parts.py says where it is stored).
A manifest that is read back is checked against the memory that it describes before it is used.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgpack
import numpy as np
from numpy.typing import NDArray

from remus_ckpt.errors import Malformed, NoCheckpoint
from remus_ckpt.limits import Limits
from remus_ckpt.pages import PAGE_SIZE, Pages, pages_for
from remus_ckpt.restorer import Checkpoint
from remus_ckpt.wire.parts import HEAD

ARRAY, BYTES = "array", "bytes"
MAX_NAME_BYTES = 255
MAX_DIMENSIONS = 32
_MAX_DTYPE_DEPTH = 16
_MAX_BYTES = (1 << 63) - 1
_SIMPLE_DTYPE = re.compile(r"[<>|](?:[biufcSUV][0-9]{1,10}|[mM]8(?:\[[0-9]{0,10}[A-Za-z]{1,7}\])?)", re.ASCII)


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One buffer.

    name: as the user gave it
    kind: "array" for numpy's, "bytes" for anything else that is one piece of bytes (an mmap, a bytearray)
    dtype, shape, order: of an array; uint8, (nbytes,) and "C" for bytes
    page: the page at whose first byte it begins
    nbytes: its bytes; the rest of its last page is zeros
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
    """The buffers of a memory, in the order in which they lie there.

    Each begins on a page of its own, right behind the pages of the one before it. Raises ValueError if they do not, or
    if two have one name.
    """

    entries: tuple[ManifestEntry, ...]

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

    @property
    def pages(self) -> int:
        """How many pages they take; memory has one at least."""
        last = self.entries[-1:]
        return max([1, *(entry.page + pages_for(entry.nbytes) for entry in last)])

    def pack(self) -> bytes:
        """The map. Raises ValueError for what nobody would read."""
        rows = [
            {
                "name": entry.name,
                "kind": entry.kind,
                "dtype": _dtype_form(entry.dtype),
                "shape": list(entry.shape),
                "order": entry.order,
                "page": entry.page,
                "bytes": entry.nbytes,
            }
            for entry in self.entries
        ]
        body = msgpack.packb({"buffers": rows})
        if len(body) > Limits().manifest_bytes:
            raise ValueError(f"the names of {len(rows)} buffers take {len(body):,} bytes: nobody would read them")
        return bytes(body)

    @staticmethod
    def unpack(body: bytes, *, pages: int) -> Manifest:
        """What `pack` wrote, from anywhere.

        pages: of the memory that it came with; nothing in it may lie beyond
        Raises Malformed; offsets count from the head in front of the map.
        """
        try:
            fields = msgpack.unpackb(body)
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
            raise _malformed(f"no msgpack map: {error}", "§2") from None
        manifest = _read(fields)
        used = max(0, *(entry.page + pages_for(entry.nbytes) for entry in manifest.entries)) if manifest.entries else 0
        if used > pages:
            raise _malformed(f"buffers on {used} pages, in a memory of {pages}", "§3")
        return manifest

    def arrays(self, memory: Pages, *, copy: bool = False) -> dict[str, NDArray[Any]]:
        """The buffers by name, with dtype and shape.

        memory: uint8[≥ pages, 4096], C-contiguous
        copy: arrays of their own; otherwise they are views of `memory`, which can be written where it can
        """
        if memory.dtype != np.uint8 or memory.shape[1:] != (PAGE_SIZE,) or not memory.flags.c_contiguous:
            raise ValueError(f"memory {memory.dtype}{memory.shape} must be uint8[n, {PAGE_SIZE}], C-contiguous")
        if self.pages > len(memory):
            raise ValueError(f"the buffers take {self.pages} pages, memory has {len(memory)}")
        found = {}
        for entry in self.entries:
            # An empty one may stand behind the last page.
            at = entry.page * PAGE_SIZE if entry.nbytes else 0
            order: Literal["C", "F"] = "F" if entry.order == "F" else "C"
            array: NDArray[Any] = np.ndarray(entry.shape, entry.dtype, memory.data, at, order=order)
            found[entry.name] = array.copy(order="A") if copy else array
        return found


def _check(entry: ManifestEntry) -> None:
    """Raise ValueError for an entry that breaks a rule of specs/manifest.md §3."""
    name = entry.name.encode()  # a lone surrogate is a ValueError too
    if not 1 <= len(name) <= MAX_NAME_BYTES:
        raise ValueError(f"a name of {len(name)} bytes; it has 1…{MAX_NAME_BYTES}")
    if entry.kind not in {ARRAY, BYTES} or entry.order not in {"C", "F"}:
        raise ValueError(f"{entry.name!r} is {entry.kind!r} in order {entry.order!r}")
    if entry.kind == BYTES and (entry.dtype != np.uint8 or entry.shape != (entry.nbytes,) or entry.order != "C"):
        raise ValueError(f"{entry.name!r} are bytes, and {entry.dtype}{entry.shape}")
    if len(entry.shape) > MAX_DIMENSIONS:
        raise ValueError(f"{entry.name!r} has {len(entry.shape)} dimensions; {MAX_DIMENSIONS} is the most")
    if min((0, entry.page, *entry.shape)) < 0:
        raise ValueError(f"{entry.name!r} has a negative number")
    # numpy multiplies the dimensions without the zeros among them.
    if math.prod(n for n in entry.shape if n) * max(entry.dtype.itemsize, 1) > _MAX_BYTES:
        raise ValueError(f"{entry.name!r} of shape {entry.shape} is larger than any memory")
    if math.prod(entry.shape) * entry.dtype.itemsize != entry.nbytes:
        raise ValueError(f"{entry.name!r} has {entry.nbytes} bytes, but shape {entry.shape} of {entry.dtype}")


def _malformed(message: str, section: str) -> Malformed:
    return Malformed(message, offset=HEAD.size, section=f"manifest.md {section}")


def _read(fields: object) -> Manifest:
    """The manifest in a decoded map. Raises Malformed."""
    if not isinstance(fields, dict) or not isinstance(rows := fields.get("buffers"), list):
        raise _malformed("no map with a list of buffers", "§2")
    entries = []
    for row in rows:
        if not isinstance(row, dict):
            raise _malformed("a buffer that is no map", "§2")
        shape = _field(row, "shape", list)
        if not all(_is_size(number) for number in shape):
            raise _malformed(f"{reprlib.repr(row['shape'])} is no shape", "§3")
        dtype = _dtype(row.get("dtype"), 0)
        name, kind, order = _field(row, "name", str), _field(row, "kind", str), _field(row, "order", str)
        page, nbytes = _field(row, "page", int), _field(row, "bytes", int)
        try:
            entries.append(ManifestEntry(name, kind, dtype, tuple(shape), order, page, nbytes))
        except ValueError as error:
            raise _malformed(str(error), "§3") from None
    try:
        return Manifest(tuple(entries))
    except ValueError as error:
        raise _malformed(str(error), "§3") from None


def _field(row: Mapping[Any, Any], name: str, kind: type) -> Any:
    value = row.get(name)
    # A bool is an int to Python, not to the format.
    if type(value) is not kind:
        raise _malformed(f"{name} is {reprlib.repr(value)}, not {kind.__name__}", "§2")
    return value


def _is_size(number: object) -> bool:
    return type(number) is int and 0 <= number <= _MAX_BYTES


def _dtype_form(dtype: np.dtype[Any]) -> Any:
    """How a dtype is written (specs/manifest.md §4). Raises ValueError for one that would come back as another."""
    form = _plain_form(dtype)
    try:
        again = _dtype(form, 0)
    except Malformed:
        again = None
    if again != dtype:
        raise ValueError(f"dtype {dtype} cannot be written down: it is not made of numpy's own types without objects")
    return form


def _plain_form(dtype: np.dtype[Any]) -> Any:
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return {"base": _plain_form(base), "shape": list(shape)}
    if dtype.names is None or dtype.fields is None:
        return dtype.str
    fields = [dtype.fields[name] for name in dtype.names]
    return {
        "names": list(dtype.names),
        "formats": [_plain_form(field[0]) for field in fields],
        "offsets": [field[1] for field in fields],
        "itemsize": dtype.itemsize,
    }


def _dtype(form: object, depth: int) -> np.dtype[Any]:
    """A dtype from bytes of anywhere: never one with objects in it. Raises Malformed."""
    try:
        if depth > _MAX_DTYPE_DEPTH:
            raise ValueError(f"nested deeper than {_MAX_DTYPE_DEPTH}")
        if isinstance(form, str):
            if not _SIMPLE_DTYPE.fullmatch(form):
                raise ValueError("not one of numpy's own types")
            return np.dtype(form)
        if not isinstance(form, dict):
            raise ValueError("neither a text nor a map")
        return _sub_array(form, depth) if "base" in form else _structure(form, depth)
    except (ValueError, TypeError, OverflowError) as error:
        raise _malformed(f"dtype {reprlib.repr(form)}: {error}", "§4") from None


def _sub_array(form: Mapping[Any, Any], depth: int) -> np.dtype[Any]:
    shape = _field(form, "shape", list)
    base = _dtype(form["base"], depth + 1)
    if not 1 <= len(shape) <= MAX_DIMENSIONS or not all(_is_size(number) for number in shape):
        raise ValueError("no shape")
    if math.prod(n for n in shape if n) * max(base.itemsize, 1) > (1 << 31) - 1:
        raise ValueError("larger than an item can be")
    dtype: np.dtype[Any] = np.dtype((base, tuple(shape)))
    if dtype.itemsize != math.prod(shape) * base.itemsize:
        raise ValueError("no such sub-array")
    return dtype


def _structure(form: Mapping[Any, Any], depth: int) -> np.dtype[Any]:
    names, formats, offsets = (_field(form, key, list) for key in ("names", "formats", "offsets"))
    itemsize = _field(form, "itemsize", int)
    if not len(names) == len(formats) == len(offsets):
        raise ValueError("lists of different lengths")
    if not all(type(name) is str for name in names) or not all(_is_size(number) for number in (*offsets, itemsize)):
        raise ValueError("names are texts, offsets and the itemsize are numbers")
    types: Sequence[np.dtype[Any]] = [_dtype(one, depth + 1) for one in formats]
    if any(at + one.itemsize > itemsize for at, one in zip(offsets, types, strict=True)):
        raise ValueError("a field beyond the item's end")
    return np.dtype({"names": names, "formats": types, "offsets": offsets, "itemsize": itemsize})


def arrays_of(checkpoint: Checkpoint) -> tuple[dict[str, NDArray[np.generic]], bytes]:
    """The buffers given to `protect`, by name, with dtype and shape, and the device state that came with them.

    checkpoint: from a store or from any stream of such checkpoints
    The arrays are views of the checkpoint's memory; of an mmap or bytearray, uint8[n].
    Raises NoCheckpoint if the checkpoint was not made by `protect`, Malformed if its manifest is damaged.
    """
    parts = checkpoint.parts
    if parts.manifest is None:
        raise NoCheckpoint(f"checkpoint {checkpoint.epoch} holds memory without names: it was not made by protect()")
    manifest = Manifest.unpack(parts.manifest, pages=len(checkpoint.memory))
    return manifest.arrays(checkpoint.memory), parts.device_state
