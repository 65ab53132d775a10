"""Segments in an object store, from which a history is rebuilt on any machine (specs/archive.md).

obstore (https://developmentseed.org/obstore) speaks to S3, Google Cloud Storage, Azure and directories; age
(https://age-encryption.org) encrypts.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from remus_ckpt.disk import (
    appearing,
    guarding,
    make_directory,
    open_to_read,
    remove_unfinished,
    sync_directory,
    sync_file,
    told,
    write_all,
)
from remus_ckpt.errors import NoCheckpoint, NothingToRestore, StoreError
from remus_ckpt.limits import Limits
from remus_ckpt.store.segments import DIRECTORY, Contents, Entry, scan, segment_name
from remus_ckpt.store.state import State, save_state
from remus_ckpt.wire.record import Position

_KEY = re.compile(r"(\d{20})-(\d{20})-(\d{8}T\d{6}Z|no-time)-([0-9a-f]{64})\.remus(\.age)?", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_TIME = "%Y%m%dT%H%M%SZ"
_1970 = datetime(1970, 1, 1, tzinfo=UTC)
_PIECE_BYTES = 8 << 20
"""Sent and received at a time."""
_MAX_SEGMENTS = 1_000_000


@dataclass(frozen=True, slots=True)
class Archived:
    """A segment in an archive, as its key names it.

    epochs: of its checkpoints; digest: that of the last one's position, in hexadecimal
    time: when the last one was taken, to the second; None if unknown
    bytes: of the object; stored: when it was put there, by the clock of the object store
    """

    epochs: range
    time: datetime | None
    digest: str
    is_encrypted: bool
    bytes: int = 0
    stored: datetime | None = None

    @property
    def key(self) -> str:
        """The key, without the name."""
        time = "no-time" if self.time is None else self.time.strftime(_TIME)
        suffix = ".age" if self.is_encrypted else ""
        return f"{self.epochs[0]:020}-{self.epochs[-1]:020}-{time}-{self.digest}.remus{suffix}"

    @property
    def identity(self) -> tuple[int, int, str]:
        """Two segments with the same identity hold the same checkpoints."""
        return self.epochs[0], self.epochs[-1], self.digest

    @classmethod
    def of(cls, contents: Contents, *, is_encrypted: bool = False) -> Archived:
        """The archived form of a segment with at least one checkpoint."""
        assert contents.last is not None
        time: datetime | None = None
        if contents.last.time_ns is not None:
            with suppress(ValueError, OverflowError, OSError):  # a time that no calendar has
                time = datetime.fromtimestamp(contents.last.time_ns // 10**9, UTC)
        return cls(contents.epochs, time, contents.last.position.digest.hex(), is_encrypted)

    @classmethod
    def parse(cls, key: str, size: int, stored: datetime | None) -> Archived | None:
        """What a key names; None if it is not one of ours."""
        if not (found := _KEY.fullmatch(key)):
            return None
        first, last, time, digest, suffix = found.groups()
        try:
            taken = None if time == "no-time" else datetime.strptime(time, _TIME).replace(tzinfo=UTC)
        except ValueError:
            return None
        if not int(first) <= int(last) < 1 << 63:
            return None
        return cls(range(int(first), int(last) + 1), taken, digest, bool(suffix), size, stored)

    def contents(self) -> Contents:
        """Its contents, for the retention rules."""
        time_ns = None if self.time is None else int(self.time.timestamp()) * 10**9
        first, last = (
            Entry(Position(epoch, bytes.fromhex(self.digest)), time_ns, self.key, 0, self.bytes, 0, False)
            for epoch in (self.epochs[0], self.epochs[-1])
        )
        return Contents(self.key, first, last, None, self.bytes)


class Archive:
    """An object store with segments under the names of their histories.

    url: s3://BUCKET/PREFIX, gs://…, az://…, or file:///DIRECTORY; credentials come from the environment, as the
        provider's own tools expect them (AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT, …)
    recipients: a file with age recipients ("age1…", one per line), for whom new segments are encrypted
    identity: a file with age identities ("AGE-SECRET-KEY-1…"), to read what is encrypted
    create: make a DIRECTORY that does not exist
    Raises StoreError, here and from every method.
    """

    def __init__(
        self, url: str, *, recipients: Path | None = None, identity: Path | None = None, create: bool = False
    ) -> None:
        try:
            import obstore
            import obstore.exceptions
            import obstore.store
        except ImportError:
            raise StoreError("an archive needs obstore: pip install 'remus_ckpt[archive]'") from None
        self.url = url
        self._obstore: Any = obstore
        self._failures: tuple[type[Exception], ...] = (obstore.exceptions.BaseError, OSError)
        self._directory: Path | None = None
        if url.startswith("file://"):
            self._directory = Path(url.removeprefix("file://"))
            if not self._directory.is_absolute():
                raise StoreError(f"{url}: write file:///DIRECTORY, with the whole path")
            with guarding(self._directory, "output"):
                if create:
                    make_directory(self._directory)
                elif not self._directory.is_dir():
                    raise StoreError(f"{url}: there is no such directory")
        with self._reaching("open"):
            try:
                self._store: Any = obstore.store.from_url(url)
            except ValueError as error:
                raise StoreError(f"{url}: {error}") from None
        self._recipients = None if recipients is None else _recipients(recipients)
        self._identities = None if identity is None else _identities(identity)

    @property
    def is_encrypted(self) -> bool:
        """Whether new segments are encrypted."""
        return self._recipients is not None

    def names(self) -> list[str]:
        """The names that have anything archived, ascending."""
        with self._reaching("list"):
            found = self._obstore.list_with_delimiter(self._store)["common_prefixes"]
        return sorted(name for one in found if _NAME.fullmatch(name := str(one).rstrip("/")))

    def segments(self, name: str) -> list[Archived]:
        """The segments of a name, in the order in which they were stored; all are durable."""
        _check(name)
        self._settle(name)
        found: list[Archived] = []
        with self._reaching("list"):
            for block in self._obstore.list(self._store, prefix=f"{name}/"):
                for one in block:
                    archived = Archived.parse(one["path"].rpartition("/")[2], one["size"], one["last_modified"])
                    if archived is not None:
                        found.append(archived)
                if len(found) > _MAX_SEGMENTS:
                    raise StoreError(f"{self.url}/{name}: it lists more than {_MAX_SEGMENTS:,} segments")
        return sorted(found, key=lambda one: (one.stored or datetime.min.replace(tzinfo=UTC), one.epochs[0]))

    def put(self, name: str, path: Path) -> Archived:
        """Store a closed segment, once all its bytes have been checked. Nothing appears under its key before it is
        complete. Raises NoCheckpoint if it has been pruned."""
        _check(name)
        try:
            contents = scan(path)
            descriptor = open_to_read(path)
        except FileNotFoundError:
            raise NoCheckpoint(f"{path} is gone: it has been pruned") from None
        except OSError as error:
            raise told(error, path) from error
        with open(descriptor, "rb") as plain:
            size = os.fstat(descriptor).st_size
            if contents.fault is not None or contents.last is None or contents.end != size:
                raise StoreError(
                    f"{path} is not archived: {contents.fault or 'its bytes do not end with a checkpoint'}"
                )
            archived = Archived.of(contents, is_encrypted=self.is_encrypted)
            key = f"{name}/{archived.key}"
            sealed = self._recipients is not None and _encrypted(plain, self._recipients)
            with self._reaching(f"put {key} into"), sealed or nullcontext(_pieces(plain)) as pieces:
                self._put(key, pieces)
        return archived

    def _put(self, key: str, pieces: Iterator[bytes]) -> None:
        if self._directory is None:  # an object store answers once it is durable
            self._obstore.put(self._store, key, pieces, chunk_size=_PIECE_BYTES)
            return
        path = self._directory / key
        with guarding(path, "output"):
            make_directory(path.parent)
            remove_unfinished(path)
            with appearing(path) as descriptor:
                for piece in pieces:
                    write_all(descriptor, [piece])

    def _settle(self, name: str) -> None:
        """In a directory: a writer may have died before the name of its file was durable."""
        if self._directory is not None and (folder := self._directory / name).is_dir():
            with guarding(folder):
                sync_directory(folder)

    def get(self, name: str, archived: Archived, path: Path, *, limits: Limits | None = None) -> Contents:
        """Fetch a segment into a new file, and check every byte.

        Raises StoreError, which names the object, if it is missing or does not hold what its key says.
        """
        key = f"{name}/{archived.key}"
        where = f"{self.url}/{key}"
        with self._reaching(f"get {key} from"):
            stream = self._obstore.get(self._store, key).stream(min_chunk_size=_PIECE_BYTES)
            with guarding(path, "output"), open(path, "xb") as plain:
                if not archived.is_encrypted:
                    for piece in _no_more(stream, archived.bytes, where):
                        plain.write(piece)
                elif self._identities is None:
                    raise StoreError(f"{where} is encrypted: give the age identity with --identity FILE")
                else:
                    _decrypt(_no_more(stream, archived.bytes, where), plain, self._identities, where)
                plain.flush()
                os.fsync(plain.fileno())
        with guarding(path, "output"):
            contents = scan(path, limits=limits)
            size = path.stat().st_size
        if contents.fault is not None:
            raise StoreError(f"{where} is damaged: {contents.fault}")
        if contents.last is None or contents.end != size:
            raise StoreError(f"{where} is damaged: it does not end with a checkpoint")
        if Archived.of(contents).identity != archived.identity:
            raise StoreError(f"{where} holds other checkpoints than its key says")
        return contents

    def remove(self, name: str, segments: Iterable[Archived]) -> None:
        """Remove segments."""
        with self._reaching("remove from"):
            for one in segments:
                self._obstore.delete(self._store, f"{_check(name)}/{one.key}")

    @contextmanager
    def _reaching(self, what: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise StoreError(f"{what} {self.url}: there is no such object ({_first_line(error)})") from error
        except self._failures as error:
            raise StoreError(f"{what} {self.url}: {_first_line(error)}{self._advice}") from error

    @property
    def _advice(self) -> str:
        """What to check if an object store cannot be reached."""
        scheme = self.url.partition("://")[0]
        if scheme == "file":
            return ""
        if scheme == "s3":
            return " (read from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT)"
        return " (write s3://, gs://, az:// or file:///; credentials are read from the environment)"


def fetch(
    archive: Archive,
    name: str,
    history: Path,
    *,
    at: int | datetime | None = None,
    progress: Callable[[int], None] = lambda size: None,
    limits: Limits | None = None,
) -> list[Contents]:
    """Rebuild a history from an archive: all of it, or only the segment that has one checkpoint.

    history: a directory that does not exist yet; it appears once everything is there. If a call was interrupted, the
        next one keeps what has arrived
    at: the epoch or time of the wanted checkpoint; None: everything
    progress: called with the bytes of each object that has arrived
    limits: what the streams may claim
    Returns what the segments hold, oldest first. Raises StoreError, NothingToRestore.
    """
    line = line_of(archive.segments(_check(name)))
    if not line:
        raise NothingToRestore(f"{archive.url}/{name}: nothing is archived under this name")
    wanted = line if at is None else _nearest_first(line, at, f"{archive.url}/{name}")
    making = history.with_name(f".{history.name}.fetching")  # a history is there as a whole, or not at all
    folder = making / DIRECTORY
    with guarding(history, "output"):
        if history.exists():
            raise StoreError(f"{history} exists already: choose another store, or move it away")
        make_directory(folder)
    found: list[Contents] = []
    for number, one in enumerate(wanted):
        path = folder / segment_name(one.epochs[0], number)
        contents = _fetch_one(archive, name, one, path, limits)
        progress(one.bytes)
        if at is None:
            found.append(contents)
        elif isinstance(at, int) or not _is_after(contents.first, at):
            found, line = [contents], [one]
            break
        else:
            path.unlink()
    if not found:
        raise NothingToRestore(f"{archive.url}/{name}: no checkpoint was taken by {at}")
    names = {one.name for one in found}
    with guarding(history, "output"):
        for other in folder.iterdir():
            if other.name not in names:  # of a fetch that wanted something else
                other.unlink()
        missing = [range(before.epochs.stop, after.epochs[0]) for before, after in pairwise(line)]
        save_state(making, State(name).with_pruned(filter(None, missing)))
        sync_directory(folder)
        os.rename(making, history)
        sync_directory(history.parent)
    return found


def _fetch_one(archive: Archive, name: str, one: Archived, path: Path, limits: Limits | None) -> Contents:
    """Fetch a segment, unless an earlier, interrupted fetch already did."""
    if path.exists():
        with guarding(path, "output"):
            found = scan(path, limits=limits)
            is_whole = found.fault is None and found.last and found.end == path.stat().st_size
            if is_whole and Archived.of(found).identity == one.identity:
                sync_file(path)
                return found
            path.unlink()
    return archive.get(name, one, path, limits=limits)


def line_of(segments: Iterable[Archived]) -> list[Archived]:
    """The segments that lead up to the one archived last, oldest first.

    Two backups may have archived under one name, before and after a failover: segments that the later one replaced are
    left out.
    """
    line: list[Archived] = []
    for one in reversed(list(segments)):
        if not line or (one.epochs[-1] <= line[-1].epochs[0] and one.epochs[0] < line[-1].epochs[0]):
            line.append(one)
    return line[::-1]


def _nearest_first(line: list[Archived], at: int | datetime, where: str) -> list[Archived]:
    """The segments that may have the checkpoint to restore, the most likely one first.

    For a time, the last checkpoint that was taken by then is in the first of them that does not begin after it: a key
    says when the last checkpoint was taken, to the second, and not when the first was.
    """
    if isinstance(at, int):
        # Of two segments that have it, the later begins with it.
        found = next((one for one in reversed(line) if at in one.epochs), None)
        if found is None:
            raise NothingToRestore(f"{where}: checkpoint {at} is not archived")
        return [found]
    timed = [one for one in line if one.time is not None]
    second = at.replace(microsecond=0)
    ahead = next((number for number, one in enumerate(timed) if one.time is not None and one.time > second), len(timed))
    return timed[: ahead + 1][::-1]


def _is_after(first: Entry | None, at: datetime) -> bool:
    """Whether a segment whose first checkpoint is this one begins after a time."""
    at_ns = (at - _1970) // timedelta(microseconds=1) * 1_000
    return first is not None and first.time_ns is not None and first.time_ns > at_ns


def _check(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise StoreError(f"{name!r:.80} is not a name for a history")
    return name


def _pieces(file: Any) -> Iterator[bytes]:
    while piece := file.read(_PIECE_BYTES):
        yield piece


def _no_more(stream: Iterable[Any], size: int, where: str) -> Iterator[bytes]:
    """The pieces of an object, up to its listed size."""
    for piece in stream:
        size -= len(piece)
        if size < 0:
            raise StoreError(f"{where} is longer than it was listed")
        yield bytes(piece)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


# Encryption


def _age() -> Any:
    try:
        import pyrage
    except ImportError:
        raise StoreError("encryption needs pyrage: pip install 'remus_ckpt[archive]'") from None
    return pyrage


def _lines(path: Path, prefix: str) -> list[str]:
    with guarding(path):
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found or not all(line.startswith(prefix) for line in found):
        raise StoreError(
            f"{path} is not such a file: each line must begin with {prefix!r} (age-keygen makes both kinds)"
        )
    return found


def _recipients(path: Path) -> list[Any]:
    age, lines = _age(), _lines(path, "age1")
    try:
        return [age.x25519.Recipient.from_str(line) for line in lines]
    except Exception as error:  # pyrage's errors share no base but this
        raise StoreError(f"{path}: {_first_line(error)}") from None


def _identities(path: Path) -> list[Any]:
    age, lines = _age(), _lines(path, "AGE-SECRET-KEY-1")
    try:
        return [age.x25519.Identity.from_str(line) for line in lines]
    except Exception:
        raise StoreError(f"{path}: not an age identity") from None


@contextmanager
def _encrypted(plain: Any, recipients: list[Any]) -> Iterator[Iterator[bytes]]:
    """A file encrypted by age, piece by piece."""
    reading, writing = os.pipe()
    faults: list[BaseException] = []

    def encrypt() -> None:
        with open(writing, "wb") as sink:
            try:
                _age().encrypt_io(plain, sink, recipients)
            except BaseException as error:
                faults.append(error)

    thread = threading.Thread(target=encrypt, name="encrypt", daemon=True)
    thread.start()

    def pieces() -> Iterator[bytes]:
        yield from _pieces(source)
        thread.join()
        if faults:  # raised here, so that the object does not appear
            raise StoreError(f"encrypt: {_first_line(faults[0])}")

    with open(reading, "rb") as source:
        yield pieces()
    thread.join()


def _decrypt(pieces: Iterator[bytes], plain: Any, identities: list[Any], where: str) -> None:
    with tempfile.TemporaryFile() as sealed:
        for piece in pieces:
            sealed.write(piece)
        sealed.seek(0)
        try:
            _age().decrypt_io(sealed, plain, identities)
        except Exception as error:
            raise StoreError(f"{where} cannot be decrypted: {_first_line(error)}") from None
