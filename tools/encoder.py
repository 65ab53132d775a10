#!/usr/bin/env python3
"""Our own encoder, as the conformance suite wants one: pages as JSON in, a stream out (specs/conformance.md §4).

tools/conform.py --encoder 'python tools/encoder.py'
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from remus_ckpt import PageBatch, Sender
from remus_ckpt.codec.reference import Lru
from remus_ckpt.pages import PAGE_SIZE, Buffer


def batches(checkpoint: list[list[list[Any]]]) -> Iterator[PageBatch]:
    """The batches of one checkpoint, from entries [pfn, type, page or null]."""
    for entries in checkpoint:
        pages = b"".join(bytes.fromhex(page) for _, _, page in entries if page is not None)
        yield PageBatch(
            pfns=np.array([pfn for pfn, _, _ in entries], dtype=np.uint64),
            types=np.array([kind for _, kind, _ in entries], dtype=np.uint8),
            data=np.frombuffer(pages, dtype=np.uint8).reshape(-1, PAGE_SIZE),
        )


def encode(given: dict[str, Any]) -> Iterator[Buffer]:
    """The stream, buffer by buffer."""
    sender = Sender(
        given["p2m_size"],
        codec=given["codec"],
        word=given["word"],
        buffer_pages=given["buffer_pages"],
        reference=None if given["reference_pages"] is None else Lru(given["reference_pages"]),
    )
    for checkpoint in given["checkpoints"]:
        for group in sender.checkpoint(batches(checkpoint)):
            yield from group


if __name__ == "__main__":
    for buffer in encode(json.load(sys.stdin)):
        sys.stdout.buffer.write(buffer)
