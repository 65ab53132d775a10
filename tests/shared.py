"""The big vectors that are not carried by the project: streams of real Xen, and page pairs with real encoders' bytes.

They lie in the directory that REMUS_CKPT_SHARED names, else in `shared` beside the repository. Tests that need them
skip where they are not.
"""

from __future__ import annotations

import functools
import json
import lzma
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from remus_ckpt.pages import PAGE_SIZE, Pages

ENVIRONMENT = "REMUS_CKPT_SHARED"
ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get(ENVIRONMENT) or ROOT.parent / "shared")
VECTORS = SHARED / "vectors"
XEN, PAGES = VECTORS / "xen", VECTORS / "pages"

_WHERE = f"no {{}}: name the directory of the shared vectors in {ENVIRONMENT}, or put it beside the repository"
needs_xen = pytest.mark.skipif(not (XEN / "manifest.json").exists(), reason=_WHERE.format("vectors/xen"))
needs_pages = pytest.mark.skipif(not (PAGES / "manifest.json").exists(), reason=_WHERE.format("vectors/pages"))


@functools.cache
def xen_manifest() -> dict[str, dict[str, Any]]:
    """The manifest of the real streams by id; empty where they are not there."""
    path = XEN / "manifest.json"
    return {row["id"]: row for row in json.loads(path.read_text())} if path.exists() else {}


XEN_IDS = [
    "hvm-plain",
    "hvm-live-xalloc",
    "remus-raw",
    "remus-rle",
    "remus-rle-xen42",
    "remus-rle-32bit",
    "pv-plain",
    "pv-remus-rle",
    "remus-rle-overflow",
    "n-hvm-remus-all",
    "n-hvm-verify-remus",
    "n-hvm-vcpus130",
    "n-pv-vcpus70",
    "n-pv32-on-64",
]
"""All of them, named here so that one that is missing is a failure and not a test less."""


@functools.lru_cache(maxsize=len(XEN_IDS))
def xen_stream(name: str) -> bytes:
    """The bytes of a real stream."""
    return lzma.decompress((XEN / xen_manifest()[name]["file"]).read_bytes())


@functools.cache
def page_pairs() -> tuple[Pages, Pages, dict[str, NDArray[np.uint8]]]:
    """(old pages, new pages, codec → what its real encoder makes of them)"""

    def load(part: str) -> NDArray[np.uint8]:
        data = np.frombuffer(lzma.decompress((PAGES / f"pages.{part}.xz").read_bytes()), dtype=np.uint8)
        data.flags.writeable = False
        return data

    return (
        load("old").reshape(-1, PAGE_SIZE),
        load("new").reshape(-1, PAGE_SIZE),
        {codec: load(codec) for codec in ("rle", "xbzrle")},
    )
