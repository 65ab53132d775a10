"""SHA-256 in a second thread, for reading whole segments: hashing costs as much as all the rest."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

_BY_THREAD_BYTES = 1 << 16
_MAX_WAITING = 4


class HashThread:
    """One thread; it computes the digests made by `new`, in the order of their updates."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "sha256")

    def new(self) -> ThreadedSha256:
        """A fresh SHA-256."""
        return ThreadedSha256(self._pool)

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(cancel_futures=True)


class ThreadedSha256:
    """Like hashlib's, but bytes given to `update` must not change afterwards; a bytearray is copied."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._hash = hashlib.sha256()
        self._waiting: deque[Future[None]] = deque()

    def update(self, data: Any) -> None:
        """Take in bytes, now or soon."""
        view = memoryview(data)
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > _MAX_WAITING):
            self._waiting.popleft().result()
        if not self._waiting and view.nbytes < _BY_THREAD_BYTES:
            self._hash.update(view)
            return
        is_used_again = isinstance(view.obj, bytearray)
        self._waiting.append(self._pool.submit(self._hash.update, bytes(view) if is_used_again else view))

    def digest(self) -> bytes:
        """The digest of everything taken in."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._hash.digest()


@contextmanager
def hashing() -> Iterator[Callable[[], ThreadedSha256]]:
    """Digests computed by a second thread, for the length of the block."""
    thread = HashThread()
    try:
        yield thread.new
    finally:
        thread.close()
