"""The index of a history: a table of what its segments hold, so that they need not be read (specs/store.md §5).

The segments are the truth: an index that is missing, behind or unreadable is rebuilt from them. No object holds all
rows in memory: a segment is summed up by its first and last row, and the others are read when needed.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from remus_ckpt.errors import StoreError
from remus_ckpt.limits import Limits
from remus_ckpt.store.segments import Contents, Entry, Shape, first_epoch_of, is_segment, sequence_of, walk
from remus_ckpt.wire.record import Position
from remus_ckpt.wire.xen.chunks import MAX_P2M_SIZE

FILE = "index.sqlite"
_VERSION = 1
_APPLICATION_ID = 0x52454D55
_SCHEMA = f"""
BEGIN;
CREATE TABLE segments (name TEXT PRIMARY KEY, size INTEGER, codec TEXT, word INTEGER, p2m_size INTEGER) STRICT;
CREATE TABLE checkpoints (
    segment TEXT NOT NULL, start INTEGER NOT NULL, "end" INTEGER NOT NULL, epoch INTEGER NOT NULL,
    digest BLOB NOT NULL, time_ns INTEGER, pages INTEGER NOT NULL, PRIMARY KEY (segment, start)
) STRICT, WITHOUT ROWID;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_VERSION};
COMMIT;
"""
_INSERT = "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?)"
_INSERT_SEGMENT = "INSERT OR REPLACE INTO segments VALUES (?, ?, ?, ?, ?)"
_SELECT = 'SELECT segment, start, "end", epoch, digest, time_ns, pages FROM checkpoints WHERE segment = ?'
_ROWS = 1_000
"""How many rows are read or written at a time."""
_LATEST = 4
_MAX_WAITING = 512
_RETRY_FACTOR = 10
"""Retries of an index that cannot be written take at most a tenth of the time."""
_RETRY_S = 0.5
_BUSY_S = 0.1
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_SCHEMA)
"""SQLite's error codes for a damaged file; SQLITE_ERROR: its tables are not ours."""

_Statement = tuple[str, str, tuple[object, ...]]
"""The segment whose rows are incomplete without the statement ("" for none); the SQL and its values."""


class Unreadable(Exception):
    """The index has no answer, or no credible one.

    is_damage: its contents can never be read again; otherwise the disk or the system has failed, perhaps temporarily
    """

    def __init__(self, reason: str = "", *, is_damage: bool = True) -> None:
        super().__init__(reason)
        self.is_damage = is_damage


