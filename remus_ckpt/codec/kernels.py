"""Chooses what runs a codec.

A kernel is three functions over arrays that `Codec` has already validated. Page numbers are int64 and within range,
arrays are C-contiguous, and `out` has room for n × max_page_bytes:

    encode(pages, index, reference, reference_index, full, update, out) -> bytes written
    check(encoded, n) -> bytes that n pages take
    apply(encoded, pages, index) -> bytes consumed

REMUS_CKPT_KERNEL forces one by name and fails if it cannot be had.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec import delta, oracle, rle, xbzrle
from remus_ckpt.pages import Pages

Index = NDArray[np.int64]
Flags = NDArray[np.bool_]

ENVIRONMENT = "REMUS_CKPT_KERNEL"


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation of one codec."""

    name: str
    max_page_bytes: int
    encode: Callable[[Pages, Index | None, Pages, Index | None, Flags | None, bool, NDArray[np.uint8]], int]
    check: Callable[[NDArray[np.uint8], int], int]
    apply: Callable[[NDArray[np.uint8], Pages, Index | None], int]


TABLE: dict[str, dict[str, Kernel]] = {
    "delta": {
        "numpy": Kernel("numpy", delta.MAX_PAGE_BYTES, delta.encode, delta.check, delta.apply),
        "oracle": Kernel("oracle", delta.MAX_PAGE_BYTES, *oracle.kernel(oracle.Delta())),
    },
    "rle": {
        "numpy": Kernel("numpy", rle.MAX_PAGE_BYTES, rle.encode, rle.check, rle.apply),
        "oracle": Kernel("oracle", rle.MAX_PAGE_BYTES, *oracle.kernel(oracle.Rle())),
    },
    "xbzrle": {
        "numpy": Kernel("numpy", xbzrle.MAX_PAGE_BYTES, xbzrle.encode, xbzrle.check, xbzrle.apply),
        "oracle": Kernel("oracle", xbzrle.MAX_PAGE_BYTES, *oracle.kernel(oracle.Xbzrle(fold=False))),
    },
    "xbzrle-fold": {
        "numpy": Kernel("numpy", xbzrle.MAX_PAGE_BYTES, partial(xbzrle.encode, fold=True), xbzrle.check, xbzrle.apply),
        "oracle": Kernel("oracle", xbzrle.MAX_PAGE_BYTES, *oracle.kernel(oracle.Xbzrle(fold=True))),
    },
}
"""Codec name → kernel name → kernel."""

PREFERENCE = ("numpy",)
"""Fastest first. The oracle is never chosen by itself."""

KERNELS = (*PREFERENCE, "oracle")


def choose(codec: str, kernel: str | None = None) -> Kernel:
    """The kernel for a codec: the one demanded, the one that the environment demands, or the fastest there is."""
    if codec not in TABLE:
        raise ValueError(f"no codec {codec!r}; there are {', '.join(TABLE)}")
    wanted = kernel or os.environ.get(ENVIRONMENT) or PREFERENCE[0]
    if wanted not in TABLE[codec]:
        raise ValueError(
            f"kernel {wanted!r} is not available for {codec!r} (asked for by "
            f"{'the caller' if kernel else ENVIRONMENT}); there are {', '.join(TABLE[codec])}"
        )
    return TABLE[codec][wanted]
