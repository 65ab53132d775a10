"""One run: what is done is drawn from its seed, the truth is held here, and all is checked when it is over."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from killtest.children import (
    CLEAN,
    FENCED,
    MEMORY_BYTES,
    PRIMARY_PHASES,
    Child,
    Nursery,
    die_with_parent,
    marked,
    state_of,
)
from killtest.proxy import Direction, Proxy
from remus_ckpt.demo.ledger import BYTES, Ledger
from remus_ckpt.link.address import Address
from remus_ckpt.link.control import ask
from remus_ckpt.link.dial import connect
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.restorer import Restorer
from remus_ckpt.service import keys
from remus_ckpt.store import History, Store
from remus_ckpt.store.segments import reader_of, replay

NAME = "ledger"
TARGETS = (
    *("capture", "paused", "encode", "send", "sent"),
    *("opening", "receiving", "staged", "stored", "acknowledged", "applying", "compaction", "pruning"),
)
"""Phases that a kill can be aimed at."""
KINDS = (
    *("kill primary", "kill backup", "kill both", "freeze primary", "freeze backup"),
    *("drop", "delay", "truncate", "flip", "black hole"),
)
ENDINGS = ("killed", "failover", "restart", "fence", "stop")
_PATIENCE_S = 90.0
"""Longer than a primary waits for its welcome, 30 s, and what follows takes on a machine with much else to do."""
_AIM_S = 5.0
_FLIP_S = 5.0
_DEATH_S = 1.0
_CHUNK_BYTES = 1 << 20
_HARMLESS_ERRORS = frozenset({"busy", "fenced", "timeout", "shutdown"})
_FLIP_ERRORS = frozenset({"malformed", "stream", "limit"})


@dataclass(slots=True)
class Kill:
    """A process that was killed, and where it was: its own phase, and whether a segment was half written."""

    side: str
    phase: str
    is_aimed: bool
    in_compaction: bool = False
    in_first_copy: bool = False


@dataclass(slots=True)
class Result:
    """What a run came to."""

    seed: int
    number: int
    aim: str
    ending: str = ""
    faults: list[str] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    checkpoints: int = 0
    commits: int = 0
    checked: int = 0
    continued: int = 0
    full: int = 0
    flips_found: int = 0
    flips_apart: int = 0
    seconds: float = 0.0
    directory: str = ""


class Truth:
    """What the harness saw itself: the hash of memory in each pause, and what was reported committed, and when."""

    def __init__(self, memory: Path, worker: Child) -> None:
        self.hashes: dict[str, str] = {}
        """By the token that went along with the checkpoint as its device state."""
        self.commits: list[tuple[float, int, str]] = []
        """(when, epoch, digest), as reported"""
        self.sent: dict[str, str] = {}
        """digest → token, where the primary lived long enough to say so"""
        self.newest_pause = -1
        self.faults: list[str] = []
        self._memory = memory
        self._worker = worker
        self._changed = threading.Condition()

    def watch(self, primary: Child) -> threading.Thread:
        """Answer one primary until it is gone."""
        thread = threading.Thread(target=self._watch, args=(primary,), daemon=True)
        thread.start()
        return thread

    def await_commit(self, behind: int, timeout_s: float) -> bool:
        """Whether an epoch behind that one is reported as committed in that time."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self.commits) and self.commits[-1][1] > behind, timeout_s)

    @property
    def newest_commit(self) -> int:
        """−1 before the first."""
        return self.commits[-1][1] if self.commits else -1

    def _watch(self, primary: Child) -> None:
        while True:
            try:
                data = primary.channel.recv(1 << 16)
            except OSError:
                return
            if not data:
                return
            now = time.monotonic()
            fields = json.loads(data)
            if "paused" in fields:
                self._look(primary, fields["paused"], fields["token"])
                with suppress(OSError):
                    primary.channel.send(b".")
            elif "commit" in fields:
                with self._changed:
                    if self.commits and fields["commit"] <= self.commits[-1][1]:
                        self.faults.append(f"commit of epoch {fields['commit']} behind that of {self.commits[-1][1]}")
                    self.commits.append((now, fields["commit"], fields["digest"]))
                    self._changed.notify_all()
            else:
                self.sent[fields["digest"]] = fields["token"]

    def _look(self, primary: Child, epoch: int, token: str) -> None:
        before = state_of(self._worker.pid)
        digest = hash_file(self._memory)
        after = state_of(self._worker.pid)
        # When the primary dies meanwhile its guard lets the worker run on; what was hashed is then sent by nobody.
        # (Its sockets are closed a little before it counts as dead.)
        if (before, after) != ("T", "T") and not primary.wait(_DEATH_S):
            self.faults.append(f"in the pause of epoch {epoch} the worker was in state {before}, then {after}")
        with self._changed:
            self.hashes[token] = digest
            self.newest_pause = epoch


