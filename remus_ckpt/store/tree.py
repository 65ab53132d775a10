"""A history as a tree of read-only files: every checkpoint's memory, and each array by its name.

    by-epoch/1200/memory          memory, as a file
    by-epoch/1200/device_state    the user's own bytes
    by-epoch/1200/arrays/NAME     what was protected under a name; "/" in it is %2F
    by-time/2026-01-31T12:00:05Z  a link to the last checkpoint taken by then; any time can be named
    newest                        a link to the newest checkpoint

Paths are tuples of names. Errors are FileNotFoundError and the like, as a file system reports them. Any thread may
call.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from remus_ckpt.errors import NoCheckpoint, RemusError, StreamError
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.source.manifest import Manifest
from remus_ckpt.store.history import History
from remus_ckpt.store.moment import Moment
from remus_ckpt.store.survey import Survey, joined
from remus_ckpt.wire.parts import Parts

Path = tuple[str, ...]

_BY_EPOCH, _BY_TIME, _NEWEST = "by-epoch", "by-time", "newest"
_MEMORY, _STATE, _ARRAYS = "memory", "device_state", "arrays"
_MAX_OPEN = 16
_SURVEY_S = 0.5
_1970 = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Node:
    """A file, directory or link. size: in bytes; time_ns: when its checkpoint was taken, None if unknown"""

    mode: int
    size: int = 0
    time_ns: int | None = None


@dataclass(frozen=True, slots=True)
class File:
    """A file: a range of memory, or bytes at hand."""

    moment: Moment
    size: int
    start: int = 0
    data: bytes | None = None

    def read(self, at: int, size: int) -> bytes:
        """Its bytes. Raises BadCheckpoint."""
        size = max(min(size, self.size - at), 0)
        return self.moment.read_bytes(self.start + at, size) if self.data is None else self.data[at : at + size]


class Tree:
    """The files of a history. As checkpoints come and go, so do their files."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._lock = threading.Lock()
        self._moments: OrderedDict[int, Moment] = OrderedDict()
        self._survey: tuple[float, Survey] | None = None

    def node(self, path: Path) -> Node:
        """What a path names. Raises OSError, RemusError."""
        match path:
            case () | ("by-epoch",) | ("by-time",):
                return Node(stat.S_IFDIR | 0o500)
            case ("newest",) | ("by-time", _):
                return Node(stat.S_IFLNK | 0o777, len(self.target(path)))
            case ("by-epoch", epoch) | ("by-epoch", epoch, "arrays"):
                number = _epoch(epoch)
                if not any(number in span for span in self._epochs()):
                    raise _missing()
                return Node(stat.S_IFDIR | 0o500)
        file = self.file(path)
        return Node(stat.S_IFREG | 0o400, file.size, file.moment.entry.time_ns)

    def names(self, path: Path) -> Iterator[str]:
        """The names in a directory."""
        match path:
            case ():
                yield from (_BY_EPOCH, _BY_TIME, _NEWEST)
            case ("by-epoch",):
                for span in self._epochs():
                    yield from map(str, span)
            case ("by-time",):
                yield from (_time_name(one.time_ns) for one in self._history.checkpoints() if one.time_ns is not None)
            case ("by-epoch", epoch):
                yield from (_MEMORY, _STATE)
                if self._manifest(self._moment(_epoch(epoch))) is not None:
                    yield _ARRAYS
            case ("by-epoch", epoch, "arrays"):
                manifest = self._manifest(self._moment(_epoch(epoch)))
                yield from (_quoted(entry.name) for entry in manifest.entries) if manifest else ()
            case _:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))

    def target(self, path: Path) -> str:
        """The target of a link."""
        match path:
            case ("newest",):
                newest = self._look().newest
                if newest is None:
                    raise _missing()
                return f"{_BY_EPOCH}/{newest.epoch}"
            case ("by-time", name):
                try:
                    at = datetime.fromisoformat(name).astimezone()
                    return f"../{_BY_EPOCH}/{self._history.find(at).epoch}"
                except (ValueError, OverflowError, NoCheckpoint):
                    raise _missing() from None
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def file(self, path: Path) -> File:
        """Open a file. Raises OSError, RemusError."""
        match path:
            case ("by-epoch", epoch, "memory"):
                moment = self._moment(_epoch(epoch))
                return File(moment, moment.memory_bytes)
            case ("by-epoch", epoch, "device_state"):
                moment = self._moment(_epoch(epoch))
                state = Parts.unpack(moment.device_state).device_state
                return File(moment, len(state), data=state)
            case ("by-epoch", epoch, "arrays", name):
                moment = self._moment(_epoch(epoch))
                manifest = self._manifest(moment)
                for entry in manifest.entries if manifest is not None else ():
                    if _quoted(entry.name) == name:
                        return File(moment, entry.nbytes, entry.page * PAGE_SIZE)
        raise _missing()

    def close(self) -> None:
        """Close all checkpoints."""
        with self._lock:
            while self._moments:
                self._moments.popitem()[1].close()

    def _look(self) -> Survey:
        with self._lock:
            if self._survey is None or time.monotonic() - self._survey[0] > _SURVEY_S:
                self._survey = time.monotonic(), self._history.survey()
            return self._survey[1]

    def _epochs(self) -> list[range]:
        return joined(one.epochs for one in self._look().contents)

    def _moment(self, epoch: int) -> Moment:
        with self._lock:
            if epoch in self._moments:
                self._moments.move_to_end(epoch)
                return self._moments[epoch]
            try:
                self._moments[epoch] = self._history.moment(epoch)
            except NoCheckpoint:
                raise _missing() from None
            while len(self._moments) > _MAX_OPEN:
                self._moments.popitem(last=False)  # open files of it keep it
            return self._moments[epoch]

    def _manifest(self, moment: Moment) -> Manifest | None:
        parts = Parts.unpack(moment.device_state)
        return None if parts.manifest is None else Manifest.unpack(parts.manifest, pages=moment.pages)


def _missing() -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def _epoch(name: str) -> int:
    if not name.isdecimal() or not name.isascii() or str(int(name)) != name:
        raise _missing()
    return int(name)


def _quoted(name: str) -> str:
    """A name in the form of a file name."""
    quoted = name.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return quoted.replace(".", "%2E") if quoted in {".", ".."} else quoted


def _time_name(time_ns: int) -> str:
    """A time at or after `time_ns`, by less than a microsecond."""
    try:
        return (_1970 + timedelta(microseconds=-(-time_ns // 1_000))).isoformat().replace("+00:00", "Z")
    except OverflowError:
        return "never"


def error_number(error: BaseException) -> int:
    """The errno that a file system reports for an error."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return errno.EIO if isinstance(error, StreamError | RemusError) else errno.EINVAL
