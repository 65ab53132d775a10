"""The index of a history: a table of what its segments hold, so that they need not be read (specs/store.md §5).

It is never the truth: where it is missing, behind or unreadable, the segments say it again.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path

from remus_ckpt.store.segments import Contents, Entry, Shape, is_segment
from remus_ckpt.wire.record import Position

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


def read_index(path: Path) -> dict[str, Contents] | None:
    """What an index says, segment by segment; None where none can be read. Writes nothing."""
    if not path.is_file():
        return None
    # The second way is for file systems that are not to be written: it does not look at the log beside the index.
    for options in ("mode=ro", "immutable=1"):
        try:
            with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{options}", uri=True, timeout=5)) as database:
                return _load(database)
        except (sqlite3.Error, ValueError, TypeError, KeyError, OverflowError):
            continue
    return None


def _load(database: sqlite3.Connection) -> dict[str, Contents]:
    """Raises sqlite3.Error, ValueError, TypeError or KeyError."""
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version != _VERSION:
        raise ValueError(f"the index has version {version}")
    found: dict[str, Contents] = {}
    database.execute("BEGIN")
    for name, size, codec, word, p2m_size in database.execute("SELECT name, size, codec, word, p2m_size FROM segments"):
        if not is_segment(name) or codec not in ("delta", "rle") or word not in (4, 8):
            raise ValueError(f"segment {name!r}: codec {codec!r}, word {word!r}")
        found[name] = Contents(name, shape=Shape(codec, word, p2m_size), size=size)
    rows = database.execute(
        'SELECT segment, start, "end", epoch, digest, time_ns, pages FROM checkpoints ORDER BY segment, start'
    )
    for segment, start, end, epoch, digest, time_ns, pages in rows:
        contents = found[segment]
        if start != contents.end or end <= start:
            raise ValueError(f"segment {segment}: a checkpoint from {start} to {end} behind {contents.end}")
        contents.entries.append(Entry(Position(epoch, digest), time_ns, segment, start, end, pages, start == 0))
    return found


class Index:
    """The writing side. What cannot be written now is written with what comes next; `warning` says so meanwhile.

    The log needs no sync: after a loss of power the index is behind or gone, and is made again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[tuple[str, tuple[object, ...]]] = []
        self._database: sqlite3.Connection | None = None
        self.warning: str | None = None

    def rebuild(self, contents: Iterable[Contents]) -> None:
        """Put these in the place of all that it said."""
        self.close()
        for path in (
            self._path,
            *(self._path.with_name(self._path.name + end) for end in ("-wal", "-shm", "-journal")),
        ):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                self.warning = f"{path}: {error.strerror}"
        self._waiting.clear()
        for one in contents:
            self._queue_segment(one)
            self._waiting += [(_INSERT, _row(entry)) for entry in one.entries]
        self.flush()

    def add(self, entry: Entry, new_segment: Contents | None = None) -> None:
        """A checkpoint has become durable; with the base of a segment, what there is to say of that."""
        if new_segment is not None:
            self._queue_segment(new_segment)
        self._waiting.append((_INSERT, _row(entry)))
        self.flush()

    def seal(self, segment: str, size: int) -> None:
        """A segment will not grow any more."""
        self._waiting.append(("UPDATE segments SET size = ? WHERE name = ?", (size, segment)))
        self.flush()

    def drop(self, segment: str) -> None:
        """A segment is about to go."""
        self._waiting.append(("DELETE FROM checkpoints WHERE segment = ?", (segment,)))
        self._waiting.append(("DELETE FROM segments WHERE name = ?", (segment,)))
        self.flush()

    def flush(self) -> None:
        """Write what waits."""
        try:
            if self._database is None:
                self._database = _open(self._path)
            if self._waiting:
                with self._database:
                    self._database.execute("BEGIN")
                    for statement, values in self._waiting:
                        self._database.execute(statement, values)
            self._waiting.clear()
            self.warning = None
        except (sqlite3.Error, OSError) as error:
            self.warning = f"{self._path} is behind: {error}"
            self.close()

    def close(self) -> None:
        """Close it."""
        if self._database is not None:
            try:
                self._database.close()
            except sqlite3.Error as error:
                self.warning = f"{self._path}: {error}"
            self._database = None

    def _queue_segment(self, one: Contents) -> None:
        if one.shape is not None:
            values = (one.name, one.size, one.shape.codec, one.shape.word, one.shape.p2m_size)
            self._waiting.append(("INSERT OR REPLACE INTO segments VALUES (?, ?, ?, ?, ?)", values))


def _row(entry: Entry) -> tuple[object, ...]:
    position = entry.position
    return (entry.segment, entry.start, entry.end, position.epoch, position.digest, entry.time_ns, entry.pages)


def _make_private(path: Path) -> None:
    """The database of mode 0600, and so the files beside it, which take its mode; where they are ours. Raises OSError.

    A database that is there is not opened here: closing it would end locks that SQLite has on it in this process.
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
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
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