def hash_file(path: Path) -> str:
    """SHA-256 of a file, without filling its holes."""
    digest = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY)
    try:
        at = 0
        while data := os.pread(fd, _CHUNK_BYTES, at):
            digest.update(data)
            at += len(data)
    finally:
        os.close(fd)
    return digest.hexdigest()


class Failure(Exception):
    """A run cannot go on, and this is why."""


class Run:
    """One run.

    aim: a phase of `TARGETS` that the first kill is aimed at; "" for none
    tls: over TLS, with keys of its own
    """

    def __init__(
        self, nursery: Nursery, seed: int, number: int, aim: str, directory: Path | None, *, tls: bool = False
    ) -> None:
        self._draw = draw = random.Random(f"{seed} {number} {aim}")
        self._nursery = nursery
        self._aim = aim
        self.result = Result(seed, number, aim)
        self.directory = Path(tempfile.mkdtemp(prefix=f"remus-kill-{number}-", dir=directory))
        shared = Path("/dev/shm") if os.path.isdir("/dev/shm") else self.directory
        self._shared = Path(tempfile.mkdtemp(prefix="remus-kill-", dir=shared))
        self._memory = self._shared / "memory"
        self._store = self.directory / "store"
        self._keys = self.directory / "keys" if tls else None
        if self._keys is not None:
            keys.init(self._keys)
            for name in ("primary", "backup"):
                keys.issue(self._keys, name, hosts=["127.0.0.1"])
        self._mark = self.directory.name
        self._lease_s = draw.uniform(0.3, 0.6)
        self._retain = draw.choice([None, 8, 30]) if aim != "pruning" else 8
        self._warm = draw.choice(["memory", "disk", str(self._shared / "warm")])
        self._options: dict[str, Any] = {
            "codec": draw.choice(["delta", "delta", "rle"]),
            "interval_s": draw.choice([0.0, 0.002, 0.005, 0.02]),
            "window": draw.randrange(1, 4),
            "wait": draw.choice(["durable", "durable", "applied"]),
            "compression": draw.choice(["none", "auto", "lz4"]),
        }
        self._is_hasty = draw.random() < 0.3
        """Whether it does the next thing before all goes on again after the last."""
        self._compact_checkpoints = draw.choice([5, 12, 40]) if aim not in ("compaction", "pruning") else 5
        self._children: list[Child] = []
        self._watchers: list[threading.Thread] = []
        self._primary: Child | None = None
        self._backup: Child | None = None
        self._worker: Child
        self._truth: Truth
        # Draws of its own: its threads take theirs whenever they come to it, and the plan must not hang on that.
        self._proxy = Proxy(self._options["wait"], random.Random(f"{seed} {number} proxy"), is_blind=tls)

    def play(self) -> Result:
        """All of it, from the first process to the last look at what is left."""
        begin = time.monotonic()
        result = self.result
        try:
            self._play()
        except Failure as error:
            self._fail(str(error))
        except Exception:
            self._fail(traceback.format_exc())
        try:
            self._clear()
            self._check()
        except Exception:
            self._fail(traceback.format_exc())
        finally:
            for child in self._children:
                child.close()
        result.seconds = round(time.monotonic() - begin, 3)
        if result.failures:
            result.directory = str(self.directory)
            shutil.copytree(self._shared, self.directory / "shared", dirs_exist_ok=True)
            (self.directory / "failures.txt").write_text("\n".join(result.failures) + "\n")
        else:
            shutil.rmtree(self.directory)
        shutil.rmtree(self._shared)
        return result

    def _fail(self, text: str) -> None:
        self.result.failures.append(text)

    # Processes

    def _start(self, kind: str, **args: Any) -> Child:
        child = Child(
            self._nursery, kind, {"mark": self._mark, **args}, self.directory / f"{kind}-{len(self._children)}.log"
        )
        self._children.append(child)
        return child

    def _tls_dir(self, name: str) -> str | None:
        return str(self._keys / name) if self._keys is not None else None

    def _start_worker(self) -> None:
        seed = self._draw.getrandbits(32)
        image = bytearray(BYTES)
        Ledger(image).create(seed)
        with open(self._memory, "wb") as file:
            file.write(image[:4096])  # the rest is a hole until it is used
            file.truncate(MEMORY_BYTES)
        self._worker = self._start("worker", memory=str(self._memory), seed=seed)
        self._worker.channel.settimeout(_PATIENCE_S)
        if self._worker.channel.recv(16) != b"ready":
            raise Failure("the worker did not start")
        self._truth = Truth(self._memory, self._worker)

    def _start_backup(self, *, wait: bool = True) -> None:
        self._backup = self._start(
            "backup",
            store=str(self._store),
            warm=self._warm,
            lease_s=self._lease_s,
            retain=self._retain,
            compact_checkpoints=self._compact_checkpoints,
            tls_dir=self._tls_dir("backup"),
        )
        if wait:
            self._await_backup()

    def _await_backup(self) -> None:
        assert self._backup is not None
        self._backup.channel.settimeout(_PATIENCE_S)
        address = self._backup.channel.recv(256).decode()
        if not address:
            raise Failure("the backup did not start")
        self._proxy.target = Address.parse(address).port

    def _start_primary(self) -> None:
        if not self._is_hasty:
            self._await_running()
        self._primary = self._start(
            "primary",
            memory=str(self._memory),
            worker=self._worker.pid,
            to=f"{'tls' if self._keys else 'tcp'}://127.0.0.1:{self._proxy.port}",
            tls_dir=self._tls_dir("primary"),
            name=NAME,
            **self._options,
        )
        self._watchers.append(self._truth.watch(self._primary))

    def _await_running(self) -> None:
        """A primary that was killed in a pause has a guard, which lets the worker run on."""
        deadline = time.monotonic() + _PATIENCE_S
        while state_of(self._worker.pid) in ("T", "t"):
            if time.monotonic() > deadline:
                self._worker.signal(signal.SIGCONT)
                raise Failure("the worker was left stopped")
            time.sleep(0.001)

    def _kill(self, *children: Child, is_aimed: bool = False) -> None:
        """SIGKILL, and a look at where each was."""
        for child in children:
            child.signal(signal.SIGKILL)
        for child in children:
            if not child.wait(_PATIENCE_S):
                raise Failure(f"the {child.kind} does not die")
            if child.board.status:
                raise Failure(f"the {child.kind} had ended by itself, with status {child.board.status}")
            kill = Kill(child.kind, child.board.phase, is_aimed)
            if child.kind == "backup":
                left = [path.name for path in self._store.glob(f"{NAME}/segments/*.partial")]
                kill.in_compaction = any(name.startswith("compacted") for name in left)
                kill.in_first_copy = any(name.startswith("incoming") for name in left)
            self.result.kills.append(kill)
        if self._primary in children:
            self._watchers[-1].join(_PATIENCE_S)
            self._primary = None
        if self._backup in children:
            self._backup = None

    def _aimed_kill(self, phase: str, *, also: Child | None) -> None:
        """Kill the one that has this phase, in it."""
        draw = self._draw
        if phase == "opening":
            assert self._backup is not None
            self._kill(self._backup)
            self._start_backup(wait=False)
        target = self._primary if phase in PRIMARY_PHASES else self._backup
        assert target is not None
        # Some phases last but microseconds: mostly it is asked to dwell there a little.
        dwell_s = draw.choice([0.0, *(draw.uniform(0.001, 0.02) for _ in range(3))])
        target.board.wish(None if phase == "compaction" else phase, dwell_s)
        deadline = time.monotonic() + _AIM_S
        while time.monotonic() < deadline:
            if target.board.compacting if phase == "compaction" else target.board.phase == phase:
                break
            time.sleep(0.0 if phase == "compaction" else 2e-5)
        if phase in ("compaction", "opening"):
            dwell_s = 0.005  # these last
        time.sleep(draw.uniform(0.0, 0.7 * dwell_s))
        self._kill(target, *([also] if also is not None else []), is_aimed=True)

    # The plan

    def _play(self) -> None:
        draw = self._draw
        self._start_worker()
        self._start_backup()
        self._start_primary()
        kinds = [
            draw.choice(KINDS) for _ in range(draw.choice([0, 1, 1, 2]) if self._aim else draw.choice([1, 1, 2, 3]))
        ]
        if self._aim:
            if self._aim not in ("capture", "paused", "encode", "send", "receiving", "staged"):
                self._await(0)
            if draw.random() < 0.7:
                self._await(draw.randrange(12))
            self._inject_aimed()
            self._recover()
        for kind in kinds:
            if not self._is_hasty:
                self._await(self._truth.newest_commit)
            time.sleep(draw.uniform(0.0, 0.15))
            self.result.faults.append(kind)
            self._inject(kind)
            self._recover()
        self.result.ending = draw.choice(ENDINGS)
        if not self._is_hasty or self.result.ending != "killed":
            self._await(self._truth.newest_commit)
        self._end(self.result.ending)

    def _await(self, epoch: int) -> None:
        """Until an epoch behind that one is committed."""
        if not self._truth.await_commit(epoch, _PATIENCE_S):
            raise Failure(f"{_PATIENCE_S:g} s without a commit behind epoch {epoch}: {self._say_states()}")

    def _say_states(self) -> str:
        said = [
            f"{child.kind} {child.pid} {state_of(child.pid)} in {child.board.phase}, status {child.board.status}"
            for child in (self._primary, self._backup)
            if child is not None
        ]
        return "; ".join(said)

    def _inject_aimed(self) -> None:
        is_primary = self._aim in PRIMARY_PHASES
        both = self._aim != "opening" and self._draw.random() < 0.25
        self.result.faults.append("kill both" if both else f"kill {'primary' if is_primary else 'backup'}")
        other = self._backup if is_primary else self._primary
        self._aimed_kill(self._aim, also=other if both else None)

    def _inject(self, kind: str) -> None:
        draw, proxy = self._draw, self._proxy
        assert self._primary is not None and self._backup is not None
        direction: Direction = draw.choice(["up", "down"])
        match kind:
            case "kill primary":
                self._kill(self._primary)
            case "kill backup":
                self._kill(self._backup)
            case "kill both":
                self._kill(*draw.sample([self._primary, self._backup], 2))
            case "freeze primary" | "freeze backup":
                child = self._primary if kind == "freeze primary" else self._backup
                child.signal(signal.SIGSTOP)
                time.sleep(self._lease_s * draw.uniform(1.1, 2.5))
                child.signal(signal.SIGCONT)
            case "drop":
                proxy.drop(reset=draw.random() < 0.5)
            case "delay":
                proxy.delay(draw.uniform(0.001, 0.05), draw.uniform(0.1, 0.5))
            case "truncate":
                proxy.arm(direction, "truncate")
                self._await_armed(direction)
            case "flip":
                self._flip(direction)
            case "black hole":
                proxy.swallow()

    def _await_armed(self, direction: Direction) -> bool:
        """Whether a piece went this way."""
        deadline = time.monotonic() + _AIM_S
        while self._proxy.is_armed(direction):
            if time.monotonic() > deadline:
                return not self._proxy.disarm(direction)
            time.sleep(0.001)
        return True

    def _flip(self, direction: Direction) -> None:
        before = len(self._proxy.flips)
        self._proxy.arm(direction, "flip", heartbeat=self._draw.random() < 0.3)
        self._await_armed(direction)
        deadline = time.monotonic() + _FLIP_S
        for flip in self._proxy.flips[before:]:
            while not flip.pair.ended_by and time.monotonic() < deadline:
                time.sleep(0.001)
            receiver = "server" if direction == "up" else "client"
            if flip.pair.ended_by == receiver:
                self.result.flips_found += 1
            elif flip.pair.ended_by:
                self.result.flips_apart += 1
            else:
                raise Failure(f"a bit that was flipped on its way {direction} was not noticed in {_FLIP_S:g} s")

    def _recover(self) -> None:
        """Start again what is dead, in any order; all must go on then."""
        newest = self._truth.newest_pause
        starts: list[Callable[[], None]] = []
        if self._backup is None:
            starts.append(self._start_backup)
        if self._primary is None:
            starts.append(self._start_primary)
        self._draw.shuffle(starts)
        for start in starts:
            if self._draw.random() < 0.3:
                time.sleep(self._draw.uniform(0.0, 0.3))
            start()
        if not self._is_hasty:
            self._await(newest)

    def _end(self, ending: str) -> None:
        assert self._primary is not None and self._backup is not None
        draw = self._draw
        match ending:
            case "killed":
                self._kill(*draw.sample([self._primary, self._backup], 2))
            case "failover":
                self._kill(self._primary)
                self._check_takeover()
            case "restart":
                self._kill(*draw.sample([self._primary, self._backup], 2))
                self._start_backup()
                self._check_takeover()
            case "fence":
                primary = self._primary
                is_frozen = draw.random() < 0.5
                if is_frozen:
                    primary.signal(signal.SIGSTOP)
                    time.sleep(draw.choice([0.0, 1.5]) * self._lease_s)
                if draw.random() < 0.5:
                    self._proxy.drop(reset=False)  # so that it hears of the takeover when it comes back
                epoch = self._check_takeover()
                if is_frozen:
                    primary.signal(signal.SIGCONT)
                self._await_fenced(primary)
                if draw.random() < 0.5:
                    self._start_primary()  # one that knows of no term
                    self._await_fenced(self._primary)
                if self._truth.newest_commit > epoch:
                    self._fail(f"{self._truth.newest_commit} was reported as committed, and {epoch} was taken over")
            case "stop":
                self._stop(self._primary)
                self._watchers[-1].join(_PATIENCE_S)
                if self._truth.newest_commit < self._truth.newest_pause:
                    self._fail(f"stopped at {self._truth.newest_pause}, committed is {self._truth.newest_commit}")
                self._stop(self._backup)

    def _await_fenced(self, primary: Child) -> None:
        if not primary.wait(_PATIENCE_S):
            raise Failure(f"a primary goes on after the takeover: {self._say_states()}")
        self._watchers[-1].join(_PATIENCE_S)
        if primary.board.status != FENCED:
            self._fail(f"a primary ended after the takeover with status {primary.board.status}, and was not fenced")

    def _stop(self, child: Child) -> None:
        child.signal(signal.SIGTERM)
        if not child.wait(_PATIENCE_S):
            raise Failure(f"the {child.kind} does not stop: {self._say_states()}")
        if child.board.status != CLEAN:
            self._fail(f"the {child.kind} was stopped and ended with status {child.board.status}")

    # Checks

    def _check_takeover(self) -> int:
        """Promote the backup by hand, as a user does, and look at what it hands out; returns its epoch."""
        committed = self._truth.newest_commit
        tls_dir = self._tls_dir("primary")
        address = Address("tls" if tls_dir else "tcp", "127.0.0.1", self._proxy.target)
        tls = TlsFiles(tls_dir) if tls_dir else None
        given = ask(connect(address, tls=tls), "failover", {"name": NAME}, timeout_s=_PATIENCE_S)
        token = Path(given["device_state"]).read_bytes().hex()
        where = f"taken over at epoch {given['epoch']}"
        if given["epoch"] < committed:
            self._fail(f"{where}, and {committed} had been reported as committed")
        if hash_file(Path(given["image"])) != self._truth.hashes.get(token):
            self._fail(f"{where}: the image is not what was in memory in that pause")
        self._check_ledger(bytearray(Path(given["image"]).read_bytes()), where)
        return int(given["epoch"])

    def _clear(self) -> None:
        """Kill what lives, and see that nothing is left."""
        for child in (self._primary, self._backup):
            if child is not None and child.is_alive:
                child.signal(signal.SIGKILL)
                child.wait(_PATIENCE_S)
        for watcher in self._watchers:
            watcher.join(_PATIENCE_S)
        self._proxy.close()
        if hasattr(self, "_worker"):
            with suppress(Failure):
                self._await_running()
            if state_of(self._worker.pid) in ("T", "t", "Z", ""):
                self._fail(f"the worker is left in state {state_of(self._worker.pid)!r}")
            self._worker.close()
        deadline = time.monotonic() + _AIM_S
        while (left := marked(self._mark)) and time.monotonic() < deadline:
            time.sleep(0.005)
        if left:
            self._fail(f"processes {left} are left")

    def _check(self) -> None:
        if not hasattr(self, "_truth"):
            return
        result, truth, proxy = self.result, self._truth, self._proxy
        result.checkpoints, result.commits = len(truth.hashes), len(truth.commits)
        result.continued = sum(mode == "continue" for number, mode in proxy.begins)
        result.full = sum(mode == "full" for number, mode in proxy.begins if number)
        result.failures += truth.faults + proxy.faults
        allowed = _HARMLESS_ERRORS | (_FLIP_ERRORS if proxy.flips else frozenset())
        result.failures += [f"error {error} on the wire" for error in proxy.errors if error[1] not in allowed]
        for child in self._children:
            if child.kind != "worker" and child.board.status not in (0, CLEAN, FENCED):
                self._fail(f"the {child.kind} {child.pid} ended with an error: see {child.log.name}")
        self._check_reports()
        self._check_store()

    def _check_reports(self) -> None:
        """Nothing is reported as committed that the backup had not said to hold before."""
        if self._proxy.is_blind:
            return
        held = self._proxy.held
        digests = {(one.epoch, one.digest) for one in held}
        epochs = {one.epoch for one in held}
        count, newest = 0, -1
        for at, epoch, digest in self._truth.commits:
            while count < len(held) and held[count].at <= at:
                newest = max(newest, held[count].epoch)
                count += 1
            if epoch > newest:
                self._fail(f"epoch {epoch} was reported as committed, and the backup had said to hold {newest}")
            if epoch in epochs and (epoch, digest) not in digests:
                self._fail(f"epoch {epoch} was reported as committed with a position that the backup did not name")

    def _check_store(self) -> None:
        if not (self._store / NAME).exists():
            if self._truth.commits:
                self._fail("there is no store, and checkpoints were reported as committed")
            return
        # As a backup opens it that is started again.
        folder = None if self._warm in ("memory", "disk") else Path(self._warm)
        with Store(self._store).writer(NAME, warm_directory=folder, warm_in_memory=self._warm == "memory") as writer:
            for warning in writer.warnings:
                self._fail(f"the store is damaged: {warning}")
            if writer.position is not None:
                position, memory = writer.position, writer.memory
                assert memory is not None and writer.in_force is not None
                token = writer.in_force.device_state.hex()
                if hashlib.sha256(memory.reshape(-1)[:MEMORY_BYTES].data).hexdigest() != self._truth.hashes.get(token):
                    self._fail(f"the warm copy of {position.epoch} is not what was in memory in that pause")
            warm = folder / NAME if folder else self._store / NAME / "warm"
            left = [str(path) for where in (self._store / NAME, warm) for path in where.glob(".*")]
            left += [str(path) for path in self._store.glob(f"{NAME}/segments/*") if path.suffix != ".remus"]
            left += sorted(map(str, warm.glob("memory-*")))[1:]
            if left:
                self._fail(f"{left} are left")
        history = Store(self._store).history(NAME)
        report = history.verify()
        result = self.result
        result.failures += [f"verify: {bad}" for bad in report.bad]
        entries = {entry.epoch: entry.position.digest.hex() for entry in history.entries()}
        oldest = min(entries, default=0)
        if self._retain is None and oldest != 0 and self._truth.commits and self._truth.commits[0][1] < oldest:
            self._fail(
                f"epoch {self._truth.commits[0][1]} was committed; all was to be kept, and the oldest is {oldest}"
            )
        if self._retain is not None and len(entries) < min(self._retain, result.commits):
            self._fail(f"{len(entries)} checkpoints are kept of {self._retain}")
        for _, epoch, digest in self._truth.commits:
            if epoch >= oldest and entries.get(epoch) != digest:
                self._fail(f"epoch {epoch} was reported as committed; the store has {entries.get(epoch)} for {digest}")
        newest = self._truth.newest_commit
        if newest >= 0 and newest not in entries:
            self._fail(
                f"the newest committed epoch {newest} is not in the store, which ends at {max(entries, default=-1)}"
            )
        elif newest >= 0:
            checkpoint = history.restore(newest)
            self._check_memory(checkpoint.memory, checkpoint.device_state.hex(), newest)
            self._check_ledger(bytearray(checkpoint.memory.tobytes()), f"epoch {newest}, the newest committed")
        self._check_segments(history, newest)

    def _check_segments(self, history: History, newest: int) -> None:
        """Every checkpoint that is there, committed or not: its position, and of many its memory."""
        names = {digest: token for digest, token in self._truth.sent.items()}
        for contents in history.contents():
            fd = os.open(history.directory / "segments" / contents.name, os.O_RDONLY)
            try:
                restorer = Restorer()
                for staged in replay(reader_of(fd), restorer):
                    checkpoint = restorer.commit()
                    assert staged.record is not None
                    token = checkpoint.device_state.hex()
                    if names.get(staged.record.after.digest.hex(), token) != token:
                        self._fail(f"epoch {staged.epoch} holds another checkpoint than the one of its position")
                    if self._draw.random() < 0.3 or staged.epoch >= newest:
                        self._check_memory(checkpoint.memory, token, staged.epoch)
            finally:
                os.close(fd)

    def _check_memory(self, memory: Any, token: str, epoch: int) -> None:
        self.result.checked += 1
        if hashlib.sha256(memory.reshape(-1)[:MEMORY_BYTES].data).hexdigest() != self._truth.hashes.get(token):
            self._fail(f"epoch {epoch} is restored, and is not what was in memory in that pause")

    def _check_ledger(self, image: bytearray, where: str) -> None:
        ledger = Ledger(image)
        ledger.recover()
        for fault in ledger.faults():
            self._fail(f"{where}: {fault}")


_nurseries: list[Nursery] = []


def prepare() -> None:
    """Fork the nursery of this job, which ends with the whole test; before anything starts a thread."""
    die_with_parent()
    _nurseries.append(Nursery())


def run_one(seed: int, number: int, aim: str, directory: str | None, tls: bool = False) -> dict[str, Any]:
    """One run in this job, as plain data."""
    return asdict(Run(_nurseries[0], seed, number, aim, Path(directory) if directory else None, tls=tls).play())
