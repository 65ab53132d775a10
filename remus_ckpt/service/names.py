"""The names that a backup keeps: which of their stores are open, which are being opened, and which cannot be opened.

A store that cannot be opened, or whose disk hangs, must not affect the others: each is opened in a thread of its own.
"""

from __future__ import annotations

import logging
import math
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import msgpack

from remus_ckpt.disk import is_full
from remus_ckpt.errors import NoCheckpoint, RemusError, StoreError
from remus_ckpt.observe.log import log
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.service.attempts import Attempts
from remus_ckpt.service.backoff import LONGEST_S
from remus_ckpt.service.failover import FIRST_RETRY_S, LONGEST_RETRY_S
from remus_ckpt.service.policy import Policy
from remus_ckpt.service.standby import Refusal, Standby, close_all
from remus_ckpt.session import messages
from remus_ckpt.store import Store

_OPEN_S = 10.0
"""How long the others wait for a store to open."""
_MOST_OPENED = 8
"""Names opened at a time, not counting those whose disks hang."""
_NAME_DESCRIPTORS = 8
"""File descriptors for one name: lock, segments, warm copies, index."""
_OWN_DESCRIPTORS = 64
_STATUS_OF_REFUSED: dict[str, Any] = {
    "role": "unknown",
    **dict.fromkeys(
        ("term", "epoch", "position", "memory_bytes", "peer", "silent_s", "first_copy", "arriving_s"), None
    ),
    **dict.fromkeys(("last_end", "lease_left_s", "refused", "room", "trouble", "trouble_since", "store_fault"), None),
    "warm_on_disk": None,
    "connected": False,
    **dict.fromkeys(("fence", "fence_retry_s", "takeover", "takeover_retry_s", "image"), None),
    "warnings": [],
    "primary": {},
}
"""The status of a name whose store cannot be opened, or is not open yet (then its role is "opening")."""


