"""Connects a source, its primary and its backup; protects the caller's own arrays from Python."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from remus_ckpt.errors import Fenced, LinkError, RemusError
from remus_ckpt.link.address import Address
from remus_ckpt.link.connection import Connection
from remus_ckpt.link.dial import connect
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.loop import StopSignal, Taken
from remus_ckpt.observe.log import log
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.service.primary import Primary
from remus_ckpt.service.release import Committed
from remus_ckpt.service.turns import deadline_in
from remus_ckpt.session.messages import Level
from remus_ckpt.source import Source
from remus_ckpt.source.lock import Lock
from remus_ckpt.source.own_memory import OwnMemory
from remus_ckpt.source.track.kernel import AUDIT_PAUSES, Tracking
from remus_ckpt.wire.record import Position
from remus_ckpt.wire.xen.dialect import StreamCodec

_CONNECT_S = 10.0
_HANG_UP_S = 0.5
"""Time for a late thread to notice that its link has been closed."""


def primary_of(
    source: Source, name: str, to: str | Address, *, tls: TlsFiles | None = None, insecure: bool = False, **options: Any
) -> Primary:
    """A primary for a source; it dials the backup whenever it needs a link.

    to: the backup, such as "tls://backup:7411"
    tls: our certificate, for tls://
    insecure: allow plain tcp:// to another machine
    options: as for `Primary`
    Whoever made the source closes it, after the primary.
    """
    address = Address.parse(to) if isinstance(to, str) else to

    def dial() -> Connection:
        return connect(address, tls=tls, insecure=insecure, timeout_s=primary.left_s(_CONNECT_S))

    primary = Primary(name, source, dial, **options)
    return primary


def protect(
    buffers: Mapping[str, Any],
    *,
    to: str | Address,
    name: str,
    tls_dir: str | Path | None = None,
    interval_s: float | None = None,
    lock: Lock | None = None,
    device_state: Callable[[], bytes] = bytes,
    on_commit: Callable[[Committed], None] | None = None,
    on_fenced: Callable[[Fenced], None] | None = None,
    codec: StreamCodec = "delta",
    window: int = 2,
    wait: Level = "durable",
    compression: str = "auto",
    term: int | None = None,
    insecure: bool = False,
    metrics: Metrics | None = None,
    tracking: Tracking = "auto",
    audit: int = AUDIT_PAUSES,
) -> Protection:
    """Keep named numpy arrays, mmaps and bytearrays of this process on a backup.

    buffers: what to protect, by name; see `OwnMemory` for what is accepted
    to: the backup, such as "tls://backup:7411"
    name: the name under which the backup keeps them
    tls_dir: a folder made by `remus-ckpt keys issue`, for tls://
    interval_s: take checkpoints in a thread, this far apart; None: only when `checkpoint` is called
    lock: taken in each pause; whoever writes to the buffers must hold it. Required with `interval_s`
    device_state: called in each pause; returns bytes of your own that come back with the checkpoint
    on_commit: called for each commit, in a thread of its own: output held back for it may now go out. Exceptions from
        it are logged, and later commits are still delivered. If it does not return, checkpoints and `close` eventually
        wait for it, and raise when their time runs out
    on_fenced: called when this side learns that another has taken over, before anything else: stop the work here. With
        `interval_s`, the thread calls it, at once; otherwise the call that raises Fenced does. Exceptions from it are
        logged. It must not call the protection
    window, wait, compression, codec, term: as for `Primary`
    insecure: allow plain tcp:// to another machine
    tracking, audit: how written pages are found, as for `OwnMemory`

        with protect({"orders": orders}, to="tls://backup:7411", name="orders", tls_dir="keys/me") as protection:
            orders[7] += 1
            protection.checkpoint(wait=True)

    A forked child has no part in it: there, `checkpoint` raises ValueError and `close` does nothing.
    Raises TypeError or ValueError for buffers that cannot be protected.
    """
    if interval_s is not None and lock is None:
        raise ValueError("checkpoints in a thread need a lock that the writers hold while they write")
    address = Address.parse(to) if isinstance(to, str) else to
    tls = TlsFiles(tls_dir) if tls_dir is not None else None
    source = OwnMemory(buffers, lock=lock, device_state=device_state, tracking=tracking, audit=audit)
    stop = StopSignal()
    primary = primary_of(
        source,
        name,
        address,
        tls=tls,
        insecure=insecure,
        codec=codec,
        interval_s=interval_s or 0.0,
        window=window,
        wait=wait,
        compression=compression,
        term=term,
        on_commit=on_commit,
        on_fenced=on_fenced,
        metrics=metrics,
        stop=stop,
    )
    return Protection(primary, source, stop, in_thread=interval_s is not None)


class Protection:
    """Buffers under protection, until `close`. Made by `protect`."""

    def __init__(self, primary: Primary, source: OwnMemory, stop: StopSignal, *, in_thread: bool) -> None:
        self._primary = primary
        self._source = source
        self._stop = stop
        self._error: BaseException | None = None
        self._pid = os.getpid()
        self._is_closed = False
        self._has_ended = not in_thread  # whether the thread has
        self._thread: threading.Thread | None = None
        if in_thread:
            self._thread = threading.Thread(target=self._run, args=(primary.run(),), name="checkpoints", daemon=True)
            self._thread.start()

    @property
    def committed(self) -> Position | None:
        """The newest position that the backup has acknowledged, None before the first."""
        return self._primary.committed

    def checkpoint(self, *, wait: bool = False, timeout_s: float = 30.0) -> int:
        """Take a checkpoint now; returns its epoch. Not available with an interval: then the thread takes them.

        Threads that call at once take turns. Called from a callback inside `checkpoint`, it raises ValueError.

        wait: return only once it is committed; otherwise as soon as it is sent and the window has room
        timeout_s: for the whole call, including a first copy of all memory, but not for `lock`, which has 10 s, nor for
            the time that `device_state` takes; math.inf for no limit
        Raises LinkError if the time runs out, RemusError if on_commit or another thread's call does not return, Fenced
        when another side has taken over. The next call continues correctly.
        """
        if self._thread is not None:
            raise ValueError("checkpoints are taken in a thread here; wait_for() waits for a commit")
        if self._is_closed:
            raise ValueError("the protection has been closed")
        try:
            return self._primary.checkpoint(timeout_s, wait=wait)
        except Exception as error:
            if self._is_closed:
                raise ValueError("the protection was closed meanwhile") from error
            raise

    def wait_for(self, epoch: int, timeout_s: float | None = None) -> Position:
        """Wait until that epoch, or a later one, is committed.

        Raises LinkError if the outcome is unknown, or the error that ended the thread.
        """
        self._raise()
        try:
            return self._primary.wait_for(epoch, timeout_s)
        except LinkError:
            if self._thread is not None and not self._primary.is_running:
                self._thread.join(_HANG_UP_S)
                self._raise()
            raise

    def status(self) -> dict[str, Any]:
        """The status of this side, as `remus-ckpt status` shows it."""
        return self._primary.status()

    def close(self, timeout_s: float = 30.0) -> None:
        """Wait until what was sent is committed and on_commit has returned, then end, all within `timeout_s`.

        Raises the error that ended the thread, LinkError if what was sent is not known to be committed, RemusError if a
        callback does not return; the protection is closed all the same. Further calls, and calls in a forked child, do
        nothing.
        """
        if self._is_closed or self._pid != os.getpid():
            return
        deadline = deadline_in(timeout_s)
        try:
            if self._thread is not None:
                self._end_thread(self._thread, timeout_s)
                self._raise()
            self._primary.drain(max(deadline - time.monotonic(), 0.0))
        finally:
            self._is_closed = True
            try:
                self._primary.close(max(deadline - time.monotonic(), 0.0))
            finally:
                self._let_go()

    def _end_thread(self, thread: threading.Thread, timeout_s: float) -> None:
        self._primary.hurry(timeout_s)
        self._stop.set()
        thread.join(min(timeout_s, threading.TIMEOUT_MAX))
        if thread.is_alive():
            self._primary.hang_up()
            thread.join(_HANG_UP_S)
        if thread.is_alive():
            raise RemusError("the thread that takes checkpoints does not end: does a callback return, and the lock?")

    def _let_go(self) -> None:
        """Release the source and the signal; the last user does this: this call or the thread."""
        if self._is_closed and self._has_ended:
            self._source.close()
            self._stop.close()

    def _run(self, checkpoints: Iterator[Taken]) -> None:
        try:
            for _ in checkpoints:
                pass
        except BaseException as error:
            self._error = error
            log("the protection has ended", level=logging.ERROR, name=self._primary.name, error=error)
        finally:
            self._has_ended = True
            self._let_go()

    def _raise(self) -> None:
        if isinstance(self._error, Exception):
            raise self._error
        if self._error is not None:  # it was meant to end the thread, not our caller
            raise RemusError(f"the thread that takes checkpoints has ended: {self._error!r}") from self._error

    def __del__(self) -> None:
        # Dropped without `close`: the open link would otherwise keep the name from whoever protects it next.
        if self._pid == os.getpid():
            self._primary.hang_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception:
            if error is None:
                raise
