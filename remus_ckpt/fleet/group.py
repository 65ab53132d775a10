"""What the members of a fleet know about each other: leases, and where each name is (specs/fleet.md §6).

The brokers hold two buckets. A lease vanishes unless its writer renews it: it shows who is alive, and no safety rests
on it. A place stays, and only a writer that has read the previous one can replace it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any, TypeVar

from remus_ckpt.errors import LogError, Malformed, Overtaken
from remus_ckpt.fleet.jetstream import REPLICAS, Nats, servers_of, token_of
from remus_ckpt.fleet.placing import LEASE_S, Backup, Held, Place, Protected, pack, unpack
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.observe.log import log

_LEASES = "remus-leases"
_PLACES = "remus-places"
_HISTORY = 8
"""Places kept of each name: only the last counts, the others show what happened."""
_ASK_S = 5.0
"""How long the brokers get for an answer: usually longer than they need to replace a leader."""
_LAST_S = 1.0
"""The same for withdrawing a lease, which would end by itself too."""
_PAUSE_S = 0.2
_BATCH = 500
_PREFIX = "nats+"
"""A plain tls:// is the address of a backup."""

T = TypeVar("T")
_R = TypeVar("_R", Held, Backup, Place, Protected)


def is_fleet(address: str) -> bool:
    """Whether an address names brokers: nats://HOST[:PORT][,HOST…], or nats+tls://…"""
    return address.startswith(("nats://", f"{_PREFIX}tls://"))


def split_fleet(address: str) -> tuple[str, str | None]:
    """Split nats://HOSTS/NAME into the URL of the brokers and the name, None if there is none."""
    scheme, separator, rest = address.partition("://")
    hosts, _, name = rest.partition("/")
    return f"{scheme}{separator}{hosts}", name or None


def check_url(url: str, insecure: bool) -> None:
    """Check, before the first try, for faults that retries cannot fix. Raises LogError."""
    if find_spec("nats") is None:
        raise LogError("a fleet needs nats-py: pip install 'remus_ckpt[fleet]'")
    servers_of(url.removeprefix(_PREFIX), insecure)


def make_buckets(nats: Nats, replicas: int = REPLICAS) -> None:
    """Make the two buckets if they do not exist. Raises LogError."""
    from nats.js.api import KeyValueConfig, StorageType

    places = KeyValueConfig(
        _PLACES,
        description="remus_ckpt: where each name is",
        history=_HISTORY,
        storage=StorageType.FILE,
        replicas=replicas,
    )
    # Leases that are lost with all brokers are soon renewed, and renewals wait for no disk. But a broker that is alone
    # forgets, when it restarts, that there was a bucket in memory.
    leases = KeyValueConfig(
        _LEASES,
        description="remus_ckpt: who is alive",
        ttl=LEASE_S,
        history=1,
        storage=StorageType.MEMORY if replicas > 1 else StorageType.FILE,
        replicas=replicas,
    )
    try:
        for config in (leases, places):
            nats.run(nats.jetstream().create_key_value(config))
    except nats.failures as error:
        raise LogError(f"{nats}: the buckets of the fleet cannot be made: {error}") from None


