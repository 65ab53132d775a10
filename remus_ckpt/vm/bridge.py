"""Our end of a bridge process (bridge_process.py), where a guest's output waits for its checkpoint.

For each checkpoint, in this order:

    make_room() · stop the guest · mark(epoch) · copy its memory · resume the guest · … · once the epoch is committed,
    release(epoch)

At a failover, the bridge of the dead guest drops what was not committed (`drop`), or is gone with its host. The standby
gets a socket of `guest_pair` when it starts. Once it runs, `attach` connects that socket to the network, and `announce`
tells the network where the guest is now.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from remus_ckpt.errors import BridgeError
from remus_ckpt.forks import disown_in_forks
from remus_ckpt.limits import MIB
from remus_ckpt.vm.announcements import Addresses, announcements
from remus_ckpt.vm.bridge_process import IGNORED, LATENCY_S
from remus_ckpt.vm.requests import ask
from remus_ckpt.vm.tap import Tap, open_tap

Mode = Literal["hold", "pass", "shut"]
"""What happens to a guest's frames: they wait for a commit, they leave at once, they are dropped."""

PROCESS = Path(__file__).with_name("bridge_process.py")
_SOCKET_BYTES = 8 * MIB
_ANNOUNCE_AFTER_S = (0.0, 0.05, 0.2, 0.5, 1.0)
"""A network that is still reconverging may miss the first."""
MAX_NICS = 16
START_S = 30.0
_ANSWER_S = 2.0
_END_S = 5.0

_orphans: list[subprocess.Popen[bytes]] = []
"""Bridges that run on without us, so that their guests can be protected again. Popen complains unless they are kept."""


@dataclass(frozen=True, slots=True)
class NicStatus:
    """One NIC of the guest. All counts are from the start of the bridge process.

    held: not committed yet
    leaving: committed, and about to be written to the TAP device
    dropped: never committed, or sent while the guest was unprotected
    refused: not accepted by the TAP device, or not a frame
    incoming_lost: frames from the network to a guest that was just ending
    """

    tap: str
    has_tap: bool
    has_guest: bool
    held_frames: int
    held_bytes: int
    leaving_frames: int
    leaving_bytes: int
    released_frames: int
    released_bytes: int
    dropped_frames: int
    dropped_bytes: int
    refused_frames: int
    incoming_frames: int
    incoming_bytes: int
    incoming_lost: int
    addresses: Addresses


@dataclass(frozen=True, slots=True)
class BridgeStatus:
    """A bridge and its NICs.

    marked, released: the newest epochs, None before the first
    is_full: whether the guest has to wait, because too much of its output waits for commits
    latency_counts: frames by the time between the guest's sending and the network's getting; the upper bounds are
        `LATENCY_S`, the last count is what took longer
    """

    mode: Mode
    marked: int | None
    released: int | None
    is_full: bool
    nics: tuple[NicStatus, ...]
    latency_counts: tuple[int, ...]
    latency_sum_s: float
    latency_max_s: float

    def latency_s(self, share: float) -> float:
        """An upper bound of the latency that this share of the frames has met; 0 before the first frame."""
        left = share * sum(self.latency_counts)
        for count, bound in zip(self.latency_counts, LATENCY_S, strict=False):
            if left <= count:
                return min(bound, self.latency_max_s)
            left -= count
        return self.latency_max_s