class Names:
    """The standbys of a backup, by name.

    make: opens the store of a name; may take as long as the disk does. Raises StoreError
    wake: called when a decision may have changed

    One thread calls `turn`, the threads of sessions call `lend`; any thread may call the rest.
    """

    def __init__(
        self, store: Store, policy: Policy, metrics: Metrics, make: Callable[[str], Standby], wake: Callable[[], None]
    ) -> None:
        self._store = store
        self._policy = policy
        self._metrics = metrics
        self._make = make
        self._wake = wake
        self._changed = threading.Condition()  # guards all that follows; no thread waits for a disk while holding it
        self.open_ones: dict[str, Standby] = {}
        self._refused: dict[str, _Refused] = {}
        self._attempts: dict[str, Attempts] = {}
        self._look_at = 0.0  # when to look for names that nobody uses any longer
        self._in_work: set[str] = set()  # names that a thread is opening or closing
        self._opening: dict[str, float] = {}  # names that our own threads are opening, and since when
        self._is_closed = False

    @property
    def standbys(self) -> list[Standby]:
        """The standbys whose stores are open."""
        with self._changed:
            return list(self.open_ones.values())

    def find(self, name: str) -> Standby:
        """The standby of a name. Raises NoCheckpoint if there is none, StoreError if its store is not open."""
        with self._changed:
            standby, refused = self.open_ones.get(name), self._refused.get(name)
        if refused is not None:
            raise StoreError(refused.reason)
        if standby is None:
            raise NoCheckpoint(f"nothing is protected under the name {name!r} here")
        return standby

    def newest_durable(self, name: str) -> int | None:
        """The epoch of a name's newest durable checkpoint, −1 if it has none; None if its store is not open."""
        with self._changed:
            standby = self.open_ones.get(name)
        if standby is None:
            return None
        epoch = standby.epoch
        return -1 if epoch is None else epoch

    def status(self) -> dict[str, dict[str, Any]]:
        """The status of each name, see `Standby.status`. A name whose store is not open has the role "opening", or
        "unknown" if it cannot be opened."""
        with self._changed:
            refused = {name: one.reason for name, one in self._refused.items()}
            opening = {name for name, one in self._refused.items() if one.is_opening}
            attempts = dict(self._attempts)
        now = time.monotonic()
        found: dict[str, dict[str, Any]] = {}
        for standby in self.standbys:
            try:
                found[standby.name] = standby.status()
                msgpack.packb(found[standby.name])
            except Exception as error:  # one that fails must not hide the others
                refused[standby.name] = f"its status cannot be said: {type(error).__name__}: {error}"
        tried = {name: one.status(now) for name, one in attempts.items() if one.waits_for_store(now)}
        for name, status in tried.items():  # of a new name, whose store could not even be made
            if name not in found and status["refused"] is not None:
                refused.setdefault(name, status["refused"]["reason"])
        return found | {
            name: _STATUS_OF_REFUSED
            | self._metrics.backup_status(name)
            | tried.get(name, {})
            | {"trouble": reason}
            | ({"role": "opening"} if name in opening else {})
            for name, reason in refused.items()
        }

    def turn(self, now: float) -> float:
        """Open and close what is due; returns when to ask again. Never waits."""
        self._drop_broken()
        if now >= self._look_at:
            self._look_at = now + LONGEST_S
            self._drop_unused(now)
        return self._try_refused(now)

    def close(self, deadline: float) -> None:
        """Close all of them by this time, or a second later; one that still hangs then is abandoned."""
        with self._changed:
            self._is_closed = True
            self._changed.wait_for(lambda: not self._count_opening(), max(deadline - time.monotonic(), 0.0))
        close_all(self.standbys, deadline)

    # Primaries

    @contextmanager
    def lend(self, name: str) -> Iterator[Standby]:
        """The standby of a name, created if it is new, for a primary that stays for the length of the block.

        Raises Refusal for a name that is not accepted here, StoreError if its store cannot be opened.
        """
        standby = self._take(name)
        try:
            yield standby
        finally:
            self._release(standby)

    def _take(self, name: str) -> Standby:
        try:
            messages.check_name(name)
        except ValueError as error:
            raise Refusal("name", str(error)) from None
        if self._policy.names is not None and name not in self._policy.names:
            raise Refusal("name", f"{name!r} is not among the names that this backup was started for (--name)")
        with self._changed:
            self._wait_until_free(name)
            if (refused := self._refused.get(name)) is not None and time.monotonic() < refused.retry_at:
                raise StoreError(refused.reason)
            if name not in self.open_ones:
                count = len({*self.open_ones, *self._refused, *self._in_work} - {name})
                if count >= min(self._policy.max_names, self._room_for_names()):
                    raise Refusal("limit", f"this backup keeps {count} names already")
        standby = self._open(name, is_asked_for=True)
        with self._changed:
            standby.guests += 1
            if self.open_ones.get(name) is standby:
                return standby
            standby.guests -= 1
        raise Refusal("busy", f"the store of {name!r} has just been let go of: try again")

    def _room_for_names(self) -> int:
        """How many names the file descriptors suffice for when all connections are in use."""
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if descriptors == resource.RLIM_INFINITY:
            return self._policy.max_names
        return max((descriptors - self._policy.max_connections - _OWN_DESCRIPTORS) // _NAME_DESCRIPTORS, 1)

    def _release(self, standby: Standby) -> None:
        with self._changed:
            standby.guests -= 1
        self._drop_if_empty(standby)

    def let_go(self, name: str) -> bool:
        """Close the store of a name that another backup has, unless a primary uses it, or the commit log has its last
        commit here; returns whether it is closed.

        Its files stay, and it is opened again for a primary that comes back. Raises RemusError if it does not close, or
        if the log does not answer.
        """
        with self._changed:
            standby = self.open_ones.get(name)
        if standby is None or standby.could_claim():
            return False
        with self._changed:
            if self.open_ones.get(name) is not standby or standby.guests or name in self._in_work or self._is_closed:
                return False
            self._in_work.add(name)
            del self.open_ones[name]
        try:
            standby.close()
            self._metrics.forget(name)
        finally:
            with self._changed:
                self._in_work.discard(name)
                self._changed.notify_all()
        return True

    def _drop_if_empty(self, standby: Standby) -> None:
        """Free the place of a name under which nothing was ever committed, so that others can have it."""
        name = standby.name
        with self._changed:
            if standby.guests or not standby.looks_empty():
                return
        with suppress(Refusal), self._working_on(name):
            with self._changed:
                if standby.guests or self.open_ones.get(name) is not standby:
                    return
                del self.open_ones[name]
            if standby.close_if_empty():
                self._metrics.forget(name)
            else:
                with self._changed:
                    self.open_ones[name] = standby

    def note_refused(self, name: str, peer: str, error: Refusal | StoreError) -> bool:
        """A primary was refused; returns whether that is news."""
        code = error.code if isinstance(error, Refusal) else "store"
        with self._changed:
            if code != "store" and name not in self.open_ones:
                return True  # it is not a name of ours
            attempts = self._attempts_of(name)
        return attempts.refused(
            code, str(error), peer, now=time.monotonic(), unix_time=time.time(), is_full=is_full(error)
        )

    def _attempts_of(self, name: str) -> Attempts:
        """The refused tries under a name. Needs the lock."""
        if (found := self._attempts.get(name)) is not None:
            return found
        attempts = Attempts(self._policy.lease_s)
        if len(self._attempts) < 2 * self._policy.max_names:
            self._attempts[name] = attempts
        return attempts

    def _drop_unused(self, now: float) -> None:
        """Close, each in a thread of its own, the empty stores of primaries that have ceased to try."""
        with self._changed:
            self._attempts = {
                name: one for name, one in self._attempts.items() if name in self.open_ones or one.waits_for_store(now)
            }
            unused = [one for one in self.open_ones.values() if not one.guests and one.looks_empty()]
        for standby in unused:
            with suppress(RuntimeError):  # no more threads are allowed: try again later
                threading.Thread(
                    target=self._drop_if_empty, args=[standby], name=f"closing {standby.name}", daemon=True
                ).start()

    # Opening

    def open_all(self) -> None:
        """Open all names in the store in parallel; wait as long as they keep opening. Raises StoreError."""
        names = self._store.candidates()
        with self._changed:
            self._refused = {name: _Refused.not_yet(name) for name in names}
        unopened = dict(self._refused)
        deadline = time.monotonic() + _OPEN_S
        while unopened and (now := time.monotonic()) < deadline:
            self._try_refused(now)
            with self._changed:
                before = len(unopened)
                unopened = {name: one for name, one in self._refused.items() if one.is_opening}
                if len(unopened) < before:
                    deadline = time.monotonic() + _OPEN_S
                else:
                    self._changed.wait(min(deadline - now, FIRST_RETRY_S))
        for name, one in unopened.items():
            log("store refused", level=logging.ERROR, name=name, reason=one.reason)
            self._metrics.store_refused(name)

    def _open(self, name: str, *, is_asked_for: bool = False) -> Standby:
        """Open the standby of a name. A failure is reported and does not affect other names; a name that is already in
        the store is tried again later. Raises StoreError, Refusal."""
        with self._working_on(name):
            with self._changed:
                if (found := self.open_ones.get(name)) is not None:
                    return found
                refused = self._refused.get(name)
            if not is_asked_for and refused is not None and refused.is_opening and not self._store.may_hold(name):
                with self._changed:
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
                    with self._changed:
                        self._refused[name] = _Refused.after(refused, reason)
                    self._metrics.store_refused(name)
                raise StoreError(reason) from error
            with self._changed:
                is_late = self._is_closed
                standby.attempts = self._attempts_of(name)
                if not is_late:
                    self.open_ones[name] = standby
                    self._refused.pop(name, None)
            if is_late:
                standby.close()
                raise Refusal("shutdown", "the backup is being stopped")
            if refused is not None and not refused.is_opening:
                log("store opened", name=name)
            return standby

    def _wait_until_free(self, name: str) -> None:
        if not self._changed.wait_for(lambda: name not in self._in_work, _OPEN_S):
            raise Refusal("busy", f"the store of {name!r} is being opened, or its disk hangs: try again")

    @contextmanager
    def _working_on(self, name: str) -> Iterator[None]:
        """Ensure that only one thread at a time opens or closes the store of a name."""
        with self._changed:
            self._wait_until_free(name)
            self._in_work.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._in_work.discard(name)
                self._changed.notify_all()

    def _drop_broken(self) -> None:
        """Close the stores that have to be reopened; their names are refused meanwhile."""
        with self._changed:
            broken = [
                standby
                for name, standby in self.open_ones.items()
                if standby.broken is not None and name not in self._in_work
            ]
            for standby in broken:
                closing = threading.Thread(target=self._close_broken, args=[standby], name=f"closing {standby.name}")
                try:
                    closing.start()  # it waits for our lock
                except RuntimeError:  # no more threads are allowed: try again at the next turn
                    return
                self._in_work.add(standby.name)
                self._refused[standby.name] = _Refused.after(None, f"the store is opened anew: {standby.broken}")
                del self.open_ones[standby.name]

    def _close_broken(self, standby: Standby) -> None:
        with self._changed:  # held until the store has been taken out
            pass
        log("store refused", level=logging.ERROR, name=standby.name, reason=standby.broken)
        self._metrics.store_refused(standby.name)
        try:
            standby.close()
        finally:
            with self._changed:
                self._in_work.discard(standby.name)
                self._changed.notify_all()
            self._wake()

    def _try_refused(self, now: float) -> float:
        """Retry the stores that could not be opened, each in a thread of its own; returns when to ask again."""
        with self._changed:
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
                except RuntimeError:  # no more threads are allowed
                    break
                self._opening[name] = now
        return min([now + FIRST_RETRY_S, *(one.retry_at for one in waiting.values() if one.retry_at > now)])

    def _count_opening(self) -> int:
        """How many stores are being opened, not counting those whose disks seem to hang. Needs the lock."""
        now = time.monotonic()
        return sum(now - since < _OPEN_S for since in self._opening.values())

    def _try_again(self, name: str) -> None:
        try:
            with suppress(RemusError):
                self._open(name)
        finally:
            with self._changed:
                del self._opening[name]
                self._changed.notify_all()
            self._wake()


@dataclass(frozen=True, slots=True)
class _Refused:
    """A name whose store is not open.

    reason: why it is not open
    tries: how often it has failed to open; 0 while it is being opened for the first time
    retry_at: when the next try is due
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
