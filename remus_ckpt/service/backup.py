"""The backup: receives, checks, stores and acknowledges checkpoints, and takes over on request or when it must.

One thread accepts connections and watches the clock. Each connection runs in its own thread (`peer`), and so does each
command (`takeover`).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import msgpack

from remus_ckpt.disk import guarding, make_directory
from remus_ckpt.errors import LinkError, RemusError, StoreError
from remus_ckpt.flag import Flag
from remus_ckpt.fleet.group import Fleet
from remus_ckpt.fleet.member import Member, addresses_for
from remus_ckpt.forks import disown_in_forks
from remus_ckpt.limits import Limits
from remus_ckpt.link.address import Address
from remus_ckpt.link.listener import Listener
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.loop import StopSignal
from remus_ckpt.observe.log import log, recent
from remus_ckpt.observe.metrics import Metrics, Seen
from remus_ckpt.service.beside import Beside
from remus_ckpt.service.health import judge, overall
from remus_ckpt.service.names import Names
from remus_ckpt.service.peer import BEAT_S, Offer, Peer
from remus_ckpt.service.policy import Policy
from remus_ckpt.service.reader import Readers
from remus_ckpt.service.realtime import Realtime
from remus_ckpt.service.standby import Standby
from remus_ckpt.service.vms import Vms, run_directory
from remus_ckpt.session import frames
from remus_ckpt.store import Store, Survey
from remus_ckpt.store.archive import Archive
from remus_ckpt.store.compaction import COMPACT_BYTES, COMPACT_BYTES_FOR_TIERS
from remus_ckpt.version import __version__
from remus_ckpt.vm.disk_image import FOLDER

_TRUST_S = 1.0
"""How often the certificates of open sessions are looked up in the lists of revoked ones."""
_CLOSE_S = 10.0
"""Time for all sessions and stores to end; one that still hangs then is abandoned."""
_MOST_EVICTED = 8
"""Evicted peers whose threads have not ended yet."""
_ROOM_S = 10.0
"""How often names that receive nothing look whether enough of the disk is free."""
_LOCK = ".lock"
"""The lock file in the store; no name begins with a dot."""
_EVICTED_FIRST = (None, "reader", "control")
"""Whose connections make room for new ones, the oldest of each kind first: peers that have not said hello, readers,
control connections. A primary's never does."""
_BRIEF = ("role", "term", "epoch", "position", "connected", "peer", "silent_s", "trouble", "health")
"""The fields shown for a name when there are too many names to show everything."""
_BRIEF_CHARS = 160
"""Of each sentence then."""
MEMORY, DISK = "memory", "disk"
"""Where warm copies are, beside folders."""


