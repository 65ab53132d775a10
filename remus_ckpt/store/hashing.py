"""SHA-256 in a second thread, for those who read a whole segment: hashing costs as much as all the rest."""

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
    """One thread; `new` makes digests that it computes in the order of their updates."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "sha256")

    def new(self) -> ThreadedSha256:
        """A fresh SHA-256."""
        return ThreadedSha256(self._pool)

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(cancel_futures=True)


class ThreadedSha256:
    """As hashlib's, but what `update` is given must stay as it is; of a bytearray it takes a copy."""

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
        """Of all that was taken in."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._hash.digest()


@contextmanager
def hashing() -> Iterator[Callable[[], ThreadedSha256]]:
    """Digests by a second thread, for the time of the block."""
    thread = HashThread()
    try:
        yield thread.new
    finally:
        thread.close()
