"""Fields and item types of the manifest (specs/manifest.md §2, §4): read with every value checked, and written."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from remus_ckpt.errors import Malformed
from remus_ckpt.wire.parts import HEAD

MAX_DIMENSIONS = 32
MAX_BYTES = (1 << 63) - 1
_MAX_DTYPE_DEPTH = 16
_SIMPLE_DTYPE = re.compile(r"[<>|](?:[biufcSUV][0-9]{1,10}|[mM]8(?:\[[0-9]{0,10}[A-Za-z]{1,7}\])?)", re.ASCII)


def malformed(message: str, section: str) -> Malformed:
    """What is wrong with a map; offsets count from the head in front of it."""
    return Malformed(message, offset=HEAD.size, section=f"manifest.md {section}")


def field(row: Mapping[Any, Any], name: str, kind: type) -> Any:
    """One value of a map, of exactly that type. Raises Malformed."""
    value = row.get(name)
    # A bool is an int to Python, not to the format.
    if type(value) is not kind:
        raise malformed(f"{name} is {reprlib.repr(value)}, not {kind.__name__}", "§2")
    return value


def is_size(number: object) -> bool:
    """Whether this is a number of bytes or items."""
    return type(number) is int and 0 <= number <= MAX_BYTES


def dtype_form(dtype: np.dtype[Any]) -> Any:
    """How a dtype is written (specs/manifest.md §4). Raises ValueError for one that would come back as another."""
    form = _plain_form(dtype)
    try:
        again = read_dtype(form, 0)
    except Malformed:
        again = None
    if again != dtype:
        raise ValueError(f"dtype {dtype} cannot be stored: it must consist of numpy's own types, without objects")
    return form


def _plain_form(dtype: np.dtype[Any]) -> Any:
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return {"base": _plain_form(base), "shape": list(shape)}
    if dtype.names is None or dtype.fields is None:
        return dtype.str
    parts = [dtype.fields[name] for name in dtype.names]
    return {
        "names": list(dtype.names),
        "formats": [_plain_form(part[0]) for part in parts],
        "offsets": [part[1] for part in parts],
        "itemsize": dtype.itemsize,
    }


def read_dtype(form: object, depth: int) -> np.dtype[Any]:
    """A dtype from bytes of anywhere: never one with objects in it. Raises Malformed."""
    try:
        if depth > _MAX_DTYPE_DEPTH:
            raise ValueError(f"nested deeper than {_MAX_DTYPE_DEPTH}")
        if isinstance(form, str):
            if not _SIMPLE_DTYPE.fullmatch(form):
                raise ValueError("not one of numpy's own types")
            return np.dtype(form)
        if not isinstance(form, dict):
            raise ValueError("neither a string nor a map")
        return _sub_array(form, depth) if "base" in form else _structure(form, depth)
    except (ValueError, TypeError, OverflowError) as error:
        raise malformed(f"dtype {reprlib.repr(form)}: {error}", "§4") from None


def _sub_array(form: Mapping[Any, Any], depth: int) -> np.dtype[Any]:
    shape = field(form, "shape", list)
    base = read_dtype(form["base"], depth + 1)
    if not 1 <= len(shape) <= MAX_DIMENSIONS or not all(is_size(number) for number in shape):
        raise ValueError("no shape")
    if math.prod(n for n in shape if n) * max(base.itemsize, 1) > (1 << 31) - 1:
        raise ValueError("larger than an item can be")
    dtype: np.dtype[Any] = np.dtype((base, tuple(shape)))
    if dtype.itemsize != math.prod(shape) * base.itemsize:
        raise ValueError("no such sub-array")
    return dtype


def _structure(form: Mapping[Any, Any], depth: int) -> np.dtype[Any]:
    names, formats, offsets = (field(form, key, list) for key in ("names", "formats", "offsets"))
    itemsize = field(form, "itemsize", int)
    if not len(names) == len(formats) == len(offsets):
        raise ValueError("lists of different lengths")
    if not all(type(name) is str for name in names) or not all(is_size(number) for number in (*offsets, itemsize)):
        raise ValueError("names are strings, offsets and the itemsize are numbers")
    types: Sequence[np.dtype[Any]] = [read_dtype(one, depth + 1) for one in formats]
    if any(at + one.itemsize > itemsize for at, one in zip(offsets, types, strict=True)):
        raise ValueError("a field beyond the item's end")
    return np.dtype({"names": names, "formats": types, "offsets": offsets, "itemsize": itemsize})
