"""Chooses the kernel that runs a codec, and the passes over memory around it.

A kernel is three functions over arrays that `Codec` has already validated. Page numbers are int64 and within range,
arrays are C-contiguous, and `out` has room for n × max_page_bytes:

    encode(pages, index, reference, reference_index, full, update, out) -> bytes written
    check(encoded, n) -> bytes that n pages take
    apply(encoded, pages, index, checked) -> bytes consumed; `checked` is what `check` returned, or None

The native kernels come from one C extension, `_native`, built for every instruction set that its compiler knew; the CPU
decides which of them can run. Without the extension, numpy is used.

REMUS_CKPT_KERNEL forces one by name, and fails if it is not available.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remus_ckpt import extensions
from remus_ckpt.codec import delta, oracle, rle, xbzrle
from remus_ckpt.codec.arrays import Apply, Check, Encode, Index
from remus_ckpt.errors import KernelUnavailable
from remus_ckpt.pages import Pages

_NATIVE: dict[str, dict[str, Any]] = {}
_FEATURES: dict[str, bool] = {}
_NOT_BUILT: str | None = None
try:
    _native = extensions.load("codec._native")
except ImportError as error:
    _NOT_BUILT = f"the C extension is missing ({error}); it is built at installation if there is a C compiler"
else:
    _NATIVE, _FEATURES = _native.KERNELS, _native.FEATURES

CODINGS = (delta.CODING, rle.CODING, xbzrle.CODING, xbzrle.FOLDING)
"""All page codings. Add a new one here, and to `remus_kernels` in the C extension to make it fast."""

ENVIRONMENT = "REMUS_CKPT_KERNEL"

NATIVE = ("avx512", "avx2", "scalar")
"""The names of the native kernels, fastest first."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation of one codec.

    native: whether it checks lengths and page numbers itself, and raises ValueError if they do not fit
    """

    name: str
    max_page_bytes: int
    encode: Encode
    check: Check
    apply: Apply
    native: bool = False


@dataclass(frozen=True, slots=True)
class Scan:
    """One native implementation of the passes over memory; arrays as for a kernel.

    dirty(memory, shadow, found) -> number of page numbers written to `found`, int64[pages]
    compare(memory, shadow) -> number of pages that differ; reads every byte: the measure for encoders
    gather(memory, index, out), scatter(memory, index, pages)
    filled(pages, found) -> number of page numbers written to `found`, int64[pages]
    """

    name: str
    dirty: Callable[[Pages, Pages, Index], int]
    compare: Callable[[Pages, Pages], int]
    gather: Callable[[Pages, Index, Pages], None]
    scatter: Callable[[Pages, Index, Pages], None]
    filled: Callable[[Pages, Index], int]


def _native_kernel(name: str, codec: str, numpy: Kernel) -> Kernel:
    """The native functions say where a fault is; numpy, which is as strict, says what it is."""
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
    raise RuntimeError(f"a native kernel found a fault at byte {offset} that numpy does not find")


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
"""Codec name → kernel name → kernel, for those that this machine can run."""

SCANS = {name: Scan(name, *_NATIVE[name]["scan"]) for name in NATIVE if _runs(name)}
"""Kernel name → its passes over memory. Numpy's are in `scan`."""

PREFERENCE = (*(name for name in NATIVE if _runs(name)), "numpy")
"""The available kernels, fastest first. The oracle is only used on request."""

KERNELS = (*PREFERENCE, "oracle")


def wanted(kernel: str | None = None) -> str:
    """The name of the kernel to run: the one requested, by the caller or else by the environment, or the fastest.

    Raises KernelUnavailable, with the reason, if the requested one is not available.
    """
    name = kernel or os.environ.get(ENVIRONMENT) or PREFERENCE[0]
    if name not in KERNELS:
        raise KernelUnavailable(
            f"kernel {name!r} is not available (requested by {'the caller' if kernel else ENVIRONMENT}): "
            f"{_why_not(name)}; available: {', '.join(KERNELS)}"
        )
    return name


def choose(codec: str, kernel: str | None = None) -> Kernel:
    """The kernel for a codec; see `wanted`."""
    if codec not in TABLE:
        raise ValueError(f"no codec {codec!r}; there are {', '.join(TABLE)}")
    return TABLE[codec][wanted(kernel)]


def choose_scan(kernel: str | None = None) -> Scan | None:
    """The native passes over memory; None if numpy does them. See `wanted`."""
    return SCANS.get(wanted(kernel))


def choose_sending(kernel: str | None = None) -> Callable[..., int] | None:
    """The native function of `PageCache.records`; None if Python does that. See `wanted`."""
    name = wanted(kernel)
    send: Callable[..., int] | None = _NATIVE[name]["send"][0] if name in _NATIVE else None
    return send


def native_functions(kernel: str) -> dict[str, Any]:
    """The functions of a native kernel in the extension: codec → (encode, check, apply), "scan", and
    "send".

    Its check and apply return ~offset of a fault instead of raising. For tests and measurements.
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
    """Which kernel runs, and why.

    kernel: its name, None if the one that the environment requests is not available
    why: a sentence
    available: the names that can be requested, fastest first
    missing: native kernel → why it is not available
    built: whether the C extension is there
    not_built: why it is not, or None
    machine: such as "x86_64"
    features: CPU feature → whether it was found; empty without the extension, or off x86
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