class Rows:
    """An index opened for reading. Each query is separate, so that no writer waits between them."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def segments(self) -> dict[str, Contents]:
        """What each segment holds, oldest first, without those whose rows are impossible. Raises Unreadable."""
        found: list[Contents] = []
        with _believing():
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if version != _VERSION:
                raise ValueError(f"the index has version {version}")
            self._database.execute("BEGIN")
            try:
                rows = self._database.execute("SELECT name, size, codec, word, p2m_size FROM segments")
                for name, size, codec, word, p2m_size in rows:
                    if not is_segment(name) or codec not in ("delta", "rle") or word not in (4, 8):
                        raise ValueError(f"segment {name!r}: codec {codec!r}, word {word!r}")
                    if not 0 < p2m_size <= MAX_P2M_SIZE or not (size is None or size >= 0):
                        raise ValueError(f"segment {name!r}: {p2m_size} pages, {size} bytes")
                    one = Contents(name, shape=Shape(codec, word, p2m_size), size=size)
                    with suppress(ValueError, TypeError):
                        one.first, one.last = self._edge(name, is_last=False), self._edge(name, is_last=True)
                        if one.first == one.last:  # there may be very many segments
                            one.last = one.first
                        if _is_sound(one):
                            found.append(one)
            finally:
                self._database.execute("ROLLBACK")
        return {one.name: one for one in sorted(found, key=lambda one: sequence_of(one.name))}

    def find(self, contents: Contents, epoch: int) -> Entry:
        """One checkpoint of a segment. Raises Unreadable."""
        if (entry := self._one(contents, "AND epoch = ?", epoch)) is None:
            raise Unreadable
        return entry

    def newest_until(self, contents: Contents, time_ns: int) -> Entry | None:
        """The newest checkpoint of a segment that was taken no later than a time. Raises Unreadable."""
        return self._one(contents, "AND time_ns <= ? ORDER BY start DESC", time_ns)

    def entries(self, contents: Contents, *, backward: bool = False) -> Iterator[Entry]:
        """The checkpoints of a segment; each begins where the one before ends. Raises Unreadable."""
        edge = contents.last if backward else contents.first
        done = contents.first if backward else contents.last
        while edge is not None and done is not None:
            with _believing():
                rows = self._database.execute(
                    f"{_SELECT} AND start <= ? ORDER BY start DESC LIMIT ?"
                    if backward
                    else f"{_SELECT} AND start >= ? ORDER BY start LIMIT ?",
                    (contents.name, edge.start, _ROWS),
                ).fetchall()
                page = [_entry_of(row) for row in rows]
                if not page or page[0] != edge:
                    raise ValueError("a row is missing")
                for one, other in itertools.pairwise(page):
                    _follow(*((other, one) if backward else (one, other)))
            for entry in page if page[-1] == done or len(page) == 1 else page[:-1]:
                yield entry
                if entry == done:
                    return
            if len(page) == 1:
                raise Unreadable
            edge = page[-1]

    def is_whole(self, contents: Contents) -> bool:
        """Whether the index has all rows of a segment. Raises Unreadable."""
        with _believing():
            query = "SELECT count(*) FROM checkpoints WHERE segment = ?"
            (count,) = self._database.execute(query, (contents.name,)).fetchone()
            return bool(count == len(contents.epochs))

    def _edge(self, segment: str, *, is_last: bool) -> Entry | None:
        """The first or the last row of a segment, if the one beside it agrees. Raises ValueError, TypeError."""
        query = f"{_SELECT} ORDER BY start {'DESC' if is_last else 'ASC'} LIMIT 2"
        rows = [_entry_of((segment, *row[1:])) for row in self._database.execute(query, (segment,))]
        if len(rows) == 2:
            _follow(*(reversed(rows) if is_last else rows))
        return rows[0] if rows else None

    def _one(self, contents: Contents, clause: str, *values: int) -> Entry | None:
        """One row, if those beside it agree. Raises Unreadable."""
        name = contents.name
        with _believing():
            row = self._row(name, clause, *values)
            if row is None:
                return None
            entry = _entry_of(row)
            if entry != contents.first:
                _follow(_entry_of(self._row(name, "AND start < ? ORDER BY start DESC", entry.start) or ()), entry)
            if entry != contents.last:
                _follow(entry, _entry_of(self._row(name, "AND start > ? ORDER BY start", entry.start) or ()))
            return entry

    def _row(self, segment: str, clause: str, *values: int) -> tuple[object, ...] | None:
        """Raises sqlite3.Error."""
        row: tuple[object, ...] | None
        row = self._database.execute(f"{_SELECT} {clause} LIMIT 1", (segment, *values)).fetchone()
        return row


@contextmanager
def reading(path: Path) -> Iterator[Rows | None]:
    """An index opened for reading; None if there is none. Writes nothing."""
    database = _open_to_read(path)
    try:
        yield None if database is None else Rows(database)
    finally:
        if database is not None:
            database.close()


def read_index(path: Path) -> dict[str, Contents] | None:
    """What each segment holds according to the index, oldest first; None if it cannot be read. Writes nothing."""
    with reading(path) as rows:
        try:
            return None if rows is None else rows.segments()
        except Unreadable:
            return None


def _open_to_read(path: Path) -> sqlite3.Connection | None:
    if not path.is_file():
        return None
    # The second option is for read-only file systems: it ignores the log beside the index.
    for options in ("mode=ro", "immutable=1"):
        with suppress(sqlite3.Error, ValueError):
            return _connect(path, options)
    return None


def _connect(path: Path, options: str) -> sqlite3.Connection:
    """Raises sqlite3.Error, ValueError."""
    database = sqlite3.connect(
        f"{path.absolute().as_uri()}?{options}", uri=True, timeout=5, isolation_level=None, check_same_thread=False
    )
    try:
        database.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except BaseException:
        database.close()
        raise
    return database


@contextmanager
def _believing() -> Iterator[None]:
    """Turn errors from SQLite, and from values in its rows, into Unreadable."""
    try:
        yield
    except (sqlite3.Error, ValueError, TypeError, KeyError, OverflowError) as error:
        raise Unreadable(str(error), is_damage=not isinstance(error, sqlite3.Error) or _is_damage(error)) from error


def _is_damage(error: Exception) -> bool:
    """Whether the error means that the file can never be read or written again."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE


