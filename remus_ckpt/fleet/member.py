"""A backup's part in a fleet: it announces itself, releases names that others have, and asks before it takes over.

Source of the rules: specs/fleet.md §6.4.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from remus_ckpt.disk import free_bytes, guarding, replace_file
from remus_ckpt.errors import LogError, Malformed, Overtaken, RemusError
from remus_ckpt.fleet.group import Fleet
from remus_ckpt.fleet.placing import RENEW_S, Backup, Held, Place, has
from remus_ckpt.link.address import Address
from remus_ckpt.observe.log import News, log
from remus_ckpt.version import __version__

_ID = ".member"
"""The file in a store that says which member of a fleet it is; no name begins with a dot."""
_WORDS_CHARS = 200
_MOST_WITH_WORDS = 1_000
"""The maximum number of names reported in full: a record on the brokers has at most 1 MiB."""
CLAIM_S = 20.0
PAUSE_S = 0.5
_ANYWHERE = frozenset({"0.0.0.0", "::", "*"})


def id_of(store: Path) -> str:
    """Which member a store is: eight characters, made once. Raises StoreError."""
    path = store / _ID
    with guarding(path):
        if not path.exists():
            replace_file(path, f"{secrets.token_hex(4)}\n".encode())
        text = path.read_text().strip()
    if len(text) != 8 or not text.isalnum():
        raise LogError(f"{path} does not hold the id of a fleet member")
    return text


def addresses_for(listening: Iterable[str]) -> list[str]:
    """Where others reach a backup that listens at these addresses; this host's name stands for all its addresses."""
    found = []
    for text in listening:
        address = Address.parse(text)
        if address.host in _ANYWHERE:
            address = Address(address.scheme, host=socket.getfqdn(), port=address.port)
        found.append(str(address))
    return found


