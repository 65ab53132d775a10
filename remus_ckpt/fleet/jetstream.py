"""The commit log on NATS JetStream: one replicated stream, with a subject for each name (specs/fleet.md §2).

nats-py is asyncio: one loop, in its own thread, serves all connections of a process; callers block.

Source: NATS, "JetStream wire API reference" and "Publishing to streams" (Nats-Expected-Last-Subject-Sequence).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import threading
import time
import urllib.request
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import suppress
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.parse import urlsplit

from remus_ckpt.errors import LinkError, LogError, Overtaken
from remus_ckpt.fleet.engine import APPEND_S, MAX_RECORD_BYTES, Entry
from remus_ckpt.link.address import INSECURE_OPTION, Address, check_plain, resolve
from remus_ckpt.link.sockets import Late
from remus_ckpt.link.tls import TlsFiles

STREAM = "REMUS"
_SUBJECT = "remus.log."
_IDENTITY = "remus_ckpt.log"
_SYNCED = "remus_ckpt.sync"
PORT = 4222
REPLICAS = 3
KEPT = 1000
"""Records kept of each name: only the last is needed, the others show what happened."""
_TRY_S = 2.0
"""How long one try may take: a request can hang while a leader dies, and is then repeated."""
_PAUSE_S = 0.1
_ANSWER_BYTES = 1 << 20
T = TypeVar("T")


class _Loop:
    """The event loop of this process, in its own thread; a forked child makes a new one."""

    _guard = threading.Lock()
    _current: _Loop | None = None

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="nats", daemon=True).start()

    @classmethod
    def current(cls) -> _Loop:
        with cls._guard:
            if cls._current is None or cls._current._pid != os.getpid():
                cls._current = cls()
            return cls._current

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Run work in the loop and wait for it. Raises TimeoutError, and what the work raises."""
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, timeout_s), self._loop)
        try:
            return future.result(timeout_s + _TRY_S)
        except BaseException:
            future.cancel()
            raise


class Nats:
    """A connection to NATS servers, for callers that block. It reconnects by itself; any thread may call any method.

    url: nats://HOST[:PORT][,HOST[:PORT]…], or tls://… with our certificate; USER:PASSWORD@ may precede the first
        host
    tls: needed for tls://
    insecure: allow nats:// to other machines
    Raises LogError if no server answers, or nats-py is not installed.
    """

    def __init__(
        self, url: str, *, tls: TlsFiles | None = None, insecure: bool = False, timeout_s: float = APPEND_S
    ) -> None:
        try:
            import nats
            import nats.errors
            import nats.js.errors
        except ImportError:
            raise LogError("a commit log needs nats-py: pip install 'remus_ckpt[fleet]'") from None
        self.url = url
        servers, user, password = servers_of(url, insecure)
        is_tls = servers[0].startswith("tls:")
        if is_tls and tls is None:
            raise LogError(f"{url}: TLS needs a certificate: give --tls-dir, a folder made by `keys issue`")
        self.failures: tuple[type[Exception], ...] = (nats.errors.Error, TimeoutError, OSError, asyncio.TimeoutError)
        """What nats-py raises when a server does not do what is asked."""
        self._loop = _Loop.current()
        self._not_found = nats.js.errors.NotFoundError
        self.client: Any = None
        """The client of nats-py; to be used in the loop only, with `run`."""

        async def ignore(*_: Any) -> None:
            """Failures are raised by the calls that they affect."""

        async def connect() -> Any:
            return await nats.connect(
                servers,
                name="remus_ckpt",
                tls=tls.client_context() if is_tls and tls is not None else None,
                user=user,
                password=password,
                error_cb=ignore,
                connect_timeout=2,
                reconnect_time_wait=0.25,
                max_reconnect_attempts=-1,
                ping_interval=2,
                max_outstanding_pings=2,
            )

        logging.getLogger("nats.aio.client").setLevel(logging.CRITICAL)
        deadline = time.monotonic() + timeout_s
        try:
            self.client = self.run(connect(), max(deadline - time.monotonic(), _TRY_S))
        except self.failures as error:
            raise LogError(f"{self}: no broker answers: {_say(error)}") from None

    def __str__(self) -> str:
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now."""
        return self.client is not None and self.client.is_connected

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = APPEND_S) -> T:
        """Run work in the loop and wait for it. Raises what is in `failures`."""
        return self._loop.run(work, timeout_s)

    def jetstream(self) -> Any:
        """nats-py's JetStream context, for coroutines that `run` runs."""
        return self.client.jetstream(timeout=_TRY_S)

    def is_not_found(self, error: Exception) -> bool:
        """Whether an error says that there is no such thing."""
        return isinstance(error, self._not_found)

    def close(self) -> None:
        """End the connection."""
        if self.client is not None:
            with suppress(*self.failures):
                self.run(self.client.close(), _TRY_S)