def _entry_of(row: tuple[object, ...]) -> Entry:
    """Raises ValueError, TypeError."""
    segment, start, end, epoch, digest, time_ns, pages = row
    numbers = (start, end, epoch, pages, 0 if time_ns is None else time_ns)
    if not all(type(number) is int for number in numbers) or not 0 <= start < end or pages < 0:  # type: ignore[operator]
        raise ValueError(f"a checkpoint from {start!r:.40} to {end!r:.40}")
    return Entry(Position(epoch, digest), time_ns, segment, start, end, pages, start == 0)  # type: ignore[arg-type]


def _follow(one: Entry, other: Entry) -> None:
    """Raises ValueError unless the second is the checkpoint right after the first."""
    if one.end != other.start or one.epoch + 1 != other.epoch:
        raise ValueError("a row is missing or altered")


def _is_sound(one: Contents) -> bool:
    """Whether the first and the last row are possible in a segment of that name and size."""
    first, last = one.first, one.last
    if first is None or last is None:
        return first is last
    gap = last.epoch - first.epoch
    return (
        first.start == 0
        and first.epoch == first_epoch_of(one.name)
        and gap <= last.start  # every checkpoint has bytes
        and (last == first if gap == 0 else gap > 0 and last.start >= first.end)
        and (one.size is None or one.end <= one.size)
    )