def guest_pair() -> tuple[socket.socket, socket.socket]:
    """A cable with two ends: ours, for `attach`, and the guest's, whose descriptor QEMU inherits as
    `-netdev dgram,id=…,local.type=fd,local.str=N`. One message is one frame, and a full socket makes QEMU wait."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        for option in (socket.SO_SNDBUF, getattr(socket, "SO_SNDBUFFORCE", 32)):
            with contextlib.suppress(PermissionError):  # without CAP_NET_ADMIN net.core.wmem_max has to do
                end.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES // 2)  # the kernel doubles it
    return pair


class Bridge:
    """Owns a bridge process: between the NICs of one guest and TAP devices of this host.

    If this process dies, nothing uncommitted leaves any more; if the bridge dies, nothing leaves at all until
    `restart`. Any thread may call any method; each waits for the bridge, which takes well under a millisecond. All
    raise BridgeError if the bridge is gone, or refuses.
    """

    def __init__(
        self,
        owner: socket.socket,
        taps: Sequence[Tap],
        guests: Sequence[socket.socket | None],
        listener: socket.socket | None,
        limits: dict[str, int],
        process: subprocess.Popen[bytes] | None,
        pid: int,
    ) -> None:
        """Not for callers: see `start` and `connect`."""
        self._lock = threading.Lock()
        self._owner = owner
        self._taps = list(taps)
        self._guests = list(guests)
        self._listener = listener
        self._limits = limits
        self._process = process
        self._pid = pid
        self._mode: Mode = "hold"
        self._marked: int | None = None
        disown_in_forks(self)

    @classmethod
    def start(
        cls,
        taps: Sequence[str | Tap],
        *,
        listen: Path | None = None,
        held_frames: int = 65_536,
        held_bytes: int = 64 * MIB,
    ) -> Self:
        """Start a bridge in the mode `hold`, without guests.

        taps: of the guest's NICs, in their order: names for `open_tap`, or devices, which then belong to the bridge
        listen: where others may ask for the status, and take the bridge when we are gone; only root and our user can
        held_frames, held_bytes: how much may wait for commits before the guest must wait too
        Raises BridgeError if a device, the socket or the process is not available.
        """
        if len(taps) > MAX_NICS:
            raise BridgeError(f"{len(taps)} NICs: a bridge has at most {MAX_NICS}")
        opened: list[Tap] = []
        listener = None
        try:
            for tap in taps:
                opened.append(open_tap(tap) if isinstance(tap, str) else tap)  # noqa: PERF401 - closed if one fails
            listener = None if listen is None else _listen(listen)
            limits = {"held_frames": held_frames, "held_bytes": held_bytes}
            guests: list[socket.socket | None] = [None] * len(opened)
            owner, process = _spawn(opened, guests, listener, limits, "hold", None)
        except BaseException:
            for tap in opened:
                tap.close()
            if listener is not None:
                listener.close()
            raise
        return cls(owner, opened, guests, listener, limits, process, process.pid)

    @classmethod
    def connect(cls, path: Path) -> Self:
        """Take a bridge that is running, such as that of a guest whose protection has died. What is held there is
        dropped, and the mode is `hold` unless it is `pass`; the former owner, if it lives, is refused from now on."""
        owner = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        owner.settimeout(_ANSWER_S)
        try:
            owner.connect(str(path))
            reply, fds = ask(owner, {"do": "take"})
        except OSError as error:
            owner.close()
            raise BridgeError(f"{path}: no bridge answers: {error.strerror or error}") from error
        except BaseException:
            owner.close()
            raise
        left = iter(fds)
        taps = [Tap(next(left), nic["tap"]) for nic in reply["nics"]]
        guests = [socket.socket(fileno=next(left)) if nic["has_guest"] else None for nic in reply["nics"]]
        listener = socket.socket(fileno=next(left)) if reply["has_listener"] else None
        limits = {key: reply[key] for key in ("held_frames", "held_bytes")}
        taken = cls(owner, taps, guests, listener, limits, None, reply["pid"])
        taken._mode = reply["mode"]
        return taken

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the bridge process."""
        return self._pid

    @property
    def is_lost(self) -> bool:
        """Whether it has not answered: it is dead, or hangs."""
        return self._owner.fileno() < 0

    def attach(self, nic: int, ours: socket.socket) -> None:
        """Connect a guest: at the start, and after a failover the standby in its place. What another guest has sent
        here and was not released is dropped.

        ours: our end of a `guest_pair`; it belongs to the bridge then
        """
        with self._lock:
            self._request({"do": "attach", "nic": nic}, [ours.fileno()])
            old, self._guests[nic] = self._guests[nic], ours
        if old is not None:
            old.close()

    def make_room(self) -> None:
        """The guest is about to be stopped: until `mark`, more of its output may be held. Otherwise a frame that finds
        no room is lost, because QEMU throws away what it cannot send when it stops."""
        with self._lock:
            self._request({"do": "make_room"})

    def mark(self, epoch: int) -> int:
        """End the running epoch under this number: all that the guest, which is stopped, has sent belongs to it.
        Numbers rise. Returns the number of frames."""
        with self._lock:
            count: int = self._request({"do": "mark", "epoch": epoch})["frames"]
            self._marked = epoch
        return count

    def release(self, epoch: int) -> int:
        """Let the frames leave of all epochs up to this one, which is committed. Returns how many."""
        with self._lock:
            count: int = self._request({"do": "release", "epoch": epoch})["frames"]
        return count

    def drop(self) -> int:
        """Forget all that was not released, which must never leave any more. Epochs may then begin at any number.
        Returns the number of frames."""
        with self._lock:
            count: int = self._request({"do": "drop"})["frames"]
            self._marked = None
        return count

    def hold(self) -> None:
        """From now on, frames from the guest wait for a commit."""
        self._set_mode("hold")

    def let_pass(self) -> None:
        """The guest is unprotected: its frames leave at once, and held frames leave now."""
        self._set_mode("pass")

    def _set_mode(self, mode: Mode) -> None:
        with self._lock:
            self._request({"do": "mode", "mode": mode})
            self._mode = mode

    def announce(self, addresses: Sequence[Addresses] = ()) -> None:
        """Tell each NIC's network that the guest is here now, five times in the next second.

        addresses: of each NIC, such as `status` of another bridge reports; what this one has seen is added
        """
        for number, nic in enumerate(self.status().nics):
            told = addresses[number] if number < len(addresses) else Addresses()
            seen = nic.addresses
            macs, ips = dict.fromkeys((*told.macs, *seen.macs)), dict.fromkeys((*told.ips, *seen.ips))
            frames = [frame.hex() for frame in announcements(Addresses(tuple(macs), tuple(ips)))]
            with self._lock:
                for start in range(0, len(frames), 100):
                    some = frames[start : start + 100]
                    self._request({"do": "send", "nic": number, "frames": some, "after_s": _ANNOUNCE_AFTER_S})

    def status(self) -> BridgeStatus:
        """The state of the bridge and its NICs."""
        with self._lock:
            reply = self._request({"do": "status"})
        return BridgeStatus(
            mode=reply["mode"],
            marked=reply["marked"],
            released=reply["released"],
            is_full=reply["is_full"],
            nics=tuple(_nic_status(nic) for nic in reply["nics"]),
            latency_counts=tuple(reply["latency"]["counts"]),
            latency_sum_s=reply["latency"]["sum_s"],
            latency_max_s=reply["latency"]["max_s"],
        )

    def restart(self) -> None:
        """Put a new process in the place of one that died or does not answer, with the same devices and guests. The
        frames that it held are lost, as on a wire; what a guest has sent since then is not, and belongs to the running
        epoch."""
        with self._lock:
            self._owner.close()
            if self._process is not None:
                self._process.kill()
                self._process.wait()
            else:
                _kill(self._pid)
            self._owner, self._process = _spawn(
                self._taps, self._guests, self._listener, self._limits, self._mode, self._marked
            )
            self._pid = self._process.pid

    def close(self) -> None:
        """Let go of the bridge. Without a guest it ends now. With one it stays until the guest ends or another takes
        it, and lets nothing pass meanwhile, unless its mode is `pass`."""
        self.disown()
        if self._process is None:
            return
        try:
            self._process.wait(_END_S if not any(self._guests) else 0.1)
        except subprocess.TimeoutExpired:
            _orphans.append(self._process)

    def disown(self) -> None:
        """In a forked child: close our copies of the descriptors, which keep the bridge and its devices alive."""
        self._owner.close()
        for tap in self._taps:
            tap.close()
        self._taps.clear()
        for opened in (*self._guests, self._listener):
            if opened is not None:
                opened.close()

    def _request(self, request: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        try:
            return ask(self._owner, request, fds)[0]
        except OSError as error:
            self._owner.close()  # a late reply would be taken for that to the next request
            raise BridgeError(
                f"the bridge process does not answer ({error.strerror or error}): the frames that it holds stay "
                "held until it is started again"
            ) from error


def _kill(pid: int) -> None:
    """Kill a bridge that is not our child, and wait for its end."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            # Any process may have the number by now.
            if PROCESS.name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [], _END_S)
        finally:
            os.close(pidfd)


def _nic_status(nic: dict[str, Any]) -> NicStatus:
    macs = tuple(bytes.fromhex(mac) for mac in nic.pop("macs"))
    ips = tuple((bytes.fromhex(mac), bytes.fromhex(ip)) for mac, ip in nic.pop("ips"))
    return NicStatus(**nic, addresses=Addresses(macs, ips))


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
            try:
                other.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()  # left by one that was killed
            except FileNotFoundError:
                pass
            else:
                raise BridgeError(f"{path}: another bridge listens here; end it, or take it")
        listener.bind(str(path))
        path.chmod(0o600)  # nobody can connect before listen()
        listener.listen()
    except OSError as error:
        listener.close()
        raise BridgeError(f"{path}: no bridge can listen here: {error.strerror or error}") from error
    except BaseException:
        listener.close()
        raise
    return listener


def _spawn(
    taps: Sequence[Tap],
    guests: Sequence[socket.socket | None],
    listener: socket.socket | None,
    limits: dict[str, int],
    mode: Mode,
    marked: int | None,
) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(START_S)
    settings = {
        "owner": theirs.fileno(),
        "listener": None if listener is None else listener.fileno(),
        "taps": [[tap.fd, tap.name] for tap in taps],
        "guests": [None if guest is None else guest.fileno() for guest in guests],
        "mode": mode,
        "marked": marked,
        **limits,
    }
    fds = [*(tap.fd for tap in taps), *(guest.fileno() for guest in guests if guest), theirs.fileno()]
    # Block these signals until the bridge ignores them itself: a service manager may send them to all processes.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
    try:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(PROCESS), json.dumps(settings)],
                pass_fds=fds if listener is None else [*fds, listener.fileno()],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        try:
            ask(ours, {"do": "status"})
        except BaseException:
            process.kill()  # one that begins late would take the guest's frames from the next
            process.wait()
            raise
    except OSError as error:
        ours.close()
        raise BridgeError(f"the bridge process cannot be started: {error}") from error
    except BaseException:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    ours.settimeout(_ANSWER_S)
    return ours, process