class Fleet:
    """The fleet on these brokers. The connection is made on first use, and again if it is lost.

    url: nats://HOST[:PORT][,HOST[:PORT]…], or nats+tls://… with our certificate
    tls: our certificate, for nats+tls://
    insecure: allow nats:// to other machines
    Any thread may call any method; each raises LogError if the brokers do not answer within seconds, or after `close`.
    Raises LogError for a malformed URL, or without nats-py.
    """

    def __init__(self, url: str, *, tls: TlsFiles | None = None, insecure: bool = False) -> None:
        check_url(url, insecure)
        self.url = url
        self._tls = tls
        self._insecure = insecure
        self._lock = threading.Lock()  # guards the next two; held while a connection is made
        self._nats: Nats | None = None
        self._is_closed = False

    def __str__(self) -> str:
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    def close(self) -> None:
        """End the connection."""
        with self._lock:
            nats, self._nats, self._is_closed = self._nats, None, True
        if nats is not None:
            nats.close()

    # Leases

    def announce(self, record: Backup | Protected) -> None:
        """Announce this for another LEASE_S."""
        key = _key(record)
        self._ask("renew a lease", lambda js: _put(js, _LEASES, key, pack(record)))

    def withdraw(self, record: Backup | Protected) -> None:
        """Withdraw an announcement at once."""
        key = _key(record)
        self._ask("end a lease", lambda js: _delete(js, _LEASES, key), timeout_s=_LAST_S)

    def backup(self, id: str) -> Backup | None:
        """A backup, if it is alive."""
        found, _ = self._get(_LEASES, f"backup.{id}")
        return None if found is None else unpack(Backup, found)

    def backups(self) -> dict[str, Backup]:
        """The backups that are alive, by id."""
        return self._all(_LEASES, "backup.", Backup)

    def primaries(self) -> dict[str, Protected]:
        """The primaries that are alive, by name."""
        return {one.name: one for one in self._all(_LEASES, "primary.", Protected).values()}

    # Places

    def place(self, name: str) -> tuple[Place | None, int]:
        """Where a name is, None if nowhere yet, and the number of that record."""
        found, revision = self._get(_PLACES, f"name.{token_of(name)}")
        return (None if found is None else unpack(Place, found)), revision

    def places(self) -> dict[str, Place]:
        """Where all names are."""
        return {one.name: one for one in self._all(_PLACES, "name.", Place).values()}

    def put(self, place: Place, revision: int) -> int:
        """Replace the record with this number (0: there must be none); returns the new record's.

        Raises Overtaken if another writer was first; LogError if it is unknown whether this record was written.
        """
        key, data = f"name.{token_of(place.name)}", pack(place)

        async def update(js: Any) -> int:
            bucket = await js.key_value(_PLACES)
            return int(await bucket.update(key, data, last=revision))

        try:
            return self._ask("write where a name is", update, is_repeated=False)
        except LogError as error:
            # Refused, or written by a try whose answer was lost: the bucket says which.
            found, now = self._get(_PLACES, key)
            if found == data and now > revision:
                return now
            if now != revision:
                raise Overtaken(f"{place.name!r}: another has written first where it is") from None
            raise error from None

    def leaving(self) -> set[str]:
        """The ids of the backups that all names should leave."""
        return set(self._keys(_PLACES, "leaving."))

    def is_leaving(self, id: str) -> bool:
        """Whether all names should leave a backup."""
        return self._get(_PLACES, f"leaving.{id}")[0] is not None

    def set_leaving(self, id: str, leaves: bool) -> None:
        """Tell all names to leave a backup, or let it take names again."""
        key = f"leaving.{id}"
        self._ask("say that a backup is left", lambda js: (_put if leaves else _drop)(js, _PLACES, key, b"1"))

    def forget(self, name: str) -> None:
        """Forget where a name was; its checkpoints stay where they are."""
        self._ask("forget a name", lambda js: _delete(js, _PLACES, f"name.{token_of(name)}"))

    # The brokers

    def _get(self, bucket: str, key: str) -> tuple[bytes | None, int]:
        async def get(js: Any) -> tuple[bytes | None, int]:
            from nats.js.errors import KeyNotFoundError

            try:
                found = await (await js.key_value(bucket)).get(key)
            except KeyNotFoundError as error:
                return None, 0 if error.entry is None else int(error.entry.revision)  # one that was deleted has one
            return found.value or b"", int(found.revision)

        return self._ask("look something up", get)

    def _keys(self, bucket: str, prefix: str) -> dict[str, bytes]:
        async def list_all(js: Any) -> dict[str, bytes]:
            # Not `watch` of nats-py: in a cluster, it may say that it is done before anything has come.
            from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

            await js.key_value(bucket)  # raises what says that there is none
            start, stream = f"$KV.{bucket}.{prefix}", f"KV_{bucket}"
            config = ConsumerConfig(
                deliver_policy=DeliverPolicy.LAST_PER_SUBJECT,
                ack_policy=AckPolicy.NONE,
                inactive_threshold=_ASK_S,
                num_replicas=1,
                mem_storage=True,
            )
            reader = await js.pull_subscribe(f"{start}*", stream=stream, config=config)
            found: dict[str, bytes] = {}
            try:
                while pending := (await reader.consumer_info()).num_pending:
                    with suppress(TimeoutError):
                        for message in await reader.fetch(min(pending, _BATCH), timeout=_PAUSE_S * 5):
                            if not (message.headers or {}).get("KV-Operation"):
                                found[message.subject.removeprefix(start)] = message.data
            finally:
                await reader.unsubscribe()
                await js.delete_consumer(stream, (await reader.consumer_info()).name)
            return found

        return self._ask("list the fleet", list_all)

    def _all(self, bucket: str, prefix: str, kind: type[_R]) -> dict[str, _R]:
        found = {}
        for key, data in self._keys(bucket, prefix).items():
            try:
                found[key] = unpack(kind, data)
            except Malformed as error:  # one member's mistake must not hide the others
                log("record of the fleet ignored", level=logging.WARNING, key=f"{prefix}{key}", reason=str(error))
        return found

    def _ask(
        self,
        what: str,
        work: Callable[[Any], Coroutine[Any, Any, T]],
        *,
        is_repeated: bool = True,
        timeout_s: float = _ASK_S,
    ) -> T:
        """Make the brokers do something; if it may be repeated, retry until it is done or the time is over."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                with self._reaching(what) as nats:
                    return nats.run(work(nats.jetstream()), max(deadline - time.monotonic(), 0.5))
            except LogError:
                if not is_repeated or time.monotonic() >= deadline:
                    raise
            time.sleep(_PAUSE_S)

    @contextmanager
    def _reaching(self, what: str) -> Iterator[Nats]:
        with self._lock:
            if self._is_closed:
                raise LogError(f"{self}: cannot {what}: the connection has been closed")
            if self._nats is None:
                url = self.url.removeprefix(_PREFIX)
                self._nats = Nats(url, tls=self._tls, insecure=self._insecure, timeout_s=_ASK_S)
            nats = self._nats
        try:
            if not nats.is_connected:  # else a message would be kept, and sent at a time that nobody knows
                raise LogError(f"{self}: cannot {what}: no broker is connected")
            yield nats
        except nats.failures as error:
            from nats.js.errors import BucketNotFoundError

            why = str(error).removeprefix("nats: ") or type(error).__name__
            if isinstance(error, BucketNotFoundError):
                why = f"make the fleet first, with `remus-ckpt fleet init {self}`"
            raise LogError(f"{self}: cannot {what}: {why}") from None


def _key(record: Backup | Protected) -> str:
    return f"backup.{record.id}" if isinstance(record, Backup) else f"primary.{token_of(record.name)}"


async def _put(js: Any, bucket: str, key: str, data: bytes) -> None:
    await (await js.key_value(bucket)).put(key, data)


async def _delete(js: Any, bucket: str, key: str) -> None:
    await (await js.key_value(bucket)).delete(key)


async def _drop(js: Any, bucket: str, key: str, _: bytes) -> None:
    await _delete(js, bucket, key)