class Index:
    """The writing side, and what all segments hold, summed up.

    path: of the database; segments: the directory of the files; limits: what their streams may claim

    If the database cannot be written, it is tried again now and then; the queue of rows is bounded. If rows of a
    segment had to be dropped, none are written until the segment is complete: then a thread reads them back from the
    file. A damaged database is replaced by a new one, which is filled in the same way. `warning` reports both.
    The log needs no sync: if a loss of power leaves the index behind or destroys it, it is rebuilt.
    """

    def __init__(self, path: Path, segments: Path, limits: Limits | None = None) -> None:
        self.known: dict[str, Contents] = {}
        """What the segments really hold, oldest first, even if the database disagrees."""
        self.warning: str | None = None
        self._path = path
        self._segments = segments
        self._limits = limits
        self._lock = threading.RLock()
        self._waiting: list[_Statement] = []
        self._behind: set[str] = set()  # segments with missing rows, for which none are written now
        self._database: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._not_before = 0.0
        self._thread: threading.Thread | None = None
        self._over = threading.Event()

    def load(self) -> dict[str, Contents]:
        """What the database says about the segments. A damaged database is removed, and a new one is begun.

        Raises StoreError if the disk or the system fails: information that only the index has must not be lost by that.
        """
        try:
            if stat.S_ISREG(self._path.stat().st_mode):
                return self._load()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StoreError(f"{self._path}: {error.strerror}") from error
        except Unreadable as error:
            if not error.is_damage:
                raise StoreError(f"{self._path} cannot be read: {error}") from error
        self._remove()
        return {}

    def _load(self) -> dict[str, Contents]:
        with _believing():
            database = _connect(self._path, "mode=rw")  # SQLite may have to roll back half a change
        try:
            rows = Rows(database)
            found = rows.segments()
            # Rows written just before a loss of power may be there in part.
            for name in list(found)[-_LATEST:]:
                if not rows.is_whole(found[name]):
                    del found[name]
            return found
        finally:
            database.close()

    def fill(self, contents: Contents, *, end: int, advance: Callable[[int], None] | None = None) -> None:
        """Read a segment beyond what is known of it, and write its rows as they come. Raises OSError.

        contents: the known part, whose rows are written; updated to what the segment holds
        end: where to stop
        """
        name = contents.name
        path = self._segments / name
        with self._lock:
            self._wait(name, "DELETE FROM segments WHERE name = ?", name)
            if contents.last is None:
                self._wait(name, "DELETE FROM checkpoints WHERE segment = ?", name)
        for number, entry in enumerate(walk(path, contents, end=end, limits=self._limits, advance=advance), 1):
            with self._lock:
                self._wait(name, _INSERT, *_row(entry))
                if number % _ROWS == 0:
                    self.flush()
        with self._lock:
            self._wait_for_segment(contents)
            self.flush()

    def begin(self, known: Iterable[Contents], on_disk: dict[str, Contents]) -> None:
        """Take in what the segments hold, oldest first, and make the database agree. Raises OSError.

        on_disk: what the database says now
        """
        self.known = {one.name: one for one in known}
        for name in on_disk:
            if name not in self.known:
                self._delete(name)
        for name, one in self.known.items():
            said = on_disk.get(name)
            if _said(said) == _said(one):
                continue
            is_longer = said is not None and said.end < one.end and said.first == one.first and said.shape == one.shape
            if one.last is not None and (said is None or said.last != one.last or said.first != one.first):
                held = replace(said, size=None) if is_longer and said is not None else Contents(name)
                self.fill(held, end=one.end)
            self._wait_for_segment(one)
        self.flush()
        self._catch_up()

    def add(self, entry: Entry, new_segment: Contents | None = None) -> None:
        """Add a checkpoint that has become durable. new_segment: given with the base of a segment"""
        with self._lock:
            if new_segment is not None:
                self.known[new_segment.name] = new_segment
                self._wait_for_segment(new_segment)
            self.known[entry.segment].add(entry)
            self._wait(entry.segment, _INSERT, *_row(entry))
            self.flush()

    def seal(self, segment: str, size: int) -> None:
        """Note that a segment will not grow any more."""
        with self._lock:
            self.known[segment].size = size
            self._wait(segment, "UPDATE segments SET size = ? WHERE name = ?", size, segment)
            if self._database is not None and self._identity != _identity_of(self._path):
                self._replace()  # the file has been removed
            self.flush()
            self._catch_up()

    def drop(self, segments: Iterable[str]) -> None:
        """Drop segments that are about to be removed."""
        with self._lock:
            for segment in segments:
                self.known.pop(segment, None)
                self._behind.discard(segment)
                self._delete(segment)
            self.flush()

    def flush(self, *, now: bool = False) -> None:
        """Write what waits, unless that failed a moment ago.

        now: try in any case
        """
        with self._lock:
            begin = time.monotonic()
            if now or begin >= self._not_before:
                try:
                    self._write()
                except (sqlite3.Error, OSError) as error:
                    self.warning = f"{self._path} is behind: {error}"
                    self._close_database()
                    if _is_damage(error):
                        self._replace()
                    else:
                        self._not_before = time.monotonic() + _RETRY_FACTOR * (time.monotonic() - begin)
            if len(self._waiting) > _MAX_WAITING:
                self._behind |= {name for name, *_ in self._waiting if name}
                self._waiting.clear()

    def close(self) -> None:
        """Write what can be written, and close the database."""
        self._over.set()
        if (thread := self._thread) is not None:
            thread.join()
        if self._database is not None or self._waiting:
            self.flush(now=True)
        self._close_database()

    def _write(self) -> None:
        if self._database is None:
            self._database = _open(self._path)
            self._identity = _identity_of(self._path)
        if self._waiting:
            with self._database:
                self._database.execute("BEGIN")
                for _, statement, values in self._waiting:
                    self._database.execute(statement, values)
        self._waiting.clear()
        self._not_before = 0.0
        if not self._behind:
            self.warning = None

    def _replace(self) -> None:
        """Replace a damaged database by a new one; its rows are read back from the segments."""
        self.warning = f"{self._path} was damaged, and is rebuilt"
        self._remove()
        self._waiting.clear()
        self._behind = set(self.known)
        self._catch_up()

    def _remove(self) -> None:
        self._close_database()
        for end in ("", "-wal", "-shm", "-journal"):
            path = self._path.with_name(self._path.name + end)
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                self.warning = f"{path}: {error.strerror}"

    def _catch_up(self) -> None:
        """Begin to read back the rows that had to be dropped."""
        with self._lock:
            if self._next_behind() is None or self._thread is not None or self._over.is_set():
                return
            self._thread = threading.Thread(target=self._read_back, name="index", daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:  # no more threads are allowed: try again when a segment ends
                self._thread = None
                self.warning = f"{self._path} is behind: {error}"

    def _next_behind(self, but: Container[str] = ()) -> str | None:
        ended = (name for name, one in self.known.items() if one.size is not None)
        return next((name for name in ended if name in self._behind and name not in but), None)

    def _read_back(self) -> None:
        tried: set[str] = set()  # segments that cannot be read back: they are read on demand
        wait_s = 0.0
        while not self._over.wait(wait_s):
            with self._lock:
                self.flush(now=True)
                name = self._next_behind(tried)
                if name is None:
                    self._thread = None
                    return
                one = None if self._database is None else self.known[name]
                if one is not None:
                    self._behind.discard(name)
            if one is not None and self._read_one_back(one):
                tried.add(name)
                wait_s = 0.0
            else:
                wait_s = max(_RETRY_S, self._not_before - time.monotonic())
        with self._lock:
            self._thread = None

    def _read_one_back(self, one: Contents) -> bool:
        """Read one segment back. True if it is done: its rows are written, or it cannot be read. False if it is behind
        again."""
        name = one.name
        found = Contents(name)

        def stop(_: int) -> None:
            if self._over.is_set() or name in self._behind or name not in self.known:
                raise _Stopped

        # Catch everything: a thread that died here would keep the next from starting.
        with suppress(Exception):
            self.fill(found, end=one.end, advance=stop)
        with self._lock:
            if name in self.known and found.last == one.last:
                self._wait_for_segment(one)
            else:  # gone meanwhile, or changed: it is read on demand
                self._delete(name)
            self.flush(now=True)
            if self._database is None and any(segment == name for segment, *_ in self._waiting):
                self._waiting = [waiting for waiting in self._waiting if waiting[0] != name]
                self._behind.add(name)
            return name not in self._behind

    def _close_database(self) -> None:
        if self._database is not None:
            try:
                self._database.close()
            except sqlite3.Error as error:
                self.warning = f"{self._path}: {error}"
            self._database = None

    def _wait(self, segment: str, statement: str, *values: object) -> None:
        if segment not in self._behind:
            self._waiting.append((segment, statement, values))

    def _wait_for_segment(self, one: Contents) -> None:
        if one.shape is not None:
            shape = one.shape
            self._wait(one.name, _INSERT_SEGMENT, one.name, one.size, shape.codec, shape.word, shape.p2m_size)

    def _delete(self, segment: str) -> None:
        self._waiting.append(("", "DELETE FROM segments WHERE name = ?", (segment,)))
        self._waiting.append(("", "DELETE FROM checkpoints WHERE segment = ?", (segment,)))


class _Stopped(Exception):
    """The rows being read back are no longer needed."""


def _said(one: Contents | None) -> tuple[object, ...] | None:
    return None if one is None else (one.size, one.shape, one.first, one.last)


def _row(entry: Entry) -> tuple[object, ...]:
    position = entry.position
    return (entry.segment, entry.start, entry.end, position.epoch, position.digest, entry.time_ns, entry.pages)


def _identity_of(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _make_private(path: Path) -> None:
    """Give the database mode 0600 if it is ours; the files beside it take over its mode. Raises OSError.

    An existing database is not opened here: closing it would release locks that SQLite holds on it in this process.
    """
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        for end in ("", "-wal", "-shm"):
            with suppress(OSError):
                os.chmod(path.with_name(path.name + end), 0o600)


def _open(path: Path) -> sqlite3.Connection:
    """Raises sqlite3.Error, OSError."""
    _make_private(path)
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=_BUSY_S)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = OFF")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version != _VERSION:
            database.executescript(_SCHEMA)
    except sqlite3.Error:
        database.close()
        raise
    return database
