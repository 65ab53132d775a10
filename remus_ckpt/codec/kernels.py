"""Chooses what runs a codec, and the passes over memory around it.

A kernel is three functions over arrays that `Codec` has already validated. Page numbers are int64 and within range,
arrays are C-contiguous, and `out` has room for n × max_page_bytes:

    encode(pages, index, reference, reference_index, full, update, out) -> bytes written
    check(encoded, n) -> bytes that n pages take
    apply(encoded, pages, index, checked) -> bytes consumed; what `check` returned stands in `checked`, or None

The native ones come from one C extension, `_native`, which holds every instruction set that its compiler knew; the CPU
decides which of them may run. Without the extension numpy serves.

REMUS_CKPT_KERNEL forces one by name and fails if it cannot be had.
"""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec import delta, oracle, rle, xbzrle
from remus_ckpt.codec.arrays import Apply, Check, Encode, Index
from remus_ckpt.errors import KernelUnavailable
from remus_ckpt.pages import Pages

_NATIVE: dict[str, dict[str, Any]] = {}
_FEATURES: dict[str, bool] = {}
_NOT_BUILT: str | None = None
try:
    # By name, as the plain statement words the failure as if it were a circular import.
    _native = importlib.import_module("remus_ckpt.codec._native")
except ImportError as error:
    _NOT_BUILT = f"the C extension is not there ({error}); it is built where a C compiler is found at installation"
else:
    _NATIVE, _FEATURES = _native.KERNELS, _native.FEATURES

CODINGS = (delta.CODING, rle.CODING, xbzrle.CODING, xbzrle.FOLDING)
"""All page codings. A new one is added here, and to `remus_kernels` in the C extension if it is to be fast."""

ENVIRONMENT = "REMUS_CKPT_KERNEL"

NATIVE = ("avx512", "avx2", "scalar")
"""The names of the native kernels, fastest first."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation of one codec.

    native: it checks lengths and page numbers itself, and raises ValueError for those that do not fit
    """

    name: str
    max_page_bytes: int
    encode: Encode
    check: Check
    apply: Apply
    native: bool = False


@dataclass(frozen=True, slots=True)
class Scan:
    """One native implementation of the passes around the codecs; arrays as for a kernel.

    dirty(memory, shadow, found) -> how many page numbers it wrote to `found`, int64[pages]
    compare(memory, shadow) -> how many pages differ, every byte read: what encoders are measured against
    gather(memory, index, out), scatter(memory, index, pages)
    """

    name: str
    dirty: Callable[[Pages, Pages, Index], int]
    compare: Callable[[Pages, Pages], int]
    gather: Callable[[Pages, Index, Pages], None]
    scatter: Callable[[Pages, Index, Pages], None]


def _native_kernel(name: str, codec: str, numpy: Kernel) -> Kernel:
    """The native functions tell where the fault is; numpy, which is as strict, tells what it is."""
    encode, find_fault, find_and_apply = _NATIVE[name][codec]

    def check(encoded: NDArray[np.uint8], n: int) -> int:
        taken: int = find_fault(encoded, n)
        if taken < 0:
            _refuse(numpy, encoded, n, ~taken)
        return taken

    def apply(encoded: NDArray[np.uint8], pages: Pages, index: Index | None, checked: int | None = None) -> int:
        taken: int = find_and_apply(encoded, pages, index, checked)
        if taken < 0:
            _refuse(numpy, encoded, len(pages) if index is None else len(index), ~taken)
        return taken

    return Kernel(name, numpy.max_page_bytes, encode, check, apply, native=True)


def _refuse(numpy: Kernel, encoded: NDArray[np.uint8], n: int, offset: int) -> None:
    numpy.check(np.frombuffer(encoded, dtype=np.uint8), n)
    raise RuntimeError(f"a native kernel found a fault at byte {offset} that numpy does not see")


def _table() -> dict[str, dict[str, Kernel]]:
    table = {}
    for coding in CODINGS:
        numpy = Kernel("numpy", coding.max_page_bytes, coding.encode, coding.check, coding.apply)
        table[coding.name] = {
            **{name: _native_kernel(name, coding.name, numpy) for name in NATIVE if _runs(name)},
            "numpy": numpy,
            "oracle": Kernel("oracle", coding.max_page_bytes, *oracle.kernel(coding.oracle)),
        }
    return table


def _runs(name: str) -> bool:
    return name in _NATIVE and bool(_NATIVE[name]["runs"])


TABLE = _table()
"""Codec name → kernel name → kernel: those that this machine can run."""

SCANS = {name: Scan(name, *_NATIVE[name]["scan"]) for name in NATIVE if _runs(name)}
"""Kernel name → its passes over memory. Numpy's stand in `scan`."""

PREFERENCE = (*(name for name in NATIVE if _runs(name)), "numpy")
"""Those that can be had, fastest first. The oracle is never chosen by itself."""

KERNELS = (*PREFERENCE, "oracle")


def wanted(kernel: str | None = None) -> str:
    """The name of the kernel to run: the one demanded, the one that the environment demands, or the fastest there is.

    Raises KernelUnavailable, with the reason, if the one demanded cannot be had.
    """
    name = kernel or os.environ.get(ENVIRONMENT) or PREFERENCE[0]
    if name not in KERNELS:
        raise KernelUnavailable(
            f"kernel {name!r} is not available (asked for by {'the caller' if kernel else ENVIRONMENT}): "
            f"{_why_not(name)}; there are {', '.join(KERNELS)}"
        )
    return name


def choose(codec: str, kernel: str | None = None) -> Kernel:
    """The kernel for a codec; see `wanted`."""
    if codec not in TABLE:
        raise ValueError(f"no codec {codec!r}; there are {', '.join(TABLE)}")
    return TABLE[codec][wanted(kernel)]


def choose_scan(kernel: str | None = None) -> Scan | None:
    """The native passes over memory; None where numpy is to do them. See `wanted`."""
    return SCANS.get(wanted(kernel))


def native_functions(kernel: str) -> dict[str, Any]:
    """What the extension offers for a native kernel: codec → (encode, check, apply), and "scan".

    Its check and apply return ~offset of a fault in place of raising. For tests and measurements.
    """
    return {name: functions for name, functions in _NATIVE[kernel].items() if isinstance(functions, tuple)}


def _why_not(name: str) -> str:
    if name not in NATIVE:
        return "no kernel has that name"
    if _NOT_BUILT:
        return _NOT_BUILT
    if name not in _NATIVE:
        return f"the C extension was built without it, for {platform.machine()}"
    return f"this CPU lacks {', '.join(f for f in _NATIVE[name]['needs'].split() if not _FEATURES.get(f))}"


def report() -> dict[str, Any]:
    """What runs, and why.

    kernel: the name of what runs, None if what the environment demands cannot be had
    why: a sentence
    available: the names that could be demanded, fastest first
    missing: native kernel → why it cannot be had
    built: is the C extension there?
    not_built: why it is not, or None
    machine: such as "x86_64"
    features: CPU feature → was it seen? Empty without the extension, or off x86.
    """
    demanded = os.environ.get(ENVIRONMENT)
    kernel: str | None
    try:
        kernel = wanted()
        why = f"{ENVIRONMENT} demands it" if demanded else "the fastest that this machine runs"
    except ValueError as error:
        kernel, why = None, str(error)
    return {
        "kernel": kernel,
        "why": why,
        "available": list(KERNELS),
        "missing": {name: _why_not(name) for name in NATIVE if name not in KERNELS},
        "built": _NOT_BUILT is None,
        "not_built": _NOT_BUILT,
        "machine": platform.machine(),
        "features": dict(_FEATURES),
    }