class Member:
    """A backup in a fleet.

    fleet: closed with this object
    store: the directory of the backup's store
    max_names: how many names it takes
    status: the backup's, for each name (`Names.status`), with the health of each
    let_go: closes the store of a name that another backup has; its files remain
    take_over: promotes the store of a name; takes as long as that does. Raises RemusError

    It has its own thread, from `start` to `close`; any thread may call the other methods.
    """

    def __init__(
        self,
        fleet: Fleet,
        store: Path,
        max_names: int,
        *,
        status: Callable[[], dict[str, dict[str, Any]]],
        let_go: Callable[[str], bool],
        take_over: Callable[[str], object],
    ) -> None:
        self.id = id_of(store)
        self._fleet = fleet
        self._store = store
        self.addresses: tuple[str, ...] = ()
        """Where primaries reach this backup; none before `start`."""
        self._max_names = max_names
        self._status = status
        self._let_go = let_go
        self._take_over = take_over
        self._working: dict[str, threading.Thread] = {}
        self._news = News()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)

    def start(self, addresses: Iterable[str]) -> None:
        """Announce from now on that this backup is alive. addresses: where primaries reach it"""
        self.addresses = tuple(addresses)
        self._thread.start()

    def close(self) -> None:
        """Stop announcing. The lease ends by itself: a backup that is soon back keeps its names."""
        self._end.set()
        self._fleet.close()

    def check(self, name: str, term: int) -> None:
        """Before the primary of a name is fenced: may it be taken over here? term: of the store. Raises RemusError."""
        self._check(self._place(name)[0], term)

    def claim(self, name: str, term: int, *, is_certain: bool = False) -> None:
        """Before a name is promoted under this term: record that in the fleet, so that its primary cannot go elsewhere.

        is_certain: the commit log says that this backup has taken over, whichever backup has the name in the fleet
        May be called again. Raises RemusError if another backup has the name, or if the brokers do not answer: then
        nothing may be promoted, unless is_certain.
        """
        place, revision = self._place(name)
        if not is_certain:
            self._check(place, term - 1)
        taken = Place(name, self.id, next(iter(self.addresses), ""), term, is_taken_over=True)
        deadline = time.monotonic() + CLAIM_S
        while place != taken and not (is_certain and place is not None and place.term > term):
            try:
                self._fleet.put(taken, revision)
                break
            except Overtaken as error:
                if not is_certain:
                    raise RemusError(f"not promoted: {error}") from None
                place, revision = self._place(name)
                continue
            except LogError as error:
                # It may have been written, or be on its way: while that is not known, no primary is to be let in.
                if time.monotonic() > deadline:
                    raise RemusError(f"not promoted: {error}") from None
            time.sleep(PAUSE_S)
        log("taken over in the fleet", level=logging.WARNING, name=name, term=term)

    def _place(self, name: str) -> tuple[Place | None, int]:
        try:
            return self._fleet.place(name)
        except (LogError, Malformed) as error:
            raise RemusError(f"it is not known whether {name!r} is protected elsewhere: {error}") from None

    def _check(self, place: Place | None, term: int) -> None:
        if place is not None and not has(place, self.id, term):
            raise RemusError(
                f"{place.name!r} no longer belongs to this backup: backup {place.backup} at {place.address} has it"
            )

    def _run(self) -> None:
        while True:
            try:
                self._turn()
                self._news.clear()
            except (RemusError, OSError) as error:
                if self._news.is_new(str(error)):
                    log("no fleet; trying again", level=logging.WARNING, reason=str(error))
            except Exception as error:  # whatever it is, the backup goes on, and so does its lease
                log("no fleet; trying again", level=logging.ERROR, error=error)
            if self._end.wait(RENEW_S):
                return

    def _turn(self) -> None:
        names = self._status()
        words = _WORDS_CHARS if len(names) <= _MOST_WITH_WORDS else 0
        held = {name: _held(found, words) for name, found in names.items()}
        self._fleet.announce(
            Backup(
                id=self.id,
                host=socket.gethostname(),
                addresses=self.addresses,
                program=f"remus_ckpt {__version__}",
                max_names=self._max_names,
                free_bytes=free_bytes(self._store),
                is_leaving=self._fleet.is_leaving(self.id),
                names=held,
            )
        )
        places = self._fleet.places() if any(self._may_go(found) for found in names.values()) else {}
        gone = []
        for name, found in names.items():
            place = places.get(name)
            if place is None or not self._may_go(found):
                continue
            if not has(place, self.id, found["term"]):
                gone.append(place)
            elif place.backup == self.id and place.is_taken_over and found["term"] < place.term:
                self._complete(name)
        if gone:
            self._begin("letting go", self._let_all_go, gone)

    @staticmethod
    def _may_go(found: dict[str, Any]) -> bool:
        # The survivor of a takeover may run in what was handed out here.
        return found["role"] == "standby" and not found["connected"]

    def _complete(self, name: str) -> None:
        """The fleet has a takeover by this backup that its store does not have: it was interrupted in between.

        That record fences primaries. So the takeover has happened, and only has to be completed.
        """

        def complete() -> None:
            log("takeover completed", level=logging.WARNING, name=name)
            try:
                self._take_over(name)
            except RemusError as error:
                log("takeover failed", level=logging.ERROR, name=name, reason=str(error))

        self._begin(f"takeover of {name}", complete)

    def _let_all_go(self, places: list[Place]) -> None:
        for place in places:
            with suppress(RemusError):
                if self._let_go(place.name):
                    log("let go", name=place.name, backup=place.backup, address=place.address)

    def _begin(self, what: str, work: Callable[..., None], *arguments: Any) -> None:
        """Do something that a disk may hold up, without holding up the lease; never twice at a time."""
        if (before := self._working.get(what)) is None or not before.is_alive():
            self._working[what] = threading.Thread(target=work, args=arguments, name=what, daemon=True)
            with suppress(RuntimeError):  # no more threads are allowed: the next turn tries again
                self._working[what].start()


def _held(found: dict[str, Any], words_chars: int) -> Held:
    """What is said of a name, from its status."""
    committed = found.get("last_commit_at")
    return Held(
        role=found["role"],
        term=found["term"] or 0,
        epoch=-1 if found["epoch"] is None else found["epoch"],
        state=found["health"]["state"],
        words=found["health"]["words"][:words_chars],
        is_used=found["connected"],
        committed_at=float(committed) if isinstance(committed, int | float) else 0.0,
    )
