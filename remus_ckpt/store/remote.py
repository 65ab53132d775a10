"""A history on another machine, read through its backup (specs/session.md §3.13).

Everything is checked here, as for a history on this machine: the backup only lists what there is and sends bytes.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.disk import guarding
from remus_ckpt.errors import LinkError, Malformed, NoCheckpoint, Refused, RemusError, StoreError, StreamError
from remus_ckpt.limits import Limits
from remus_ckpt.link.address import Address, check_options, split_name
from remus_ckpt.link.control import Requests
from remus_ckpt.link.dial import connect
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.session.messages import READ_BYTES, check_name
from remus_ckpt.store import rows
from remus_ckpt.store.history import Bad, History, Progress, Report, bad_of, copy_out
from remus_ckpt.store.listing import Listing
from remus_ckpt.store.moment import Moment
from remus_ckpt.store.segments import Contents, Entry, Nowhere, Read, reader_of, sequence_of, walk_bytes
from remus_ckpt.store.state import State
from remus_ckpt.store.stored import Stored
from remus_ckpt.store.survey import Lost, Survey, without
from remus_ckpt.wire.digest import DigestName

_TIMEOUT_S = 60.0
_AHEAD = 64
"""Pieces of a segment requested before the first of them has arrived: enough for 1 Gbit/s over 100 ms. Only one
is in memory at a time; the others wait on the backup's disk."""
_MAX_ROWS = 1_000_000
"""Names, segments or losses that a backup may list."""
_ENTRIES = 1_000


