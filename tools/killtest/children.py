"""The processes that are killed: worker, primary and backup, forked from a nursery that has imported all they need.

Each has a board, memory that it shares with the harness: it writes there in which phase it is, so that this can be
read when it is dead. It may be asked there to stay for a moment in a phase when it comes to it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import select
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from remus_ckpt.demo.ledger import BYTES, Ledger
from remus_ckpt.errors import Fenced
from remus_ckpt.link.address import Address
from remus_ckpt.link.dial import connect
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.loop import StopSignal
from remus_ckpt.observe.log import configure_logs
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.primary import Primary
from remus_ckpt.service.release import Committed
from remus_ckpt.service.standby import Policy
from remus_ckpt.source.processes import Processes
from remus_ckpt.source.shared_file import SharedFile
from remus_ckpt.store import HistoryWriter, Retention, Store

PRIMARY_PHASES = ("starting", "connect", "capture", "paused", "encode", "send", "sent")
BACKUP_PHASES = (
    "started",
    "opening",
    "listening",
    "receiving",
    "staged",
    "stored",
    "acknowledged",
    "applying",
    "applied",
    "pruning",
)
PHASES = (*PRIMARY_PHASES, *BACKUP_PHASES)
FIRST_PHASES = {"primary": PRIMARY_PHASES[0], "backup": BACKUP_PHASES[0]}
MARK = "REMUS_KILLTEST"
"""An environment variable: what the children start themselves, such as guards, is found by it."""
SCRATCH_BYTES = 3 << 19
"""Behind the ledger: filled with noise now and then, so that some checkpoints travel in many pieces."""
MEMORY_BYTES = BYTES + SCRATCH_BYTES
CLEAN, BROKEN, FENCED = 1, 2, 3
"""How a child ended by itself."""

_PHASE, _EPOCH, _COMPACTING, _WISH, _DWELL_US, _STATUS = range(6)
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Be killed when the thread that started this process ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Board:
    """Six words of memory that a child and the harness share."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._words = memoryview(mmap.mmap(fd, mmap.PAGESIZE)).cast("q")

    @classmethod
    def create(cls, phase: str) -> Board:
        """A new one, in that phase; it is freed with its descriptor and the object."""
        fd = os.memfd_create("board", os.MFD_CLOEXEC)
        os.ftruncate(fd, mmap.PAGESIZE)
        board = cls(fd)
        board.wish(None, 0.0)
        board.report(phase, 0)
        return board

    # The child's part

    def report(self, phase: str, epoch: int) -> None:
        """Enter a phase; stay in it for a moment if that is wished."""
        words = self._words
        words[_EPOCH] = epoch
        if phase in ("compacting", "compacted"):
            words[_COMPACTING] = phase == "compacting"
            return
        code = PHASES.index(phase)
        words[_PHASE] = code
        if words[_WISH] == code:
            words[_WISH] = -1
            time.sleep(words[_DWELL_US] / 1e6)

    def end(self, status: int) -> None:
        """Say how it ended."""
        self._words[_STATUS] = status

    # The harness's part

    def wish(self, phase: str | None, dwell_s: float) -> None:
        """Wish that the child dwells in that phase, once, when it comes to it."""
        self._words[_DWELL_US] = int(dwell_s * 1e6)
        self._words[_WISH] = -1 if phase is None else PHASES.index(phase)
        self._words[_COMPACTING] = 0

    @property
    def phase(self) -> str:
        """Where the child is or, when it is dead, was."""
        return PHASES[self._words[_PHASE]]

    @property
    def compacting(self) -> bool:
        """Whether a compaction has begun since `wish`, and not ended."""
        return bool(self._words[_COMPACTING])

    @property
    def status(self) -> int:
        """How the child ended; 0 if it did not by itself."""
        return self._words[_STATUS]


# The children


def run_worker(args: dict[str, Any], board: Board, channel: socket.socket) -> int:
    """Makes transfers in bursts, as a server does; two jobs on two cores have to leave something for the others."""
    with open(args["memory"], "r+b") as file:
        memory = mmap.mmap(file.fileno(), MEMORY_BYTES)
    ledger = Ledger(memory)
    ledger.recover()
    channel.send(b"ready")
    draw = random.Random(args["seed"])
    while True:
        for _ in range(draw.randrange(1, 40)):
            ledger.transfer()
        if draw.random() < 0.02:
            size = draw.randrange(SCRATCH_BYTES)
            memory[BYTES : BYTES + size] = draw.randbytes(size)
        time.sleep(draw.uniform(0.0, 0.002))