class Backup:
    """Serves primaries, readers and control requests, and watches the clock, until it is stopped.

    store: where checkpoints are kept, or its directory
    listen: addresses such as "tls://0.0.0.0:7411"; `addresses` has them with the real port in place of port 0
    tls_dir: a folder made by `remus-ckpt keys issue`, for tls://
    insecure: allow plain tcp:// on an address that other machines can reach
    limits: what the streams of primaries may claim
    warm: where the warm copies are: "memory" (on disk while that has no room), "disk" (in the store), or a folder
    on_phase: called with ("receiving" … "applied", epoch) as a checkpoint comes along
    realtime: for the threads that receive checkpoints
    archive: where closed segments go too, such as "s3://BUCKET/PREFIX"; archive_recipients: a file with the age
        recipients for whom they are encrypted
    fleet: the brokers of the fleet that it belongs to, nats://HOST[:PORT][,HOST…]; primaries find it there
    advertise: where they reach it; none: at the addresses where it listens, by the name of this host

    `run` serves in the calling thread; a `with` statement serves in a separate thread.
    A forked child has no part in it: the child closes the locks and listeners it inherited, and may call only `close`
    and `stop`, which do nothing there.
    While the store of a name is not open, because it failed to open or takes more than a few seconds, primaries of that
    name are refused with the reason; the other names are served.
    Raises StoreError or LinkError if it cannot start.
    """

    def __init__(
        self,
        store: Store | str | Path,
        listen: Iterable[str | Address],
        *,
        tls_dir: str | Path | None = None,
        insecure: bool = False,
        policy: Policy | None = None,
        limits: Limits | None = None,
        warm: str | Path = MEMORY,
        metrics: Metrics | None = None,
        on_phase: Callable[[str, int], None] | None = None,
        realtime: Realtime | None = None,
        archive: str | None = None,
        archive_recipients: Path | None = None,
        fleet: str | None = None,
        advertise: Iterable[str] = (),
        stop: StopSignal | None = None,
    ) -> None:
        self.policy = policy or Policy()
        self.metrics = metrics or Metrics()
        self._report_phase = on_phase or (lambda name, epoch: None)
        self._store = store if isinstance(store, Store) else Store(Path(store).absolute())
        self._store.create()
        self._limits = limits or Limits()
        self._warm = warm
        self._vms: Vms | None = None
        if self.policy.run_vms:
            disks = self.policy.vm_disks or self._store.directory / FOLDER
            self._vms = Vms(run_directory(self._store.directory), self.policy.vm_map, disks, self.policy.reprotect)
        tls = self._tls = TlsFiles(tls_dir) if tls_dir is not None else None
        self._wake = Flag()  # set when something that affects a decision has changed
        self._names = Names(self._store, self.policy, self.metrics, self._make, self._wake.set)
        self._member: Member | None = None
        if fleet is not None:
            self._member = Member(
                Fleet(fleet, tls=tls, insecure=insecure),
                self._store.directory,
                self.policy.max_names,
                status=self._health_of_names,
                let_go=self._names.let_go,
                take_over=self.failover,
            )
        self._readers = Readers(self._store, self.policy, self._limits, self._names.newest_durable)
        self._offer = Offer(
            self.policy.lease_s,
            self._limits,
            self._report_phase,
            standby_of=self._names.lend,
            reader_for=self._readers.lend,
            note_refused=self._names.note_refused,
            answer=self._answer,
            realtime=realtime,
        )
        self._archive_lag: dict[str, dict[str, Any]] = {}  # by name; set by one thread, each value as a whole
        self._beside = self._processes(archive, archive_recipients)
        self._lock = threading.Lock()  # guards the next
        self._peers: list[Peer] = []
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._is_over = threading.Event()
        self._pid = os.getpid()
        with ExitStack() as stack:
            self._stop = stop or StopSignal()
            if stop is None:
                stack.callback(self._stop.close)
            stack.callback(self._wake.close)
            self._store_lock = -1
            disown_in_forks(self)
            stack.callback(self._unlock_store)
            self._lock_store()
            if self._warm not in (MEMORY, DISK):
                with guarding(self._warm):
                    make_directory(Path(self._warm))
            stack.callback(lambda: self._names.close(time.monotonic() + _CLOSE_S))
            self._names.open_all()
            self.metrics.watch_health(self._look)
            stack.callback(lambda: self.metrics.watch_health(None))
            self._listeners = [
                stack.enter_context(
                    Listener(
                        Address.parse(address) if isinstance(address, str) else address, tls=tls, insecure=insecure
                    )
                )
                for address in listen
            ]
            self._closing = stack.pop_all()
        self.addresses = [str(listener.address) for listener in self._listeners]
        if self._member is not None:
            self._member.start([*advertise] or addresses_for(self.addresses))
        self._start_making_room()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.run, name="backup", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stop(self) -> None:
        """End `run`, from any thread or a signal handler."""
        self._stop.set()

    def run(self, on_turn: Callable[[], None] | None = None) -> None:
        """Serve until stopped.

        on_turn: called at least every quarter of the lease, while all is well
        This thread never waits for a disk, and never more than a moment for a peer.
        """
        self._check_process()
        poll = select.poll()
        for fd in (self._stop.fileno(), self._wake.fileno(), *(listener.fileno() for listener in self._listeners)):
            poll.register(fd, select.POLLIN)
        period = self.policy.lease_s / 4
        beat = check = time.monotonic()
        while not self._stop.is_set:
            self._wake.clear()
            now = time.monotonic()
            if now >= beat:
                beat = now + period
                self._beat()
                for process in self._beside:
                    process.look()
                if on_turn is not None:
                    on_turn()
            if now >= check:
                check = now + _TRUST_S
                self._end_distrusted()
            due = min([beat, check, self._names.turn(now), *(standby.turn(now) for standby in self._names.standbys)])
            ready = {fd for fd, _ in poll.poll(max(int((due - time.monotonic()) * 1000) + 1, 0))}
            for listener in self._listeners:
                if listener.fileno() in ready:
                    self._receive_peer(listener)

    def close(self) -> None:
        """End all sessions and release the store, within seconds even if a disk hangs. Committed checkpoints stay.

        May be called again. In a forked child it does nothing: the backup belongs to the parent.
        """
        if self._is_closed or self._pid != os.getpid():
            return
        self._is_closed = True
        self._is_over.set()
        self._stop.set()
        deadline = time.monotonic() + _CLOSE_S
        for process in self._beside:
            process.close()
        if self._member is not None:
            self._member.close()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)
        for peer in self.living_peers():
            if time.monotonic() < deadline:
                peer.end("shutdown", "the backup is being stopped")
            else:
                peer.connection.close()
        for peer in self.living_peers():
            peer.thread.join(max(deadline - time.monotonic(), 0.0))
        self._closing.close()

    def failover(self, name: str, *, fence: bool = False) -> dict[str, Any]:
        """Promote by hand, at once; returns what the survivor continues from.

        fence: run the fencing command first
        Returns or raises within a minute. Raises NoCheckpoint if nothing is committed under that name, StoreError if
        its store cannot be opened, RemusError if the fencing fails.
        """
        self._check_process()
        return self._names.find(name).take_over(fence=fence)

    @property
    def directory(self) -> Path:
        """Of the store."""
        return self._store.directory

    def survey(self, name: str) -> Survey:
        """What is kept of a name, and durable. Raises StoreError."""
        return self._readers.survey_of(name)

    def status(self) -> dict[str, Any]:
        """The status of this backup, for users."""
        self._check_process()
        report: dict[str, Any] = {
            "program": f"remus_ckpt {__version__}",
            "lease_s": self.policy.lease_s,
            "automatic": self.policy.automatic,
            "certificate_expires": None,
            "names": {},
        }
        if self._tls is not None:
            with suppress(LinkError):  # the files are unusable, which the log says
                report["certificate_expires"] = self._tls.expires().timestamp()
        for name, found in sorted(self._health_of_names().items()):
            report["names"][name] = found | {"archive": self._archive_lag.get(name)}
        return report | {"health": overall(report, None, time.time()).status()}

    def _health_of_names(self) -> dict[str, dict[str, Any]]:
        """The status of each name, with its health."""
        now = time.time()
        return {
            name: found | {"health": judge(found, self.policy.lease_s, now).status()}
            for name, found in self._names.status().items()
        }

    def _look(self) -> dict[str, Seen]:
        """What the metrics show of each name."""
        now = time.time()
        seen = {}
        for name, found in self._names.status().items():
            health = judge(found, self.policy.lease_s, now)
            base = found["first_copy"]
            seen[name] = Seen(
                level=int(health.level),
                state=health.state,
                base_bytes=0 if base is None else base["received_bytes"],
                unarchived_bytes=self._archive_lag.get(name, {}).get("waiting_bytes"),
            )
        return seen

    def _start_making_room(self) -> None:
        """A name that receives nothing has to give way too, and needs no space ahead; a disk that hangs must not keep
        anybody waiting."""

        def make_room() -> None:
            while not self._is_over.wait(_ROOM_S):
                for standby in self._names.standbys:
                    standby.make_room()

        try:
            threading.Thread(target=make_room, name="room", daemon=True).start()
        except RuntimeError as error:  # no more threads are allowed: names that receive checkpoints still give way
            log("room is not made", level=logging.ERROR, reason=str(error))

    def _processes(self, archive: str | None, recipients: Path | None) -> list[Beside]:
        """What works beside this one on the store."""

        def is_needed() -> bool:
            return any(one.epoch is not None for one in self._names.standbys)

        def note(line: bytes) -> None:
            with suppress(ValueError, KeyError):
                lag = json.loads(line)
                before = self._archive_lag.get(name := lag.pop("name"), {}).get("error")
                if lag["error"] and lag["error"] != before:
                    log("checkpoints are not archived", level=logging.ERROR, name=name, reason=lag["error"])
                self._archive_lag[name] = lag

        directory = str(self._store.directory)
        found = [Beside(["-m", "remus_ckpt.store.indexer", directory], is_needed, "pages are not indexed")]
        if archive is not None:
            Archive(archive, recipients=recipients, create=True)  # what is wrong with it is said now
            command = ["-m", "remus_ckpt.store.archiver", directory, archive]
            more = [] if recipients is None else [str(recipients)]
            found.append(Beside(command + more, is_needed, "checkpoints are not archived", note))
        return found

    # Names

    def _make(self, name: str) -> Standby:
        writer = self._store.writer(
            name,
            limits=self._limits,
            warm_directory=None if self._warm in (MEMORY, DISK) else self._warm,
            warm_in_memory=self._warm == MEMORY,
            on_phase=self._report_phase,
            retention=self.policy.retention,
            compact_bytes=COMPACT_BYTES_FOR_TIERS if self.policy.retention.tiers else COMPACT_BYTES,
        )
        try:
            guest = None if self._vms is None else self._vms.of(name, self._wake.set)
            return Standby(name, writer, self.policy, self.metrics, self._wake.set, guest, self._member)
        except BaseException:
            writer.close()
            raise

    @property
    def _standbys(self) -> dict[str, Standby]:
        return self._names.open_ones

    # Connections

    def living_peers(self) -> list[Peer]:
        """The connections whose threads have not ended."""
        with self._lock:
            self._peers = [peer for peer in self._peers if peer.thread.is_alive()]
            return list(self._peers)

    # `run` has no variable for a peer or its connection: the last one would keep its buffers.

    def _beat(self) -> None:
        for peer in self.living_peers():
            peer.beat()

    def _end_distrusted(self) -> None:
        for peer in self.living_peers():
            if (fault := peer.connection.distrust()) is not None:
                log("certificate not trusted", level=logging.WARNING, peer=peer.connection.peer, reason=fault)
                peer.end("revoked", f"the certificate {peer.connection.certificate_name!r} {fault}")

    def _receive_peer(self, listener: Listener) -> None:
        if (connection := listener.accept()) is None:
            return
        peers = self.living_peers()
        if len(peers) >= self.policy.max_connections:
            staying = [peer for peer in peers if not peer.is_evicted]
            evictable = [peer for peer in staying if peer.role in _EVICTED_FIRST]
            least = min(evictable, key=lambda peer: _EVICTED_FIRST.index(peer.role), default=None)
            if least is None or len(peers) - len(staying) > _MOST_EVICTED:
                log("too many connections", level=logging.WARNING, peer=connection.peer)
                connection.close()
                return
            least.is_evicted = True
            least.connection.close()
            least.thread.join(BEAT_S)
        peer = Peer(self._offer, connection)
        try:
            peer.thread.start()
        except RuntimeError as error:  # no more threads are allowed
            log("too many connections", level=logging.ERROR, peer=connection.peer, reason=str(error))
            connection.close()
            return
        with self._lock:
            self._peers.append(peer)

    def _answer(self, method: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
        match method:
            case "status":
                return _shortened(self.status())
            case "events":
                return {"events": recent(str(arguments.get("name")))}
            case "failover":
                return self.failover(str(arguments.get("name")), fence=bool(arguments.get("fence")))
            case _ if method.startswith("disk-") and self._vms is None:
                raise RemusError("this backup runs no guests, and keeps no disks: start it with --run-vms")
            case _ if method.startswith("disk-") and self._vms is not None:
                return self._vms.images(str(arguments.get("name"))).answer(method, arguments)
        return None

    # What only one process may have

    def _lock_store(self) -> None:
        """Keep other backups out, so that no two create the same new name. Raises StoreError."""
        path = self._store.directory / _LOCK
        try:
            fd = self._store_lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise StoreError(f"{self._store.directory} is served by another backup: stop that one first") from None
            raise StoreError(f"{path}: {error.strerror}") from error

    def _unlock_store(self) -> None:
        fd, self._store_lock = self._store_lock, -1  # a child forked meanwhile must not close a reused number
        if fd >= 0:
            os.close(fd)

    def disown(self) -> None:
        """In a forked child: release the parent's store. Listeners, histories and commands release themselves."""
        self._unlock_store()

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise ValueError(f"this backup is run by process {self._pid}, not by its fork {os.getpid()}")


def _shortened(status: dict[str, Any]) -> dict[str, Any]:
    """Shorten a status so that it fits into one reply, however many primaries there are and whatever they report."""
    room = frames.REQUEST_BYTES // 2
    names = status["names"]
    sizes = {name: len(msgpack.packb(found["primary"])) for name, found in names.items()}
    if sum(sizes.values()) > room:
        fair = room // len(names)
        names = {name: found | ({"primary": {}} if sizes[name] > fair else {}) for name, found in names.items()}
    if len(msgpack.packb(names)) > room + room // 2:
        names = {name: _brief(found) for name, found in names.items()}
    return status | {"names": names}


def _brief(found: dict[str, Any]) -> dict[str, Any]:
    health = found["health"] | {"words": found["health"]["words"][:_BRIEF_CHARS]}
    trouble = found["trouble"] and found["trouble"][:_BRIEF_CHARS]
    return {key: found[key] for key in _BRIEF} | {"health": health, "trouble": trouble, "warnings": [], "primary": {}}
