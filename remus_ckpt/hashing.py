"""Digests in a second thread, for reading whole streams: SHA-256 costs as much as all the rest."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from remus_ckpt.wire.digest import Digest, DigestName, NewDigest, new_digest

_BY_THREAD_BYTES = 1 << 16
_MAX_WAITING = 4


class HashThread:
    """One thread; it computes the digests made by `new`, in the order of their updates."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "digest")

    def new(self, name: DigestName) -> ThreadedDigest:
        """A fresh digest."""
        return ThreadedDigest(new_digest(name), self._pool)

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(cancel_futures=True)


class ThreadedDigest:
    """A digest whose bytes, once given to `update`, must not change; a bytearray is copied."""

    def __init__(self, digest: Digest, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._hash = digest
        self._waiting: deque[Future[object]] = deque()

    def update(self, data: Any) -> None:
        """Add bytes, now or soon."""
        view = memoryview(data)
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > _MAX_WAITING):
            self._waiting.popleft().result()
        if not self._waiting and view.nbytes < _BY_THREAD_BYTES:
            self._hash.update(view)
            return
        is_used_again = isinstance(view.obj, bytearray)
        self._waiting.append(self._pool.submit(self._hash.update, bytes(view) if is_used_again else view))

    def digest(self) -> bytes:
        """The digest of everything added."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._hash.digest()


@contextmanager
def hashing() -> Iterator[NewDigest]:
    """Digests computed by a second thread, for the length of the block."""
    thread = HashThread()
    try:
        yield thread.new
    finally:
        thread.close()