def run_primary(args: dict[str, Any], board: Board, channel: socket.socket) -> int:
    """A primary that asks the harness to look in each pause, and tells it of each commit."""
    stop = StopSignal()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    token = b""

    def tell(**fields: Any) -> None:
        channel.send(json.dumps(fields).encode())

    def device_state() -> bytes:
        nonlocal token
        token = os.urandom(16)
        return token

    def on_paused(epoch: int) -> None:
        board.report("paused", epoch)
        tell(paused=epoch, token=token.hex())
        if not channel.recv(1):
            raise SystemExit("the harness is gone")
        board.report("encode", epoch)

    def on_commit(committed: Committed) -> None:
        tell(commit=committed.epoch, digest=committed.position.digest.hex())

    def dial() -> Any:
        board.report("connect", 0)
        return connect(Address.parse(args["to"]), tls=tls, timeout_s=2.0)

    tls = TlsFiles(args["tls_dir"]) if args["tls_dir"] else None
    source = SharedFile(args["memory"], Processes([args["worker"]]), device_state=device_state)
    primary = Primary(
        args["name"],
        source,
        dial,
        codec=args["codec"],
        interval_s=args["interval_s"],
        window=args["window"],
        wait=args["wait"],
        compression=args["compression"],
        on_commit=on_commit,
        on_paused=on_paused,
        on_phase=board.report,
        stop=stop,
    )
    try:
        for taken in primary.run():
            assert taken.sent.position is not None
            tell(sent=taken.sent.epoch, digest=taken.sent.position.digest.hex(), token=token.hex())
    except Fenced:
        return FENCED
    finally:
        primary.close()
        source.close()
    return CLEAN


class _EagerStore(Store):
    """Compacts after a few checkpoints already."""

    def __init__(self, directory: str, checkpoints: int) -> None:
        super().__init__(directory)
        self._checkpoints = checkpoints

    def writer(self, name: str, **options: Any) -> HistoryWriter:
        """As of `Store`."""
        return super().writer(name, compact_checkpoints=self._checkpoints, **options)


def run_backup(args: dict[str, Any], board: Board, channel: socket.socket) -> int:
    """A backup on a port of its own choice, which it tells."""
    stop = StopSignal()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    board.report("opening", 0)
    backup = Backup(
        _EagerStore(args["store"], args["compact_checkpoints"]),
        ["tls://127.0.0.1:0" if args["tls_dir"] else "tcp://127.0.0.1:0"],
        tls_dir=args["tls_dir"],
        policy=Policy(lease_s=args["lease_s"], retention=Retention(count=args["retain"])),
        warm=args["warm"],
        on_phase=board.report,
        stop=stop,
    )
    board.report("listening", 0)
    channel.send(backup.addresses[0].encode())
    try:
        backup.run()
    finally:
        backup.close()
    return CLEAN


_MAINS = {"worker": run_worker, "primary": run_primary, "backup": run_backup}


# The nursery


class Nursery:
    """A process with one thread, forked before the harness starts any, that forks the children on demand."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._socket.close()
            with suppress(BaseException):
                _serve(theirs)
            os._exit(0)
        theirs.close()

    def start(self, kind: str, args: dict[str, Any], fds: list[int]) -> tuple[int, int]:
        """pid and pidfd of a new child; fds: of its board, its channel and its log."""
        with self._lock:
            socket.send_fds(self._socket, [json.dumps([kind, args]).encode()], fds)
            data, pidfds, _, _ = socket.recv_fds(self._socket, 64, 1)
        return int(data), pidfds[0]


def _serve(orders: socket.socket) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        data, fds, _, _ = socket.recv_fds(orders, 1 << 16, 3)
        if not data:
            return
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                continue
        kind, args = json.loads(data)
        pid = os.fork()
        if pid == 0:
            orders.close()
            _live(kind, args, *fds)
        pidfd = os.pidfd_open(pid)
        socket.send_fds(orders, [str(pid).encode()], [pidfd])
        for fd in (*fds, pidfd):
            os.close(fd)


def _live(kind: str, args: dict[str, Any], board_fd: int, channel_fd: int, log_fd: int) -> None:
    status = BROKEN
    board = Board(board_fd)
    try:
        die_with_parent()  # the nursery, which ends with the harness
        os.setsid()
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        os.environ[MARK] = args["mark"]
        configure_logs()
        status = _MAINS[kind](args, board, socket.socket(fileno=channel_fd))
    except BaseException:
        with suppress(BaseException):
            traceback.print_exc()
            sys.stderr.flush()
    finally:
        board.end(status)
        os._exit(0)


class Child:
    """One of them, as the harness has it."""

    def __init__(self, nursery: Nursery, kind: str, args: dict[str, Any], log: Path) -> None:
        self.kind = kind
        self.board = Board.create(FIRST_PHASES.get(kind, PHASES[0]))
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, open(log, "ab") as file:
            self.pid, self._pidfd = nursery.start(kind, args, [self.board.fd, theirs.fileno(), file.fileno()])
        self.log = log

    def signal(self, number: signal.Signals) -> None:
        """Send it, if the child lives."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def wait(self, timeout_s: float) -> bool:
        """Whether it is dead, at the latest after that time."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(max(timeout_s, 0.0) * 1000))

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return not self.wait(0.0)

    def close(self) -> None:
        """Kill it if it lives, and free what the harness has of it."""
        if self._pidfd < 0:
            return
        self.signal(signal.SIGKILL)
        self.wait(10.0)
        os.close(self._pidfd)
        os.close(self.board.fd)
        self.channel.close()
        self._pidfd = -1


def state_of(pid: int) -> str:
    """The letter of a process's state; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="latin-1").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def marked(mark: str) -> list[int]:
    """Processes that were started by children of this mark, such as guards."""
    needle = f"{MARK}={mark}".encode()
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if needle in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                found.append(int(name))
    return found