def servers_of(url: str, insecure: bool = False) -> tuple[list[str], str | None, str | None]:
    """The servers of a URL, each as a URL of its own, the user and the password. Raises LogError."""
    scheme, separator, rest = url.removeprefix("nats+").partition("://")
    if scheme not in ("nats", "tls") or not separator:
        raise LogError(f"{url!r:.80} is not the address of a log: write nats://HOST[:PORT][,HOST…] or tls://…")
    who, _, hosts = rest.rpartition("@")
    user, _, password = who.partition(":")
    servers = []
    for host in hosts.rstrip("/").split(","):
        try:
            parts = urlsplit(f"//{host}")
            port = PORT if parts.port is None else parts.port
        except ValueError as error:
            raise LogError(f"{host!r:.80}: {error}") from None
        if not parts.hostname or parts.path or parts.query:
            raise LogError(f"{host!r:.80} is not the HOST[:PORT] of a log")
        address = Address("tls" if scheme == "tls" else "tcp", host=parts.hostname, port=port)
        if scheme == "nats" and not insecure:
            _check_plain(address)
        shown = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        servers.append(f"{scheme}://{shown}:{port}")
    return servers, user or None, password or None


def _check_plain(address: Address) -> None:
    """Raises LogError if bytes to that address could be read on the way."""
    try:
        for _, where in resolve(address, time.monotonic() + _TRY_S):
            check_plain(address, where, False, INSECURE_OPTION)
    except LinkError as error:
        raise LogError(str(error)) from None
    except (OSError, Late):
        return  # nothing can be sent there now; the connection says so


def _say(error: BaseException) -> str:
    return str(error).removeprefix("nats: ") or type(error).__name__


class JetStreamLog:
    """A `Log` on a stream made by `make_log`. Raises LogError if there is none, or if it keeps less than it must."""

    def __init__(self, nats: Nats) -> None:
        self.nats = nats
        try:
            info = nats.run(nats.jetstream().stream_info(STREAM))
        except nats.failures as error:
            if nats.is_not_found(error):
                text = f"{nats}: there is no commit log: make it with `remus-ckpt fleet init {nats}`"
                raise LogError(text) from None
            raise LogError(f"{nats}: the commit log does not answer: {_say(error)}") from None
        metadata = info.config.metadata or {}
        if _IDENTITY not in metadata:
            raise LogError(f"{nats}: the stream {STREAM} was not made by `remus-ckpt fleet init`")
        if metadata.get(_SYNCED) not in ("always", "vouched"):
            raise LogError(f"{nats}: nobody has checked that its servers sync each record: run `remus-ckpt fleet init`")
        self.identity: str = metadata[_IDENTITY]
        self.replicas: int = info.config.num_replicas or 1
        self.is_synced = metadata.get(_SYNCED) == "always"
        """Whether all servers were found to sync each record; otherwise a user has vouched for it."""

    def append(self, name: str, data: bytes, *, expected: int, key: str, timeout_s: float = APPEND_S) -> int:
        """See `Log.append`."""
        if len(data) > MAX_RECORD_BYTES:
            raise ValueError(f"a record of {len(data):,} bytes; it has at most {MAX_RECORD_BYTES:,}")
        headers = {
            "Nats-Msg-Id": key,
            "Nats-Expected-Stream": STREAM,
            "Nats-Expected-Last-Subject-Sequence": str(expected),
        }
        deadline = time.monotonic() + timeout_s
        why = "there is no connection"
        while (left_s := deadline - time.monotonic()) > 0:
            if self.nats.is_connected:  # else it would be kept, and sent at a time that nobody knows
                try:
                    js = self.nats.jetstream()
                    work = js.publish(_subject(name), data, timeout=min(_TRY_S, left_s), headers=headers)
                    sequence: int = self.nats.run(work, _TRY_S).seq
                    return sequence
                except self.nats.failures as error:
                    why = _say(error)
                # It may have been appended all the same: by a try whose answer was lost.
                try:
                    follower = self._get(
                        seq=expected + 1, subject=_subject(name), next=True, timeout_s=min(_TRY_S, left_s)
                    )
                except LogError as error:
                    why = str(error)
                else:
                    if follower is not None and follower.key == key:
                        return follower.sequence
                    if follower is not None:
                        raise Overtaken(f"{name!r}: record {follower.sequence} has come first behind {expected}")
            time.sleep(min(_PAUSE_S, max(deadline - time.monotonic(), 0.0)))
        raise LogError(f"{self.nats}: the log has not taken a record of {name!r} within {timeout_s:g} s: {why}")

    def last(self, name: str) -> Entry | None:
        """See `Log.last`. The stream's leader is asked: other servers may lag behind."""
        return self._get(subject=_subject(name))

    def read(self, name: str, after: int = 0) -> Iterator[Entry]:
        """See `Log.read`."""
        while (entry := self._get(seq=after + 1, subject=_subject(name), next=True)) is not None:
            yield entry
            after = entry.sequence

    def names(self) -> list[str]:
        """See `Log.names`."""
        try:
            work = self.nats.jetstream().stream_info(STREAM, subjects_filter=f"{_SUBJECT}*")
            found = self.nats.run(work).state.subjects or {}
        except self.nats.failures as error:
            raise LogError(f"{self.nats}: the log does not answer: {_say(error)}") from None
        return sorted(subject.removeprefix(_SUBJECT).replace("=", ".") for subject in found)

    def _get(self, *, timeout_s: float = APPEND_S, **which: Any) -> Entry | None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                found = self.nats.run(self.nats.jetstream().get_msg(STREAM, **which), _TRY_S)
            except self.nats.failures as error:
                if self.nats.is_not_found(error):
                    return None
                if time.monotonic() >= deadline:
                    raise LogError(f"{self.nats}: the log does not answer: {_say(error)}") from None
                time.sleep(_PAUSE_S)
                continue
            return Entry(found.seq, (found.headers or {}).get("Nats-Msg-Id", ""), found.data or b"")

    def close(self) -> None:
        """End the connection."""
        self.nats.close()