class Remote(History):
    """Checkpoints on another machine: `Remote("tls://host:7411/orders", tls_dir="keys/me")[-1].arrays()`.

    address: of a backup and, after a slash, a name there: tls://HOST:PORT/NAME, unix:PATH/NAME, tcp://HOST:PORT/NAME.
        Without a name, `names` lists the existing ones, and `remote["orders"]` is the history of one.
    tls_dir: a folder made by `remus-ckpt keys issue`, for tls://
    insecure: allow plain tcp:// to another machine
    limits: what its streams may claim
    timeout_s: for each connection and each answer; a large answer comes in small pieces

    It reads like any `History`, and every byte is checked here. Each call opens and closes a connection; in a `with`
    block, all calls of a thread share one. If a connection breaks while a checkpoint is being read, it is reopened, and
    reading continues where it was.
    The methods also raise LinkError if the backup cannot be reached, breaks the protocol, or does not answer in time,
    and Refused if it refuses.
    """

    def __init__(
        self,
        address: str,
        *,
        tls_dir: str | Path | None = None,
        insecure: bool = False,
        limits: Limits | None = None,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        where, name = split_name(address)
        parsed = Address.parse(where, "tls")
        tls = TlsFiles(tls_dir) if tls_dir is not None else None
        check_options(parsed, tls, insecure)
        self._begin(_Backup(parsed, tls, insecure, timeout_s), name, limits)

    def _begin(self, backup: _Backup, name: str | None, limits: Limits | None) -> None:
        self._backup = backup
        self._name = None if name is None else check_name(name)
        self.where = str(backup.address) if name is None else f"{backup.address}/{name}"
        self.limits = limits
        self._listing = _RemoteListing(self)

    def __enter__(self) -> Self:
        self._backup.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._backup.__exit__()

    @overload
    def __getitem__(self, key: int) -> Stored: ...
    @overload
    def __getitem__(self, key: str) -> Remote: ...
    def __getitem__(self, key: int | str) -> Stored | Remote:
        """The history of a name; or, in a history, a checkpoint by index. Raises IndexError, StoreError, ValueError."""
        if isinstance(key, int):
            return super().__getitem__(key)
        if self._name is not None:
            raise ValueError(f"{self.where} is a history: it has no names")
        named = Remote.__new__(Remote)
        named._begin(self._backup, key, self.limits)
        return named

    @property
    def has_name(self) -> bool:
        """Whether this is the history of a name."""
        return self._name is not None

    def names(self) -> list[str]:
        """The names that can be read there, ascending."""
        found: list[str] = []
        with self._backup as backup:
            is_more = True
            while is_more:
                page = backup.ask("names", after=found[-1] if found else "")
                names, is_more = page.get("names"), page.get("more") is True
                if type(names) is not list or not all(type(name) is str for name in names) or (is_more and not names):
                    raise backup.fault("no names")
                found += names
                if sorted(set(found)) != found or len(found) > _MAX_ROWS:
                    raise backup.fault("names that do not ascend, or too many")
        return found

    @property
    def name(self) -> str:
        """The name of this history. Raises StoreError if the address has none."""
        if self._name is None:
            names = ", ".join(f"{self.where}/{name}" for name in self.names())
            raise StoreError(f"{self.where} is a backup; choose one of its names: {names or 'it has none'}")
        return self._name

    def reading(self) -> AbstractContextManager[object]:
        """A block in which all calls of this thread share one connection."""
        return self._backup

    @property
    def state(self) -> State:
        """The term, the role and the known damage there."""
        return self._look()[0]

    def survey(self) -> Survey:
        """What the segments hold durably, and what they once held."""
        return self._look()[1]

    def _look(self) -> tuple[State, Survey]:
        name = self.name
        contents: list[Contents] = []
        lost: list[Lost] = []
        damaged: dict[str, str] = {}
        with self._backup as backup, backup.checking():
            is_more, start = True, 0
            while is_more:
                page = backup.ask("survey", name=name, start=start)
                parts: list[Any] = [page.get(key) for key in ("segments", "lost", "damaged")]
                if not all(type(part) is list for part in parts):
                    raise backup.fault("no survey")
                segments, losses, damages = parts
                contents += map(rows.contents_of, segments)
                lost += map(rows.lost_of, losses)
                damaged |= dict(map(rows.damage_of, damages))
                is_more = page.get("more") is True
                step = max(map(len, parts))
                start += step
                if (is_more and not step) or start > _MAX_ROWS:
                    raise backup.fault("a survey without end")
            if any(sequence_of(one.name) >= sequence_of(after.name) for one, after in itertools.pairwise(contents)):
                raise backup.fault("segments that do not ascend")
            return rows.state_of(name, page.get("term"), page.get("role"), damaged), Survey(
                tuple(contents), tuple(lost)
            )

    def entries_of(self, one: Contents, epoch: int, count: int, *, backward: bool = False) -> list[Entry]:
        """Up to `count` checkpoints of a segment, from one of its epochs on; they follow one another."""
        step = -1 if backward else 1
        with self._backup as backup, backup.checking():
            result = backup.ask(
                "entries", name=self.name, segment=one.name, epoch=epoch, backward=backward, count=count
            )
            if type(found := result.get("entries")) is not list or len(found) > count:
                raise backup.fault("no checkpoints")
            entries = [rows.entry_of(row, one.name) for row in found]
            epochs = list(range(epoch, epoch + step * len(entries), step))
            if [entry.epoch for entry in entries] != epochs or not all(epoch in one.epochs for epoch in epochs):
                raise backup.fault("checkpoints that were not asked for")
            return entries

    def newest_until(self, one: Contents, time_ns: int) -> Entry | None:
        """The newest checkpoint of a segment that was taken no later than a time."""
        with self._backup as backup, backup.checking():
            row = backup.ask("until", name=self.name, segment=one.name, time_ns=time_ns).get("entry")
            found = None if row is None else rows.entry_of(row, one.name)
            if found is not None and (found.epoch not in one.epochs or (found.time_ns or 0) > time_ns):
                raise backup.fault("a checkpoint that was not asked for")
            return found

    @contextmanager
    def bytes_of(self, segment: str, end: int) -> Iterator[Read]:
        """The first bytes of a segment, to be read in order."""
        with self._backup as backup:
            pieces = _Pieces(backup, self.name, segment, end)
            try:
                yield pieces.read
            finally:
                pieces.drop()

    def moment(self, at: int | datetime | None = None) -> Moment:
        """Not offered: pages of a checkpoint are read one by one only where its segment is. Raises StoreError."""
        raise StoreError(f"{self.where} is on another machine: restore the checkpoint, or read it there")

    def memory(self, at: int | datetime | None = None) -> NDArray[np.uint8]:
        """uint8[memory_bytes]: the memory of a checkpoint, restored whole. Raises like `restore`."""
        return self.restore(at).image

    def _indexed(self, entry: Entry) -> AbstractContextManager[Moment | None]:
        return nullcontext()

    def _open(self, entry: Entry) -> AbstractContextManager[Read]:
        return self.bytes_of(entry.segment, entry.end)

    def _digest_of(self, read: Read, entry: Entry) -> DigestName | None:
        return None  # the bytes come in order, and the first record is far behind

    def _print(self, at: int | datetime | None, progress: Progress | None) -> Entry:
        # What was checked is what is printed: it is not fetched again.
        with tempfile.TemporaryFile() as file:
            with guarding(tempfile.gettempdir(), "output"):
                _, entry = self._read(at, Nowhere(), progress, file.fileno())
            copy_out(reader_of(file.fileno()), entry.end)
        return entry

    def size(self) -> int:
        """Bytes of all segments."""
        return self.survey().bytes

    def verify(self, progress: Progress | None = None) -> Report:
        """Fetch every durable checkpoint, and check every byte, as well as what the backup says of them."""
        done = 0
        read: list[Contents] = []
        with self._backup:
            survey = self.survey()
            lost = list(survey.lost)
            for one in survey.contents:
                found = Contents(one.name)
                advance = (lambda at, base=done: progress(base + at)) if progress else None
                try:
                    with self.bytes_of(one.name, one.end) as source:
                        for _ in walk_bytes(source, found, end=one.end, limits=self.limits, advance=advance):
                            pass
                except NoCheckpoint:
                    continue  # pruned since
                done += one.end
                if found.fault is None and (found.first, found.last) != (one.first, one.last):
                    found.fault = Malformed("its checkpoints are not those that the backup lists", offset=found.end)
                read.append(found)
        for one in survey.contents:
            found = next((found for found in read if found.name == one.name), Contents(one.name))
            if found.fault is not None:
                byte, reason = found.fault.offset or found.end, found.fault.message
                there = [other.epochs for other in read]
                parts = without(one.epochs, there) or [range(0)]
                lost += (Lost(one.name, byte, reason, part) for part in parts)
        held = Survey(tuple(read), tuple(sorted(lost, key=lambda loss: sequence_of(loss.segment))))
        by_name = {one.name: one for one in read}
        bad: tuple[Bad, ...] = tuple(bad_of(loss, by_name.get(loss.segment), held) for loss in held.lost)
        checkpoints = sum(len(one.epochs) for one in read)
        return Report(checkpoints, len(read), held.bytes, bad, held.newest, unfinished_bytes=0)


class _RemoteListing(Listing):
    """The entries of segments that are there."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def of(self, contents: Contents, newest_first: bool = False) -> Iterator[Entry]:
        """The checkpoints of a segment, some at a time."""
        epochs = contents.epochs[::-1] if newest_first else contents.epochs
        while epochs:
            page = self._remote.entries_of(contents, epochs[0], min(len(epochs), _ENTRIES), backward=newest_first)
            if not page:
                return
            yield from page
            epochs = epochs[len(page) :]

    def walk(self, contents: Contents) -> Iterator[Entry]:
        """None: a checkpoint whose position is not the listed one is not the requested one."""
        return iter(())

    def find(self, contents: Contents, epoch: int) -> Entry | None:
        """One checkpoint of a segment."""
        for edge in (contents.first, contents.last):
            if edge is not None and edge.epoch == epoch:
                return edge
        return next(iter(self._remote.entries_of(contents, epoch, 1)), None)

    def newest_until(self, contents: Contents, time_ns: int) -> Entry | None:
        """The newest checkpoint of a segment that was taken no later than a time."""
        return self._remote.newest_until(contents, time_ns)


class _Held(threading.local):
    """The open session of a thread, and how many blocks it is held by."""

    requests: Requests | None = None
    depth = 0


@dataclass
class _Backup:
    """Sessions with a backup, one for each thread that is in a `with` block of it."""

    address: Address
    tls: TlsFiles | None
    insecure: bool
    timeout_s: float

    def __post_init__(self) -> None:
        self._held = _Held()

    def __enter__(self) -> Self:
        self._held.depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._held.depth -= 1
        if not self._held.depth:
            self.hang_up()

    def hang_up(self) -> None:
        """End the session; the next request begins another."""
        requests, self._held.requests = self._held.requests, None
        if requests is not None:
            requests.close()

    @contextmanager
    def checking(self) -> Iterator[None]:
        """A violation of the protocol by the other side ends the session, and is a LinkError.

        An interrupt ends it too: the answer that is still to come would be taken for that to the next request.
        """
        try:
            yield
        except StreamError as error:
            self.hang_up()
            raise LinkError(f"{self.address} broke the protocol: {error}") from error
        except RemusError as error:
            if isinstance(error, LinkError):  # any other is an answer
                self.hang_up()
            raise
        except BaseException:
            self.hang_up()
            raise

    def fault(self, what: str) -> LinkError:
        """The error for a result that breaks the rules; the session ends."""
        self.hang_up()
        return LinkError(f"{self.address} broke the protocol: {what} (session.md §3.13)")

    def post(self, method: str, **arguments: Any) -> None:
        """Send a request."""
        with self.checking():
            if self._held.requests is None:
                connection = connect(
                    self.address, tls=self.tls, insecure=self.insecure, timeout_s=min(self.timeout_s, 10.0)
                )
                self._held.requests = Requests(connection, "reader", timeout_s=self.timeout_s)
            self._held.requests.post(method, arguments, self.timeout_s)

    def answer(self) -> dict[str, Any]:
        """The result of the oldest request that has not been answered."""
        with self.checking():
            if self._held.requests is None:
                raise LinkError(f"{self.address}: the session has ended")
            return self._held.requests.answer(self.timeout_s)

    def ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and return its result."""
        with self.checking():
            self.post(method, **arguments)
            return self.answer()


class _Pieces:
    """A segment's bytes from its beginning, asked for a few pieces ahead. If the session breaks, another continues."""

    def __init__(self, backup: _Backup, name: str, segment: str, end: int) -> None:
        self._backup = backup
        self._name, self._segment, self._end = name, segment, end
        self._sizes: deque[int] = deque()  # of the pieces that have been asked for
        self._asked = self._fetched = self._at = 0
        self._broken_at = -1  # where the last session broke
        self._rest = memoryview(b"")

    def read(self, view: memoryview, at: int) -> int:
        """Bytes into the view; 0 at the end."""
        assert at == self._at, "a segment is read from its beginning to its end"
        if not self._rest:
            if at == self._end:
                return 0
            self._rest = memoryview(self._fetch())
        size = min(len(view), len(self._rest))
        view[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        self._at += size
        return size

    def drop(self) -> None:
        """Drain what is still arriving, so that the session can be used for something else."""
        if self._sizes:
            self._backup.hang_up()

    def _fetch(self) -> bytes:
        while True:
            try:
                return self._fetch_next()
            except LinkError as error:
                # A request that changed on its way is refused as malformed.
                is_answer = isinstance(error, Refused) and error.code != "malformed"
                if is_answer or self._fetched == self._broken_at:
                    raise  # or nothing has arrived since
                self._broken_at = self._asked = self._fetched
                self._sizes.clear()

    def _fetch_next(self) -> bytes:
        while len(self._sizes) < _AHEAD and self._asked < self._end:
            size = min(READ_BYTES, self._end - self._asked)
            self._backup.post("read", name=self._name, segment=self._segment, start=self._asked, size=size)
            self._sizes.append(size)
            self._asked += size
        size = self._sizes[0]
        data = self._backup.answer().get("data")
        if type(data) is not bytes or len(data) != size:
            raise self._backup.fault(f"{len(data) if type(data) is bytes else 'no'} bytes instead of {size}")
        self._sizes.popleft()
        self._fetched += size
        return data
