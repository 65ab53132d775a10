"""What a backup answers to readers: names, what their histories hold, and bytes of segments (specs/session.md §3.13).

A reader sees what is durable and nothing else. It takes no lock that a primary or a takeover waits for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from remus_ckpt.disk import guarding, open_to_read
from remus_ckpt.errors import NoCheckpoint, RemusError, StoreError
from remus_ckpt.limits import Limits
from remus_ckpt.observe.log import log
from remus_ckpt.service.durable import Refusal
from remus_ckpt.service.policy import Policy
from remus_ckpt.session.messages import READ_BYTES
from remus_ckpt.store import History, Store, Survey
from remus_ckpt.store.listing import Listing
from remus_ckpt.store.rows import REASON_CHARS, row_of_contents, row_of_entry, row_of_lost
from remus_ckpt.store.segments import Contents, is_segment

_NAMES = 1_000
_SEGMENTS = 250
_ENTRIES = 1_000
"""Rows in one reply; each reply then has less than 1 MiB."""
_MOST = (1 << 63) - 1


class Readers:
    """The readers of a backup.

    limits: what streams may claim
    durable: the epoch of the newest durable checkpoint of a name, −1 if it has none; None if its store is not open
    """

    def __init__(self, store: Store, policy: Policy, limits: Limits, durable: Callable[[str], int | None]) -> None:
        self._store = store
        self._policy = policy
        self._limits = limits
        self._durable = durable
        self._places = threading.BoundedSemaphore(policy.max_readers)

    @contextmanager
    def lend(self, peer: str, demand: Callable[[str], None] = lambda name: None) -> Iterator[Reader]:
        """What answers one reader, for the length of the block. Raises Refusal if there are too many.

        demand: raises Refusal for a name that this reader may not read
        """
        if not self._places.acquire(blocking=False):
            raise Refusal("busy", f"this backup serves {self._policy.max_readers} readers already: try again later")
        try:
            reader = Reader(self, peer, demand)
            try:
                yield reader
            finally:
                reader.close()
        finally:
            self._places.release()

    def names(self) -> list[str]:
        """All names, ascending. Raises StoreError."""
        return self._store.names()

    def is_kept(self, name: str) -> bool:
        """Whether this backup was started for a name."""
        return self._policy.names is None or name in self._policy.names

    def open(self, name: str) -> History:
        """The history of a name. Raises StoreError."""
        return self._store.history(name, limits=self._limits)

    def survey_of(self, name: str) -> Survey:
        """What the history of a name holds durably. Raises StoreError."""
        history = self.open(name)
        return self.survey(history, Listing(history.directory, history.limits))

    def survey(self, history: History, listing: Listing) -> Survey:
        """What a history holds durably. Raises StoreError."""
        survey = history.survey()
        # Asked afterwards, so that it covers all that the survey can have seen acknowledged.
        newest = self._durable(history.directory.name)
        if newest is None:
            return survey  # nobody writes to it
        return replace(survey, contents=tuple(_up_to(newest, survey.contents, listing)))


def _up_to(newest: int, contents: tuple[Contents, ...], listing: Listing) -> Iterator[Contents]:
    """The segments without the checkpoints behind the newest durable one."""
    for one in contents:
        if one.first is None or one.last is None or one.last.epoch <= newest:
            yield one
        elif one.first.epoch <= newest and (last := listing.find(one, newest)) is not None:
            yield replace(one, last=last, size=None)


@dataclass(slots=True)
class _Open:
    """A history that a reader looks at. survey: the reader's last one; only what it lists can be read."""

    name: str
    history: History
    listing: Listing
    survey: Survey

    def segment(self, name: str) -> Contents:
        """A segment of the survey. Raises NoCheckpoint."""
        for one in self.survey.contents:
            if one.name == name:
                return one
        raise NoCheckpoint(f"{self.name} has no segment {name!r:.80} any more")


