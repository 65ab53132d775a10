"""A primary's side of a fleet: it finds a backup for its name, and counts on one only once the fleet knows.

Source of the rules: specs/fleet.md §6.3 and §6.4.
"""

from __future__ import annotations

import random
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from remus_ckpt.errors import Fenced, LinkError, LogError, Malformed, Overtaken, RemusError
from remus_ckpt.fleet.group import Fleet
from remus_ckpt.fleet.placing import LEASE_S, RENEW_S, Backup, Go, Nowhere, Place, Protected, TakenOver, aim, may_leave
from remus_ckpt.link.connection import Connection
from remus_ckpt.observe.log import log

SHUN_S = 30.0
"""How long a backup that has refused a name is not asked again, as long as others are there."""
_JOIN_S = 1.0
_LOOKS_ELSEWHERE = frozenset({"limit", "store", "name", "forbidden", "version", "log"})
"""Refusals of one backup that say nothing of another."""


class Placed:
    """Where one name is protected, for its primary.

    fleet: closed with this object
    dial: connects to a backup, given its address and the seconds for it. Raises LinkError

    The thread of the primary calls `connect`, `failed` and `leave`; any thread may call the rest.
    """

    def __init__(self, fleet: Fleet, name: str, dial: Callable[[str, float], Connection]) -> None:
        self.name = name
        self._fleet = fleet
        self._dial = dial
        self.run = secrets.token_hex(16)
        """Which primary this is: 16 bytes, in hex."""
        self._chance = random.Random()
        self._shunned: dict[str, float] = {}  # ids, and until when
        self._failing: dict[str, float] = {}  # ids that do not answer, and since when
        self._lock = threading.Lock()  # guards the next three, which belong together
        self._place: Place | None = None  # as last read or written
        self._revision = 0
        self._target = ""  # id of the backup that we are linked to, or try
        self._address = ""
        # Each is set in one step.
        self._wants_to_leave = False
        self._why = ""
        self._facts: Callable[[], dict[str, Any]] | None = None
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_certain(self) -> bool:
        """Whether the fleet knows that the backup we are linked to has the name."""
        with self._lock:
            return self._is_certain()

    def _is_certain(self) -> bool:
        place = self._place
        return place is not None and place.backup == self._target and not place.is_taken_over

    @property
    def target(self) -> str:
        """The id of the backup that `connect` has chosen."""
        with self._lock:
            return self._target

    @property
    def address(self) -> str:
        """Where the backup is that we are linked to, or were last. Raises LinkError if there was none yet."""
        if not (address := self._address):
            raise LinkError(f"no backup of the fleet has {self.name!r} yet")
        return address

    @property
    def is_at_holder(self) -> bool:
        """Whether the backup that `connect` has chosen is the one that has the name."""
        with self._lock:
            return self._place is not None and self._place.backup == self._target

    @property
    def wants_to_leave(self) -> bool:
        """Whether the backup that has the name is to be left for another."""
        return self._wants_to_leave and self.is_certain

    @property
    def term(self) -> int | None:
        """The term in force, as the fleet knows it; None if it knows none, or if a takeover has set it."""
        with self._lock:
            return None if self._place is None or self._place.is_taken_over else self._place.term

    def announce(self, facts: Callable[[], dict[str, Any]]) -> None:
        """Begin to say that this primary is alive. facts: term, epoch, lag, committed_at and is_linked, at any time"""
        self._facts = facts
        self._thread = threading.Thread(target=self._renew, name=f"lease of {self.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the lease. May be called again."""
        if self._end.is_set():
            return
        self._end.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)  # it would renew the lease
        with suppress(RemusError):
            if self._facts is not None:
                self._fleet.withdraw(self._protected(self._facts()))
        self._fleet.close()

    def connect(self, timeout_s: float, term: int | None) -> Connection:
        """Connect to the backup that has the name, or to one that takes it; its handshake is done.

        term: the primary's
        Raises LinkError if there is none, or it does not answer; Fenced if a backup has taken the name over.
        """
        deadline = time.monotonic() + timeout_s
        id, addresses = self._choose(term)
        with self._lock:
            self._target = id
        error: LinkError | None = None
        for number, address in enumerate(addresses):
            left_s = max(deadline - time.monotonic(), 0.0) / (len(addresses) - number)
            try:
                connection = self._dial(address, left_s)
            except LinkError as fault:
                error = fault
                continue
            self._failing.pop(id, None)
            with self._lock:
                self._address = address
            self._why = ""
            return connection
        now = time.monotonic()
        # The one that has the name may soon be back, and then needs no new copy.
        if not self.is_at_holder or now - self._failing.setdefault(id, now) > LEASE_S:
            self._shun(id)
        self._why = str(error)
        raise error or LinkError(f"backup {id} of the fleet has no address")

    def _choose(self, term: int | None) -> tuple[str, tuple[str, ...]]:
        """The backup to connect to, and where it is reached. Raises LinkError, Fenced."""
        now = time.monotonic()
        self._shunned = {id: until for id, until in self._shunned.items() if until > now}
        try:
            place, revision = self._fleet.place(self.name)
            backups = self._candidates(place)
        except (LogError, Malformed) as error:
            self._why = str(error)
            if (known := self._place) is None or known.is_taken_over:
                raise LinkError(str(error)) from None
            return known.backup, (known.address,)  # what has the name protects it while no broker answers
        with self._lock:
            self._place, self._revision = place, revision
        match aim(place, backups, term=term, shunned=self._shunned, chance=self._chance):
            case TakenOver(taken):
                raise _fenced(self.name, taken)
            case Nowhere(why):
                self._why = why
                raise LinkError(why)
            case Go(id):
                return id, self._reached_at(id, backups, place)

    def _candidates(self, place: Place | None) -> dict[str, Backup]:
        """The backups to choose from. While the one that has the name is alive, it alone: many primaries may ask often
        for as long as its link is lost."""
        if place is not None and not place.is_taken_over and place.backup not in self._shunned:
            holder = self._fleet.backup(place.backup)
            if holder is not None and not holder.is_leaving:
                return {holder.id: holder}
        return self._fleet.backups()

    @staticmethod
    def _reached_at(id: str, backups: dict[str, Backup], place: Place | None) -> tuple[str, ...]:
        if id in backups:
            return backups[id].addresses
        return () if place is None else (place.address,)

    def _shun(self, id: str) -> None:
        self._shunned[id] = time.monotonic() + SHUN_S

    def failed(self, code: str | None) -> bool:
        """The backup has refused us with this code; returns whether another may not."""
        if code not in _LOOKS_ELSEWHERE:
            return False
        with self._lock:
            target = self._target
        self._shun(target)
        return True

    def confirm(self, term: int) -> None:
        """The backup that we are linked to holds all that it takes: have the fleet know, before that counts.

        term: of the session
        Raises Fenced if the backup that had the name has taken over, LinkError if another primary has been first, or
        the brokers do not answer.
        """
        with self._lock:
            if self._is_certain():
                return
            before, revision = self._place, self._revision
            place = Place(self.name, self._target, self._address, term, run=self.run)
        try:
            try:
                revision = self._fleet.put(place, revision)
            except Overtaken:
                found, revision = self._fleet.place(self.name)
                with self._lock:
                    self._place, self._revision = found, revision
                if found is not None and found.is_taken_over and found.term >= term and found != before:
                    raise _fenced(self.name, found.term) from None
                raise LinkError(f"another primary has moved {self.name!r} to another backup") from None
        except (LogError, Malformed) as error:
            raise LinkError(f"it is not known whether {self.name!r} is protected here: {error}") from None
        with self._lock:
            self._place, self._revision = place, revision
        self._wants_to_leave = False
        log("placed", name=self.name, backup=place.backup, address=place.address, term=term)

    # The lease

    def _renew(self) -> None:
        assert self._facts is not None
        while True:
            with suppress(RemusError):  # it is told when somebody needs an answer
                self._fleet.announce(self._protected(self._facts()))
                if self.is_certain:
                    with self._lock:
                        target = self._target
                    self._wants_to_leave = self._fleet.is_leaving(target) and may_leave(
                        target, self._fleet.backups(), self._chance
                    )
            # Not all at once: they may have been started together.
            if self._end.wait(RENEW_S * self._chance.uniform(0.8, 1.0)):
                return

    def _protected(self, facts: dict[str, Any]) -> Protected:
        is_linked = facts.pop("is_linked")
        with self._lock:
            target = self._target
        protected = Protected(
            name=self.name,
            host=socket.gethostname(),
            backup=target if is_linked else "",
            why=self._why if not is_linked else "",
            **facts,
        )
        return replace(protected, why=protected.why[:500])


def _fenced(name: str, term: int) -> Fenced:
    return Fenced(
        f"{name!r} has been taken over under term {term}: stop, and release nothing that was held back. To protect the "
        f"side that took over, give it --term {term}",
        term=term,
    )
