"""The backup: receives checkpoints, checks and stores them, says so, and takes over when it is told to or must.

One thread accepts connections and looks at the clock; each connection has a thread of its own, and so has each command
that is run. What is to be done about a silent primary is decided in `failover`, which knows neither clock nor socket.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import resource
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgpack

from remus_ckpt.errors import (
    LimitExceeded,
    LinkError,
    Malformed,
    NoCheckpoint,
    RemusError,
    StoreError,
    StreamError,
    UnknownFormat,
)
from remus_ckpt.forks import disown_in_forks
from remus_ckpt.limits import Limits
from remus_ckpt.link.address import Address
from remus_ckpt.link.connection import Connection
from remus_ckpt.link.listener import Listener
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.loop import StopSignal
from remus_ckpt.observe.log import log
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.service.failover import FIRST_RETRY_S, LONGEST_RETRY_S
from remus_ckpt.service.standby import Policy, Refusal, Standby, close_all
from remus_ckpt.session import frames, machine, messages
from remus_ckpt.session.machine import Session
from remus_ckpt.session.messages import MAX_EPOCH
from remus_ckpt.store import HistoryWriter, Store
from remus_ckpt.version import __version__

_HELLO_S = 5.0
_FRAME_S = 60.0
_BEAT_S = 0.1
_END_S = 1.0
_CLOSE_S = 10.0
"""For all sessions and stores to end; what then still hangs is left to hang."""
_OPEN_S = 10.0
"""For a store to open, before others are no longer kept waiting for it."""
_MOST_EVICTED = 8
"""Whose threads have not ended yet."""
_MOST_OPENED = 8
"""Names at a time, besides those whose disks hang."""
_LOCK = ".lock"
"""In the store; no name begins with a dot."""
_NAME_DESCRIPTORS = 8
"""Of one name: lock, segments, warm copies, index."""
_OWN_DESCRIPTORS = 64
_BRIEF = ("role", "term", "epoch", "position", "connected", "peer", "silent_s", "trouble")
"""What is said of a name where there are too many to say all."""
_STATUS_OF_REFUSED: dict[str, Any] = {
    "role": "unknown",
    **dict.fromkeys(("term", "epoch", "position", "memory_bytes", "peer", "silent_s"), None),
    "connected": False,
    **dict.fromkeys(("fence", "fence_retry_s", "takeover", "takeover_retry_s", "image"), None),
    "warnings": [],
    "primary": {},
}
"""Of a name whose store cannot be opened, or is not open yet: its role is "opening" then."""
_RECEIVED_EVERY = 8


class Backup:
    """Serves primaries, users who ask, and the clock, until it is stopped.

    store: where checkpoints are kept, or its directory
    listen: addresses such as "tls://0.0.0.0:7411"; `addresses` has them with the ports that were chosen for port 0
    tls_dir: a folder made by `remus-ckpt keys issue`, for tls://
    insecure: allow plain tcp:// on an address that other machines can reach
    limits: what the streams of primaries may claim
    warm_dir: where the warm copies lie, such as a folder in /dev/shm; by default in the store
    on_phase: called with ("receiving" … "applied", epoch) as a checkpoint comes along

    `run` serves in the calling thread; used in a `with`, it serves in a thread of its own.
    A fork has no part in it: what it has got of locks and listeners is closed there, and only `close` and `stop` may be
    called, which do nothing.
    A name whose store cannot be opened, or not within seconds, is refused, with the reason, until it is; the others are
    served.
    Raises StoreError or LinkError where it cannot begin.
    """

    def __init__(
        self,
        store: Store | str | Path,
        listen: Iterable[str | Address],
        *,
        tls_dir: str | Path | None = None,
        insecure: bool = False,
        policy: Policy | None = None,
        limits: Limits | None = None,
        warm_dir: str | Path | None = None,
        metrics: Metrics | None = None,
        on_phase: Callable[[str, int], None] | None = None,
        stop: StopSignal | None = None,
    ) -> None:
        self.policy = policy or Policy()
        self.metrics = metrics or Metrics()
        self.report_phase = on_phase or (lambda name, epoch: None)
        self._store = store if isinstance(store, Store) else Store(Path(store).absolute())
        self._store.create()
        self.limits = limits or Limits()
        self._warm_dir = warm_dir
        self._lock = threading.Lock()
        self._visits: list[_Visit] = []
        self._names = threading.Condition()  # guards the next five; nobody waits for a disk with it held
        self._standbys: dict[str, Standby] = {}
        self._refused: dict[str, _Refused] = {}
        self._in_work: set[str] = set()  # names that a thread is opening, or letting go of
        self._opening: dict[str, float] = {}  # names that threads of ours are opening, and since when
        self._is_letting_go = False
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._pid = os.getpid()
        self._wake_lock = threading.Lock()
        with ExitStack() as stack:
            self._stop = stop or StopSignal()
            if stop is None:
                stack.callback(self._stop.close)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            stack.callback(self._close_wake)
            self._store_lock = -1
            disown_in_forks(self)
            stack.callback(self._unlock_store)
            self._lock_store()
            stack.callback(self._close_standbys)
            self._open_all()
            tls = TlsFiles(tls_dir) if tls_dir is not None else None
            self._listeners = [
                stack.enter_context(
                    Listener(
                        Address.parse(address) if isinstance(address, str) else address, tls=tls, insecure=insecure
                    )
                )
                for address in listen
            ]
            self._closing = stack.pop_all()
        self.addresses = [str(listener.address) for listener in self._listeners]

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.run, name="backup", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stop(self) -> None:
        """End `run`, from any thread or a signal handler."""
        self._stop.set()

    def run(self, on_turn: Callable[[], None] | None = None) -> None:
        """Serve until stopped.

        on_turn: called at least every quarter of the lease, while all is well
        Nothing here waits for a disk, or for a peer for more than a moment.
        """
        self._check_process()
        poll = select.poll()
        for fd in (self._stop.fd, self._wake, *(listener.fileno() for listener in self._listeners)):
            poll.register(fd, select.POLLIN)
        period = self.policy.lease_s / 4
        beat = time.monotonic()
        while not self._stop.is_set:
            now = time.monotonic()
            if now >= beat:
                beat = now + period
                for visit in self._visiting():
                    visit.beat()
                if on_turn is not None:
                    on_turn()
            self._drop_broken()
            due = min([beat, self._try_refused(now), *(standby.turn(now) for standby in self._all_standbys())])
            ready = {fd for fd, _ in poll.poll(max(int((due - time.monotonic()) * 1000) + 1, 0))}
            if self._wake in ready:
                os.eventfd_read(self._wake)
            for listener in self._listeners:
                if listener.fileno() in ready and (connection := listener.accept()) is not None:
                    self._receive_visit(connection)

    def close(self) -> None:
        """End all sessions and let go of the store, within seconds even if a disk hangs. What is committed stays.

        May be called again. In a fork it does nothing: the backup is its parent's.
        """
        if self._is_closed or self._pid != os.getpid():
            return
        self._is_closed = True
        self._stop.set()
        deadline = time.monotonic() + _CLOSE_S
        if self._thread is not None:
            self._thread.join(_CLOSE_S)
        for visit in self._visiting():
            if time.monotonic() < deadline:
                visit.end("shutdown", "the backup is being stopped")
            else:
                visit.connection.close()
        for visit in self._visiting():
            visit.thread.join(max(deadline - time.monotonic(), 0.0))
        self._closing.close()

    def failover(self, name: str, *, fence: bool = False) -> dict[str, Any]:
        """Promote by hand, at once; returns what the survivor goes on from.

        fence: run the fencing command first
        Returns or raises within a minute. Raises NoCheckpoint if nothing is committed under that name, StoreError if
        its store cannot be opened, RemusError if the fencing fails.
        """
        self._check_process()
        with self._names:
            standby, refused = self._standbys.get(name), self._refused.get(name)
        if refused is not None:
            raise StoreError(refused.reason)
        if standby is None:
            raise NoCheckpoint(f"nothing is protected under the name {name!r} here")
        return standby.take_over(fence=fence)

    def status(self) -> dict[str, Any]:
        """What there is to say of this side, for users."""
        self._check_process()
        return {
            "program": f"remus_ckpt {__version__}",
            "lease_s": self.policy.lease_s,
            "automatic": self.policy.automatic,
            "names": dict(sorted(self._status_of_names().items())),
        }

    def _status_of_names(self) -> dict[str, dict[str, Any]]:
        with self._names:
            refused = {name: one.reason for name, one in self._refused.items()}
            opening = {name for name, one in self._refused.items() if one.is_opening}
        found = {}
        for standby in self._all_standbys():
            try:
                found[standby.name] = standby.status()
                msgpack.packb(found[standby.name])
            except Exception as error:  # what is wrong with one hides no other
                refused[standby.name] = f"its status cannot be said: {type(error).__name__}: {error}"
        return found | {
            name: _STATUS_OF_REFUSED
            | self.metrics.backup_status(name)
            | {"trouble": reason}
            | ({"role": "opening"} if name in opening else {})
            for name, reason in refused.items()
        }

    def _all_standbys(self) -> list[Standby]:
        with self._names:
            return list(self._standbys.values())

    def _turn_soon(self) -> None:
        """Something has changed that a decision hangs on."""
        with self._wake_lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    # Connections

    def _visiting(self) -> list[_Visit]:
        with self._lock:
            self._visits = [visit for visit in self._visits if visit.thread.is_alive()]
            return list(self._visits)

    def _receive_visit(self, connection: Connection) -> None:
        visits = self._visiting()
        if len(visits) >= self.policy.max_connections:
            # Those who have not said who they are make room, the oldest first; then those who only ask.
            staying = [visit for visit in visits if not visit.is_evicted]
            least = next((visit for visit in staying if not visit.is_known), None)
            least = least or next((visit for visit in staying if not visit.run_id), None)
            if least is None or len(visits) - len(staying) > _MOST_EVICTED:
                log("too many connections", level=logging.WARNING, peer=connection.peer)
                connection.close()
                return
            least.is_evicted = True
            least.connection.close()
            least.thread.join(_BEAT_S)
        visit = _Visit(self, connection)
        try:
            visit.thread.start()
        except RuntimeError as error:  # no more threads are allowed
            log("too many connections", level=logging.ERROR, peer=connection.peer, reason=str(error))
            connection.close()
            return
        with self._lock:
            self._visits.append(visit)

    def _lock_store(self) -> None:
        """Keep other backups out: a new name would else be made by two. Raises StoreError."""
        path = self._store.directory / _LOCK
        try:
            fd = self._store_lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise StoreError(f"{self._store.directory} is served by another backup: stop that one first") from None
            raise StoreError(f"{path}: {error.strerror}") from error

    def _unlock_store(self) -> None:
        fd, self._store_lock = self._store_lock, -1  # a fork in between must not close what then has this number
        if fd >= 0:
            os.close(fd)

    def _close_wake(self) -> None:
        with self._wake_lock:
            fd, self._wake = self._wake, -1
            os.close(fd)

    def disown(self) -> None:
        """In a fork: let go of the parent's store. Listeners, histories and commands do so by themselves."""
        self._unlock_store()

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise ValueError(f"this backup is run by process {self._pid}, not by its fork {os.getpid()}")

    def _close_standbys(self) -> None:
        deadline = time.monotonic() + _CLOSE_S
        with self._names:
            self._is_letting_go = True
            self._names.wait_for(lambda: not self._count_opening(), _CLOSE_S)
        close_all(self._all_standbys(), deadline)

    # Names

    def standby(self, name: str) -> Standby:
        """That under a name, made if it is new; `release` is due.

        Raises Refusal for one that is not taken here, StoreError for one whose store cannot be opened.
        """
        self._check_process()
        try:
            messages.check_name(name)
        except ValueError as error:
            raise Refusal("name", str(error)) from None
        if self.policy.names is not None and name not in self.policy.names:
            raise Refusal("name", f"{name!r} is not among the names that this backup was started for (--name)")
        with self._names:
            self._wait_until_free(name)
            if (refused := self._refused.get(name)) is not None and time.monotonic() < refused.retry_at:
                raise StoreError(refused.reason)
            if name not in self._standbys:
                count = len({*self._standbys, *self._refused, *self._in_work} - {name})
                if count >= min(self.policy.max_names, self._room_for_names()):
                    raise Refusal("limit", f"this backup keeps {count} names already")
        standby = self._open(name, is_asked_for=True)
        with self._names:
            standby.guests += 1
            if self._standbys.get(name) is standby:
                return standby
            standby.guests -= 1
        raise Refusal("busy", f"the store of {name!r} has just been let go of: try again")

    def _wait_until_free(self, name: str) -> None:
        if not self._names.wait_for(lambda: name not in self._in_work, _OPEN_S):
            raise Refusal("busy", f"the store of {name!r} is being opened, or its disk hangs: try again")

    @contextmanager
    def _working_on(self, name: str) -> Iterator[None]:
        """One thread at a time opens the store of a name, or lets go of it."""
        with self._names:
            self._wait_until_free(name)
            self._in_work.add(name)
        try:
            yield
        finally:
            with self._names:
                self._in_work.discard(name)
                self._names.notify_all()

    def _room_for_names(self) -> int:
        """How many names there are descriptors for, when all connections are in use."""
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if descriptors == resource.RLIM_INFINITY:
            return self.policy.max_names
        return max((descriptors - self.policy.max_connections - _OWN_DESCRIPTORS) // _NAME_DESCRIPTORS, 1)

    def release(self, standby: Standby) -> None:
        """A name under which nothing was ever committed must not keep its place from others."""
        name = standby.name
        with self._names:
            standby.guests -= 1
            if standby.guests or not standby.looks_empty():
                return
        with suppress(Refusal), self._working_on(name):
            with self._names:
                if standby.guests or self._standbys.get(name) is not standby:
                    return
                del self._standbys[name]
            if standby.close_if_empty():
                self.metrics.forget(name)
            else:
                with self._names:
                    self._standbys[name] = standby

    def _open_all(self) -> None:
        """Open what the store holds, side by side, and wait for those whose disks do not hang. Raises StoreError."""
        names = self._store.candidates()
        with self._names:
            self._refused = {name: _Refused.not_yet(name) for name in names}
        deadline = time.monotonic() + _OPEN_S
        while (now := time.monotonic()) < deadline:
            self._try_refused(now)
            with self._names:
                hanging = {name: one for name, one in self._refused.items() if one.is_opening}
                if not hanging:
                    return
                self._names.wait(min(deadline - now, FIRST_RETRY_S))
        for name, one in hanging.items():
            log("store refused", level=logging.ERROR, name=name, reason=one.reason)
            self.metrics.store_refused(name)

    def _open(self, name: str, *, is_asked_for: bool = False) -> Standby:
        """That under a name. What keeps one from being opened is said, and is no fault of the others; those that a
        store holds are tried again. Raises StoreError, Refusal."""
        with self._working_on(name):
            with self._names:
                if (found := self._standbys.get(name)) is not None:
                    return found
                refused = self._refused.get(name)
            if not is_asked_for and refused is not None and refused.is_opening and not self._store.may_hold(name):
                with self._names:
                    del self._refused[name]
                raise NoCheckpoint(f"there is no history in {name!r}")
            try:
                standby = self._make(name)
            except Exception as error:
                reason = str(error) if isinstance(error, RemusError) else f"{type(error).__name__}: {error}"
                reason = f"the store of {name!r} cannot be opened: {reason}"
                if refused is None or refused.reason != reason:
                    log("store refused", level=logging.ERROR, name=name, reason=reason)
                if refused is not None or not is_asked_for:
                    with self._names:
                        self._refused[name] = _Refused.after(refused, reason)
                    self.metrics.store_refused(name)
                raise StoreError(reason) from error
            with self._names:
                is_late = self._is_letting_go
                if not is_late:
                    self._standbys[name] = standby
                    self._refused.pop(name, None)
            if is_late:
                standby.close()
                raise Refusal("shutdown", "the backup is being stopped")
            if refused is not None and not refused.is_opening:
                log("store opened", name=name)
            return standby

    def _make(self, name: str) -> Standby:
        writer = self._store.writer(
            name,
            limits=self.limits,
            warm_directory=self._warm_dir,
            on_phase=self.report_phase,
            retention=self.policy.retention,
        )
        try:
            return Standby(name, writer, self.policy, self.metrics, self._turn_soon)
        except BaseException:
            writer.close()
            raise

    def _drop_broken(self) -> None:
        """Close the stores that have to be opened anew; they are refused meanwhile."""
        with self._names:
            broken = [
                standby
                for name, standby in self._standbys.items()
                if standby.broken is not None and name not in self._in_work
            ]
            for standby in broken:
                closing = threading.Thread(target=self._close_broken, args=[standby], name=f"closing {standby.name}")
                try:
                    closing.start()  # it waits for our lock
                except RuntimeError:  # there can be no more threads: it is tried again at the next turn
                    return
                self._in_work.add(standby.name)
                self._refused[standby.name] = _Refused.after(None, f"the store is opened anew: {standby.broken}")
                del self._standbys[standby.name]

    def _close_broken(self, standby: Standby) -> None:
        with self._names:  # until it has been taken away
            pass
        log("store refused", level=logging.ERROR, name=standby.name, reason=standby.broken)
        self.metrics.store_refused(standby.name)
        try:
            standby.close()
        finally:
            with self._names:
                self._in_work.discard(standby.name)
                self._names.notify_all()
            self._turn_soon()

    def _try_refused(self, now: float) -> float:
        """Open those that could not be opened, each in a thread of its own; returns when to ask again."""
        with self._names:
            if not self._refused:
                return math.inf
            waiting = {
                name: one
                for name, one in self._refused.items()
                if name not in self._in_work and name not in self._opening
            }
            due = [name for name, one in waiting.items() if now >= one.retry_at]
            for name in due[: max(_MOST_OPENED - self._count_opening(), 0)]:
                opening = threading.Thread(target=self._try_again, args=[name], name=f"opening {name}", daemon=True)
                try:
                    opening.start()  # it waits for our lock
                except RuntimeError:  # there can be no more threads
                    break
                self._opening[name] = now
        return min([now + FIRST_RETRY_S, *(one.retry_at for one in waiting.values() if one.retry_at > now)])

    def _count_opening(self) -> int:
        """With the lock held: how many stores are being opened, without those whose disks seem to hang."""
        now = time.monotonic()
        return sum(now - since < _OPEN_S for since in self._opening.values())

    def _try_again(self, name: str) -> None:
        try:
            with suppress(RemusError):
                self._open(name)
        finally:
            with self._names:
                del self._opening[name]
                self._names.notify_all()
            self._turn_soon()


@dataclass(frozen=True, slots=True)
class _Refused:
    """A name whose store is not open.

    reason: why not
    tries: how often it has failed to open; none while it is being opened for the first time
    retry_at: when it is tried again
    """

    reason: str
    tries: int = 0
    retry_at: float = 0.0

    @property
    def is_opening(self) -> bool:
        return not self.tries

    @staticmethod
    def not_yet(name: str) -> _Refused:
        return _Refused(f"the store of {name!r} is being opened; if that does not end, its disk hangs")

    @staticmethod
    def after(before: _Refused | None, reason: str) -> _Refused:
        tries = 1 if before is None else before.tries + 1
        pause_s = min(FIRST_RETRY_S * 2.0 ** min(tries - 1, 10), LONGEST_RETRY_S)
        return _Refused(reason, tries, time.monotonic() + pause_s)


class _Silent(LinkError):
    """A peer that says nothing; it is told."""


def _code_of(error: StreamError) -> str:
    """What the peer is told of a fault in its bytes (specs/session.md §7)."""
    if isinstance(error, UnknownFormat) and error.chunk == "HELLO":
        return "version"
    if isinstance(error, LimitExceeded):
        return "limit"
    return "malformed" if (error.section or "").startswith("session.md") else "stream"


def _shortened(status: dict[str, Any]) -> dict[str, Any]:
    """A status that fits into one reply, whatever primaries say of themselves and however many they are."""
    room = frames.REQUEST_BYTES // 2
    names = status["names"]
    sizes = {name: len(msgpack.packb(found["primary"])) for name, found in names.items()}
    if sum(sizes.values()) > room:
        fair = room // len(names)
        names = {name: found | ({"primary": {}} if sizes[name] > fair else {}) for name, found in names.items()}
    if len(msgpack.packb(names)) > room + room // 2:
        names = {
            name: {key: found[key] for key in _BRIEF} | {"warnings": [], "primary": {}} for name, found in names.items()
        }
    return status | {"names": names}


class _Visit:
    """One connection, from its handshake to its end, in a thread of its own."""

    def __init__(self, backup: Backup, connection: Connection) -> None:
        self.backup = backup
        self.connection = connection
        self._session: Session | None = None
        self.is_known = False
        self.is_evicted = False
        """Its place has been given to another."""
        self.run_id = b""
        self.name = ""
        self.thread = threading.Thread(target=self._serve, name=f"visit of {connection.peer}", daemon=True)
        self._sending = threading.Lock()
        self._numbers = 0
        self._heard = time.monotonic()
        self._is_listening = True
        self._ended_with: str | None = None  # by us
        self._counted = 0
        self.status: dict[str, Any] = {}
        """What the primary last said of itself."""

    @property
    def peer(self) -> str:
        """Address and name of the other side."""
        return self.connection.peer

    @property
    def heard(self) -> float:
        """When anything came last; now, while nobody listens: what a slow disk holds up is no silence of the peer."""
        return self._heard if self._is_listening else time.monotonic()

    @property
    def session(self) -> Session:
        """Raises ValueError before the handshake."""
        if self._session is None:
            raise ValueError("nothing can be said before the handshake")
        return self._session

    @property
    def _who(self) -> dict[str, Any]:
        """For the log."""
        return {"peer": self.connection.peer} | ({"name": self.name} if self.name else {})

    # Called by others

    def beat(self) -> None:
        """Show that we are here, if nothing else is being sent."""
        if not self.is_known or not self._sending.acquire(blocking=False):
            return
        try:
            self._numbers += 1
            message = messages.Heartbeat(number=self._numbers, status={})
            # The thread that accepts must not wait for a peer: one that takes not even this is not there.
            self.connection.send(self.session.send(message), _BEAT_S)
        except (LinkError, TimeoutError):
            self.connection.close()  # its own thread says why
        except ValueError:
            pass  # not yet, or no longer: before the welcome no heartbeat may be sent, nor behind an error
        finally:
            self._sending.release()

    def end(self, code: str, message: str, term: int | None = None) -> None:
        """Tell the peer that it is over, and why; its thread ends. Takes a moment at most."""
        self._ended_with = code
        self._try_say(messages.Error(code=code, message=message, term=term), _END_S)
        self.connection.close()

    # The thread

    def _serve(self) -> None:
        try:
            self.connection.handshake(_HELLO_S)
            self._session = Session("server")  # its buffer is not for those who have not shown who they are
            hello = self._await_hello()
            self.is_known = True
            if hello.role == "control":
                self._serve_control()
            else:
                self._serve_primary(hello)
        except Refusal as error:
            self._say_goodbye(messages.Error(code=error.code, message=str(error), term=error.term))
            log("refused", level=logging.WARNING, **self._who, code=error.code, reason=str(error))
        except StreamError as error:
            code = _code_of(error)
            self._say_goodbye(messages.Error(code=code, message=str(error), offset=error.offset))
            # The session keeps the error, whose frames would keep the checkpoint's memory and its file.
            error.__traceback__ = None
            log("refused", level=logging.WARNING, **self._who, code=code, reason=str(error))
        except StoreError as error:
            self._say_goodbye(messages.Error(code="store", message=str(error)))
            log("store failed", level=logging.ERROR, **self._who, reason=str(error))
        except _Silent as error:
            self._say_goodbye(messages.Error(code="timeout", message=str(error)))
            log("connection lost", level=logging.WARNING, **self._who, reason=str(error))
        except (LinkError, TimeoutError) as error:
            if self._ended_with is not None:
                log("session ended", **self._who, code=self._ended_with)
            else:
                log("connection lost", level=logging.WARNING, **self._who, reason=str(error))
        except Exception as error:
            self._try_say(messages.Error(code="internal", message=f"{type(error).__name__}: {error}"))
            log("connection failed", level=logging.ERROR, error=error, **self._who)
        finally:
            self.connection.close()
            if self._session is not None:
                self._session.close()

    def _await_hello(self) -> messages.Hello:
        deadline = time.monotonic() + _HELLO_S
        while True:
            match self.session.next_event():
                case messages.Hello() as hello:
                    frames.negotiate(hello)
                    return hello
                case None:
                    self._receive(deadline - time.monotonic(), f"no hello in {_HELLO_S:g} s")

    def _receive(self, timeout_s: float, otherwise: str) -> None:
        self._heard, self._is_listening = time.monotonic(), True
        try:
            size = self.connection.recv_into(self.session.get_buffer(), max(timeout_s, 0.0))
        except TimeoutError:
            raise _Silent(otherwise) from None
        if not size:
            raise LinkError("the other side has closed the connection")
        self._is_listening = False
        self.session.buffer_updated(size)

    def say(self, message: messages.Message, timeout_s: float | None = None) -> None:
        """Send one message, within a lease by default. Raises TimeoutError, and LinkError too where the peer has been
        told that it is over."""
        timeout_s = self.backup.policy.lease_s if timeout_s is None else timeout_s
        if not self._sending.acquire(timeout=timeout_s):
            raise TimeoutError("the peer takes nothing")
        try:
            if self.session.last_sent is not None:
                raise LinkError("the session was ended here")
            self.connection.send(self.session.send(message), timeout_s)
        finally:
            self._sending.release()

    def _try_say(self, message: messages.Message, timeout_s: float | None = None) -> None:
        with suppress(LinkError, TimeoutError, ValueError):  # if it cannot be told, it cannot be told
            self.say(message, timeout_s)

    def _say_goodbye(self, message: messages.Message) -> None:
        self._try_say(message)
        # Closed at once, what it still sends would destroy what it has not yet read of ours.
        self.connection.finish(1.0)

    def _serve_control(self) -> None:
        self.say(
            messages.Welcome(program=f"remus_ckpt {__version__}", term=0, limits={}, lease_s=self.backup.policy.lease_s)
        )
        while True:
            match self.session.next_event():
                case messages.Request() as request:
                    self.say(messages.Reply(number=request.number, result=self._answer(request)))
                case messages.Goodbye():
                    return
                case messages.Error() as error:
                    raise LinkError(error.message)
                case None:
                    self._receive(_FRAME_S, f"nothing was asked in {_FRAME_S:g} s")

    def _answer(self, request: messages.Request) -> dict[str, Any]:
        try:
            match request.method:
                case "status":
                    return _shortened(self.backup.status())
                case "failover":
                    return self.backup.failover(
                        str(request.arguments.get("name")), fence=bool(request.arguments.get("fence"))
                    )
        except RemusError as error:
            return {"error": str(error)}
        return {"error": f"there is no method {request.method!r} here"}

    def _serve_primary(self, hello: messages.Hello) -> None:
        if hello.page_size != PAGE_SIZE:
            raise Refusal("limit", f"pages of {hello.page_size} bytes; here they have {PAGE_SIZE}")
        most = self.backup.limits.memory_bytes
        if hello.memory_pages * PAGE_SIZE > most:
            text = f"a memory of {hello.memory_pages * PAGE_SIZE:,} bytes; this backup takes {most:,} (--max-memory)"
            raise Refusal("limit", text)
        self.run_id = hello.run
        self.name = hello.name
        standby = self.backup.standby(hello.name)
        try:
            self._host(standby, hello)
        finally:
            self.backup.release(standby)

    def _host(self, standby: Standby, hello: messages.Hello) -> None:
        with standby.hosting(self, hello) as writer:
            self.say(standby.welcome(hello, self.backup.limits))
            last_frame = time.monotonic()
            while True:
                event = self.session.next_event()
                if event is not None:
                    last_frame = time.monotonic()
                match event:
                    case messages.Begin():
                        writer.begin(full=event.mode == "full")
                        self.session.lender = writer
                        log(
                            "receiving",
                            name=hello.name,
                            peer=self.peer,
                            mode=event.mode,
                            position=event.position and str(event.position),
                        )
                    case machine.DataReceived(size, data):
                        if data is None:
                            writer.buffer_updated(size)
                        else:
                            writer.feed(data)
                        self.backup.report_phase("receiving", 0)
                    case messages.Commit():
                        self._commit(standby, writer, event)
                    case messages.Heartbeat():
                        self.status = event.status
                    case messages.Goodbye():
                        standby.said_goodbye(event.reason)
                        return
                    case messages.Error():
                        raise LinkError(f"it ended the session: {event.message}")
                    case None:
                        if time.monotonic() - last_frame > _FRAME_S:
                            raise _Silent(f"no whole frame in {_FRAME_S:g} s")
                        silence_s = 2 * self.backup.policy.lease_s
                        self._receive(silence_s, f"silent for {silence_s:g} s")

    def _commit(self, standby: Standby, writer: HistoryWriter, commit: messages.Commit) -> None:
        begin = time.monotonic()
        if commit.position.epoch > MAX_EPOCH:
            raise Refusal("limit", f"epoch {commit.position.epoch}; there are {MAX_EPOCH}")
        staged = writer.check(commit.position)
        record = staged.record
        if record is None or record.before != commit.before or staged.page_count != commit.pages:
            raise Malformed(
                f"{commit.pages} pages behind {commit.before} are committed of a checkpoint of {staged.page_count} "
                f"behind {record and record.before}",
                offset=self.session.received_bytes,
                section="session.md §3.5",
                chunk="COMMIT",
            )
        wait = self.session.begin.wait if self.session.begin is not None else "durable"
        # An acknowledgement wakes the primary, which takes time here while it is wanted for the disk: where `durable`
        # says the same a little later, `received` is said now and then, for those who measure the link by it.
        if wait == "received" or commit.position.epoch % _RECEIVED_EVERY == 0:
            self.say(messages.Ack(level="received", position=commit.position))
        writer.store()
        self.say(messages.Ack(level="durable", position=commit.position))
        self.backup.report_phase("acknowledged", commit.position.epoch)
        standby.stored(commit.position, time.monotonic() - begin)
        before, self._counted = self._counted, self.connection.bytes_received
        self.backup.metrics.add_bytes(
            standby.name,
            raw=commit.pages * PAGE_SIZE,
            encoded=commit.stream_bytes,
            wire=self._counted - before,
        )
        writer.apply()
        if wait == "applied":
            self.say(messages.Ack(level="applied", position=commit.position))
