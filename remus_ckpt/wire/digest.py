"""The digests that a stream of our own may have, computed as its bytes come (specs/stream.md §9.4)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Literal, Protocol, get_args

from blake3 import blake3

DIGEST_BYTES = 32

DigestName = Literal["sha256", "blake3"]
DIGESTS: tuple[DigestName, ...] = get_args(DigestName)
"""Every digest that is known here, the oldest first."""
DEFAULT_DIGEST: DigestName = "blake3"


class Digest(Protocol):
    """The part of a hashlib object that is used here. Data given to `update` does not change, except views of a
    bytearray."""

    def update(self, data: Any, /) -> object:
        """Take in bytes."""

    def digest(self) -> bytes:
        """The digest of all bytes so far: 32 bytes."""


NewDigest = Callable[[DigestName], Digest]
"""Makes a fresh digest."""


def new_digest(name: DigestName) -> Digest:
    """A fresh digest, computed in the calling thread."""
    return blake3() if name == "blake3" else hashlib.sha256()


def digest_of(name: DigestName, data: bytes | memoryview) -> bytes:
    """The digest of these bytes."""
    whole = new_digest(name)
    whole.update(data)
    return whole.digest()


class Sums:
    """The digests of one checkpoint: the one that its stream has, or all of them while that is unknown.

    A record stands at the end of its checkpoint, and only there says which digest it has.
    """

    def __init__(self, known: DigestName | None, new: NewDigest) -> None:
        self._running = {name: new(name) for name in (DIGESTS if known is None else (known,))}
        self._updates = [one.update for one in self._running.values()]

    def update(self, data: memoryview) -> None:
        """Take in bytes of the checkpoint."""
        for update in self._updates:
            update(data)

    def values(self) -> dict[DigestName, bytes]:
        """The digests of all bytes so far, by name."""
        return {name: one.digest() for name, one in self._running.items()}
