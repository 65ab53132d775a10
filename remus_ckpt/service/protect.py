"""Connects a source, its primary and its backup; protects the caller's own arrays from Python."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from remus_ckpt.errors import Fenced, LinkError, RemusError
from remus_ckpt.fleet.group import Fleet, is_fleet, split_fleet
from remus_ckpt.fleet.placed import Placed
from remus_ckpt.link.address import Address
from remus_ckpt.link.connection import Connection
from remus_ckpt.link.dial import connect
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.loop import StopSignal, Taken
from remus_ckpt.observe.log import log
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.pause import MAX_PAUSE_S
from remus_ckpt.service.primary import Primary
from remus_ckpt.service.release import Committed
from remus_ckpt.service.rollback import Between, newest_held, put_back, put_back_newest
from remus_ckpt.service.turns import deadline_in
from remus_ckpt.session.messages import Level
from remus_ckpt.source import Source
from remus_ckpt.source.event_loop import LoopLock
from remus_ckpt.source.lock import Lock
from remus_ckpt.source.own_memory import OwnMemory
from remus_ckpt.source.track.kernel import AUDIT_PAUSES, Tracking
from remus_ckpt.wire.digest import DEFAULT_DIGEST, DigestName
from remus_ckpt.wire.record import Position
from remus_ckpt.wire.xen.dialect import StreamCodec

if TYPE_CHECKING:
    from remus_ckpt.fleet.engine import Log
    from remus_ckpt.store.history import History

_CONNECT_S = 10.0
_HANG_UP_S = 0.5
"""Time for a late thread to notice that its link has been closed."""


def primary_of(
    source: Source,
    name: str,
    to: str | Address,
    *,
    tls: TlsFiles | None = None,
    insecure: bool = False,
    metrics: Metrics | None = None,
    **options: Any,
) -> Primary:
    """A primary for a source; it dials the backup whenever it needs a link.

    to: the backup, such as "tls://backup:7411"; or the brokers of a fleet, such as "nats://broker:4222": then the name
        is protected by a backup there that has room, and by another when that one dies
    tls: our certificate, for tls://
    insecure: allow plain tcp:// and nats:// to another machine
    metrics, options: as for `Primary`
    Whoever made the source closes it, after the primary.
    """
    placed = None
    if isinstance(to, str) and is_fleet(to):
        url, _ = split_fleet(to)
        placed = Placed(Fleet(url, tls=tls, insecure=insecure), name, partial(_dial, tls, insecure))
    else:
        address = Address.parse(to) if isinstance(to, str) else to

    def dial() -> Connection:
        where = address if placed is None else Address.parse(placed.address)
        return connect(where, tls=tls, insecure=insecure, timeout_s=primary.left_s(_CONNECT_S))

    metrics = metrics or Metrics()
    if tls is not None:
        metrics.watch_certificate(tls.expires)
    primary = Primary(name, source, dial, placed=placed, metrics=metrics, **options)
    return primary


def _dial(tls: TlsFiles | None, insecure: bool, address: str, timeout_s: float) -> Connection:
    """Connect to a backup at an address that the fleet has given. Raises LinkError."""
    return connect(Address.parse(address, "tls"), tls=tls, insecure=insecure, timeout_s=timeout_s)


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
    digest: DigestName = DEFAULT_DIGEST,
    term: int | None = None,
    log_url: str | None = None,
    insecure: bool = False,
    metrics: Metrics | None = None,
    tracking: Tracking = "auto",
    audit: int = AUDIT_PAUSES,
    max_pause_s: float = MAX_PAUSE_S,
    connect_timeout_s: float | None = 10.0,
) -> Protection:
    """Keep named numpy arrays, DataFrames, mmaps, shared memory and bytearrays of this process on a backup.

    buffers: what to protect, by name; `Buffers` in source/own_memory.py says what is accepted. Write to these very
        objects: if a name of a dict comes to mean another one (`state["x"] = state["x"] + 1`), the next checkpoint
        raises SourceError. If a variable does (`x = x + 1`), nothing can find that for certain: an array that nothing
        else refers to any more is reported once, in the log
    to: the backup, such as "tls://backup:7411", or the brokers of a fleet, such as "nats://broker:4222": one of its
        backups that has room, and another when that one dies
    name: the name under which the backup keeps them
    tls_dir: a folder made by `remus-ckpt keys issue`, for tls://
    log_url: the commit log of the group, as for --log: a checkpoint counts as committed once it is there too
    interval_s: take checkpoints in a thread, this far apart; None: only when `checkpoint` or `acheckpoint` is called
    lock: taken in each pause; whoever writes to the buffers must hold it. Required with `interval_s`, and if other
        threads write to them
    device_state: called in each pause; returns bytes of your own that come back with the checkpoint
    on_commit: called for each commit, in a thread of its own: output held back for it may now go out. Exceptions from
        it are logged, and later commits are still delivered. If it does not return, checkpoints and `close` eventually
        wait for it, and raise when their time runs out
    on_fenced: called when this side learns that another has taken over, before anything else: stop the work here. With
        `interval_s`, the thread calls it, at once; otherwise the call that raises Fenced does. Exceptions from it are
        logged. It must not call the protection
    window, wait, compression, digest, codec, term: as for `Primary`
    insecure: allow plain tcp:// to another machine
    tracking, audit: how written pages are found, as for `OwnMemory`
    max_pause_s: encode pages in the pause, unless that is expected to make it longer than this; then only copy them
        there: the pause is shorter, and the commit later
    connect_timeout_s: how long this call tries to reach the backup; None: until it is there. 0: not at all; the first
        checkpoint does. A link that is lost later is replaced by the next checkpoint

        with protect({"orders": orders}, to="tls://backup:7411", name="orders", tls_dir="keys/me") as protection:
            orders[7] += 1
            protection.checkpoint(wait=True)

    A forked child has no part in it: there, `checkpoint` raises ValueError and `close` does nothing.
    Raises TypeError or ValueError for buffers that cannot be protected; LinkError, with address and reason, if the
    backup cannot be reached; UnknownFormat if something else answers there.
    """
    if interval_s is not None and lock is None:
        raise ValueError("checkpoints in a thread need a lock that the writers hold while they write")
    if not (isinstance(to, str) and is_fleet(to)):
        to = Address.parse(to) if isinstance(to, str) else to
    tls = TlsFiles(tls_dir) if tls_dir is not None else None
    commit_log: Log | None = None
    if log_url is not None:
        from remus_ckpt.fleet.opening import OpenedLog

        commit_log = OpenedLog(log_url, tls=tls, insecure=insecure)
    with ExitStack() as stack:
        loop_lock = LoopLock() if lock is None else None
        source = OwnMemory(buffers, lock=loop_lock or lock, device_state=device_state, tracking=tracking, audit=audit)
        stack.callback(source.close)
        stop = StopSignal()
        stack.callback(stop.close)
        between = Between() if interval_s is not None else None
        primary = primary_of(
            source,
            name,
            to,
            tls=tls,
            insecure=insecure,
            codec=codec,
            interval_s=interval_s or 0.0,
            max_pause_s=max_pause_s,
            window=window,
            wait=wait,
            compression=compression,
            digest=digest,
            term=term,
            commit_log=commit_log,
            on_commit=on_commit,
            on_fenced=on_fenced,
            # The thread is between two checkpoints before it pauses for the next one.
            on_phase=None if between is None else lambda phase, _: between.serve() if phase == "capture" else None,
            metrics=metrics,
            stop=stop,
        )
        stack.callback(primary.close, 0.0)
        if connect_timeout_s != 0:
            primary.connect(math.inf if connect_timeout_s is None else connect_timeout_s)

        def reader() -> History:
            from remus_ckpt.store.remote import Remote

            return Remote(f"{primary.address or to}/{name}", tls_dir=tls_dir, insecure=insecure)

        protection = Protection(primary, source, stop, loop_lock, reader, between, commit_log)
        stack.pop_all()
    return protection


class Protection:
    """Buffers under protection, until `close`. Made by `protect`."""

    def __init__(
        self,
        primary: Primary,
        source: OwnMemory,
        stop: StopSignal,
        loop_lock: LoopLock | None,
        reader: Callable[[], History],
        between: Between | None,
        commit_log: Log | None = None,
    ) -> None:
        self._primary = primary
        self._commit_log = commit_log
        self._source = source
        self._reader = reader
        self._between = between  # None: no thread takes checkpoints
        self._stop = stop
        self._loop_lock = loop_lock  # None: writers have a lock
        self._abandoned: set[str] = set()
        self._error: BaseException | None = None
        self._pid = os.getpid()
        self._is_closed = False
        self._has_ended = between is None  # whether the thread has
        self._thread: threading.Thread | None = None
        if between is not None:
            self._thread = threading.Thread(target=self._run, args=(primary.run(),), name="checkpoints", daemon=True)
            self._thread.start()

    @property
    def source(self) -> OwnMemory:
        """The buffers, and how their written pages are found."""
        return self._source

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
            epoch = self._primary.checkpoint(timeout_s, wait=wait)
        except Exception as error:
            if self._is_closed:
                raise ValueError("the protection was closed meanwhile") from error
            raise
        self._report_abandoned()
        return epoch

    async def acheckpoint(self, *, timeout_s: float = 30.0) -> int:
        """Take a checkpoint while the event loop runs on; returns its epoch once it is committed.

        A thread takes it. Without `lock`, the pause holds up the event loop between two steps, just for as long as it
        takes to find and copy pages: the checkpoint has all that was written before this call, and perhaps what other
        coroutines have written since, up to an `await` of each. With `lock`, the pause takes the lock, which no
        coroutine may hold across an `await`.

        Calls at once take turns. If this call is cancelled, its checkpoint is taken all the same, and may be committed
        later or not: the next call waits for its end. Meanwhile the thread of the event loop must not call
        `checkpoint`, `wait_for` or `close`: the pause would wait for it, and fail after 10 s. `device_state` is called
        in the thread.
        timeout_s and errors: as for `checkpoint`; SourceError if the event loop is blocked for 10 s
        """
        import asyncio  # whoever awaits this has loaded it

        loop = asyncio.get_running_loop()
        done: asyncio.Future[int] = loop.create_future()

        def take() -> None:
            try:
                with self._loop_lock.holding_up(loop) if self._loop_lock else nullcontext():
                    tell = partial(done.set_result, self.checkpoint(wait=True, timeout_s=timeout_s))
            except BaseException as error:
                tell = partial(done.set_exception, error)
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(lambda: done.cancelled() or tell())

        try:
            threading.Thread(target=take, name="acheckpoint", daemon=True).start()
        except RuntimeError as error:  # no more threads are allowed
            raise RemusError(f"no thread for a checkpoint: {error}") from error
        return await done

    def rollback(self, epoch: int | None = None, *, history: History | None = None, timeout_s: float = 30.0) -> int:
        """Put the arrays back, in place, to what a committed checkpoint holds; returns its epoch.

        epoch: of the checkpoint; None: the newest, once it is committed. The newest takes no more time than the pages
            that were written since; any other is read from the backup, or from `history`
        history: the same history on this machine, `open_store(DIRECTORY)[NAME]`, which is faster
        timeout_s: for all waiting; what is under way is not cut short

        Only pages that differ are written, in a pause: `lock` is taken, and this thread must not hold it. With
        `interval_s`, that is right before the next checkpoint. Checkpoints go on from what was put back, under the next
        number. What `device_state` returned is not put back.
        Raises NoCheckpoint if the checkpoint is not there or holds other arrays, BadCheckpoint if it is damaged,
        LinkError if the newest is not committed in time, or the backup cannot be reached, Fenced when another side has
        taken over. The arrays are then as they were.
        """
        deadline = deadline_in(timeout_s)
        if self._is_closed:
            raise ValueError("the protection has been closed")
        self._raise()
        found: list[int] = []

        def newest() -> None:
            if (held := newest_held(self._primary, epoch, deadline)) is not None:
                put_back_newest(self._source, held[1])
                found.append(held[0])

        self._do_between(newest, deadline)
        if not found:
            assert epoch is not None
            checkpoint = (history or self._reader()).restore(epoch)
            self._do_between(lambda: put_back(self._source, checkpoint), deadline)
            found.append(epoch)
        return found[0]

    def _do_between(self, work: Callable[[], None], deadline: float) -> None:
        """Do something between two checkpoints."""
        if self._between is not None:
            self._between.run(work, deadline)
        else:
            self._primary.between(work, max(deadline - time.monotonic(), 0.0))

    def _report_abandoned(self) -> None:
        """Report, once each, arrays that nobody can write to any more."""
        for name in set(self._source.memory.abandoned()) - self._abandoned:
            self._abandoned.add(name)
            text = "nothing else refers to this array any more: was another one made under its name?"
            log(text, level=logging.WARNING, name=self._primary.name, array=name)

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
            if self._commit_log is not None:
                self._commit_log.close()
            self._source.close()
            self._stop.close()

    def _run(self, checkpoints: Iterator[Taken]) -> None:
        try:
            for _ in checkpoints:
                self._report_abandoned()
        except BaseException as error:
            self._error = error
            log("the protection has ended", level=logging.ERROR, name=self._primary.name, error=error)
        finally:
            self._has_ended = True
            if self._between is not None:
                self._between.end()
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