class Reader:
    """Answers the requests of one reader, in one thread. It keeps one history and one segment of it open, so that a
    segment that is being read stays readable when it is pruned."""

    def __init__(self, readers: Readers, peer: str, demand: Callable[[str], None]) -> None:
        self._readers = readers
        self._peer = peer
        self._demand = demand
        self._open: _Open | None = None
        self._segment = ""
        self._fd = -1

    def close(self) -> None:
        """Close what is open. May be called again."""
        fd, self._fd, self._segment = self._fd, -1, ""
        if fd >= 0:
            os.close(fd)

    def answer(self, method: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """The result of a request, None if there is no such method."""
        try:
            match method:
                case "names":
                    return self._names(_text(arguments, "after"))
                case "survey":
                    return self._survey(_text(arguments, "name"), _whole(arguments, "start"))
                case "entries":
                    return self._entries(arguments)
                case "until":
                    return self._until(arguments)
                case "read":
                    return self._read(arguments)
        except (NoCheckpoint, StoreError) as error:
            return {"error": str(error), "code": "gone" if isinstance(error, NoCheckpoint) else "store"}
        return None

    def _check(self, name: str) -> None:
        """The one place that decides whether this reader may see a name. Raises StoreError, Refusal."""
        if not self._readers.is_kept(name):
            raise StoreError(f"{name!r:.80} is not among the names that this backup was started for (--name)")
        self._demand(name)

    def _may_read(self, name: str) -> bool:
        try:
            self._check(name)
        except (StoreError, Refusal):
            return False
        return True

    def _names(self, after: str) -> dict[str, Any]:
        names = [name for name in self._readers.names() if name > after and self._may_read(name)]
        return {"names": names[:_NAMES], "more": len(names) > _NAMES}

    def _survey(self, name: str, start: int) -> dict[str, Any]:
        found = self._opened(name, anew=start == 0)
        survey, state = found.survey, found.history.state
        damaged = [(segment, why) for segment, why in state.damaged.items() if is_segment(segment)]
        rows: dict[str, list[Any]] = {
            "segments": [row_of_contents(one) for one in survey.contents[start : start + _SEGMENTS]],
            "lost": [row_of_lost(one) for one in survey.lost[start : start + _SEGMENTS]],
            "damaged": [[segment, why[:REASON_CHARS]] for segment, why in damaged[start : start + _SEGMENTS]],
        }
        most = max(len(survey.contents), len(survey.lost), len(damaged))
        return {"term": state.term, "role": str(state.role), **rows, "more": most > start + _SEGMENTS}

    def _entries(self, arguments: dict[str, Any]) -> dict[str, Any]:
        found = self._opened(_text(arguments, "name"))
        one = found.segment(_text(arguments, "segment"))
        epoch, backward = _whole(arguments, "epoch"), arguments.get("backward") is True
        entry = found.listing.find(one, epoch) if epoch in one.epochs else None
        if entry is None:
            return {"entries": []}
        rest = replace(one, last=entry) if backward else replace(one, first=entry)
        entries = (other for other in found.listing.of(rest, backward) if other.epoch in rest.epochs)
        count = min(_whole(arguments, "count"), _ENTRIES)
        return {"entries": [row_of_entry(other) for other in islice(entries, count)]}

    def _until(self, arguments: dict[str, Any]) -> dict[str, Any]:
        found = self._opened(_text(arguments, "name"))
        one = found.segment(_text(arguments, "segment"))
        entry = found.listing.newest_until(one, _whole(arguments, "time_ns", -_MOST - 1))
        if entry is not None and one.last is not None and entry.epoch > one.last.epoch:
            entry = one.last
        return {"entry": None if entry is None else row_of_entry(entry)}

    def _read(self, arguments: dict[str, Any]) -> dict[str, Any]:
        found = self._opened(_text(arguments, "name"))
        one = found.segment(_text(arguments, "segment"))
        start, size = _whole(arguments, "start"), _whole(arguments, "size")
        if not 0 < size <= READ_BYTES or start + size > one.end:
            raise RemusError(f"bytes {start} to {start + size} of a segment that has {one.end}")
        if self._segment != one.name:
            self.close()
            path = found.history.path_of(one.name)
            try:
                self._fd = open_to_read(path)
            except FileNotFoundError:
                raise NoCheckpoint(f"{path} is gone: it has been pruned") from None
            except OSError as error:
                raise StoreError(f"{path}: {error.strerror}") from error
            self._segment = one.name
        with guarding(found.history.path_of(one.name)):
            return {"data": os.pread(self._fd, size, start)}

    def _opened(self, name: str, *, anew: bool = False) -> _Open:
        """The history of that name, surveyed: anew, or when it was opened. Raises StoreError, Refusal."""
        if self._open is None or self._open.name != name:
            self._check(name)
            self.close()
            self._open = None
            history = self._readers.open(name)
            listing = Listing(history.directory, history.limits)
            self._open = _Open(name, history, listing, self._readers.survey(history, listing))
            log("reader connected", name=name, peer=self._peer)
        elif anew:
            self._open.survey = self._readers.survey(self._open.history, self._open.listing)
        return self._open


def _text(arguments: dict[str, Any], key: str) -> str:
    value = arguments.get(key)
    if type(value) is not str:
        raise RemusError(f"{key}: {value!r:.40} in place of a text")
    return value


def _whole(arguments: dict[str, Any], key: str, least: int = 0) -> int:
    value = arguments.get(key)
    if type(value) is not int or not least <= value <= _MOST:
        raise RemusError(f"{key}: {value!r:.40} in place of a whole number")
    return value