def _subject(name: str) -> str:
    return _SUBJECT + token_of(name)


def token_of(name: str) -> str:
    """A name as one token of a subject, or a key of a bucket: a dot would split it, and no name has an equals sign."""
    return name.replace(".", "=")


def make_log(nats: Nats, *, replicas: int = REPLICAS, monitors: Sequence[str] = (), vouched: bool = False) -> None:
    """Make the stream of the commit log; if it is there, check its servers again.

    monitors: http://HOST:PORT of the servers' monitoring, to check that they sync each record
    vouched: the user vouches that they do
    Raises LogError if a server does not sync each record, or if that is unknown.
    """
    from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig

    config = StreamConfig(
        name=STREAM,
        description="remus_ckpt: commits and takeovers",
        subjects=[f"{_SUBJECT}*"],
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        discard=DiscardPolicy.OLD,
        num_replicas=replicas,
        max_msgs_per_subject=KEPT,
        max_msg_size=MAX_RECORD_BYTES + 1024,
        duplicate_window=120,
        deny_delete=True,
        deny_purge=True,
    )
    synced = set() if vouched else _synced(monitors)
    js = nats.jetstream()
    try:
        try:
            info = nats.run(js.stream_info(STREAM))
            metadata = dict(info.config.metadata or {})
        except nats.failures as error:
            if not nats.is_not_found(error):
                raise
            metadata = {_IDENTITY: secrets.token_hex(16)}
            config.metadata = metadata | {_SYNCED: "unchecked"}
            info = nats.run(js.add_stream(config))
        cluster = info.cluster
        peers = {str(peer.name) for peer in cluster.replicas or ()} | {str(cluster.leader)} if cluster else {"server"}
        if not vouched and (unknown := sorted(peers - synced if cluster else peers if not synced else ())):
            raise LogError(
                f"it is not known whether these sync each record: {', '.join(unknown)}: give --monitor for every "
                "server, or --synced if you are sure"
            )
        config.metadata = {**metadata, _SYNCED: "vouched" if vouched else "always"}
        config.metadata.setdefault(_IDENTITY, secrets.token_hex(16))
        nats.run(js.update_stream(config))
    except nats.failures as error:
        raise LogError(f"{nats}: the commit log cannot be made: {_say(error)}") from None


def _synced(monitors: Sequence[str]) -> set[str]:
    """The names of the servers, each of which syncs what it has written before it answers. Raises LogError."""
    names = set()
    for url in monitors:
        try:
            with urllib.request.urlopen(f"{url.rstrip('/')}/varz", timeout=_TRY_S) as answer:
                found = json.loads(answer.read(_ANSWER_BYTES))
            name, config = found["server_name"], found["jetstream"].get("config", {})
        except (OSError, HTTPException, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LogError(f"{url}: its monitoring does not report on JetStream: {error}") from None
        if not config.get("sync_always"):
            raise LogError(
                f"{url}: {name} does not sync each record: a power failure could lose acknowledged commits. Set "
                "`sync_interval: always` in its jetstream block (NATS 2.10 or later)"
            )
        names.add(name)
    return names
