"""The bridge process: holds back a guest's frames until the checkpoint after they were sent is committed.

    python bridge_process.py SETTINGS

A guest's NIC is at one end of a SOCK_SEQPACKET pair (QEMU: `-netdev dgram,local.type=fd`), a message being an Ethernet
frame; this process has the other end, and a TAP device. A frame from the TAP passes to the guest at once. A frame from
the guest joins the epoch that is running; `mark` ends that epoch and `release` lets its frames go, in their order.

The process that starts the bridge owns it, over a SOCK_SEQPACKET socket of requests and replies, each one JSON object.
If the owner is gone, held frames are dropped, and so is everything that the guest sends until another owner takes the
bridge: nothing leaves without a commit. Only for an unprotected guest, in the mode `pass`, traffic continues. The
process ends when it has neither an owner nor a guest. It ignores the signals that a service manager sends to all
processes, because a guest that is protected again needs it until then.

Bounded: beyond `held_frames` or `held_bytes`, nothing more is read from the guests, whose own queues then fill, until
frames have left. QEMU discards what it cannot send when it stops; so from `make_room`, which precedes a stop, to
`mark`, more may be held.

It imports only the standard library, so that it starts fast and cannot break with the package.
Source: unix(7), packet formats of RFC 826 and RFC 4861, the kernel's Documentation/networking/tuntap.rst.
"""

import bisect
import contextlib
import errno
import gc
import heapq
import json
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from typing import Any

MAX_REQUEST_BYTES = 64 * 1024
MAX_FRAME_BYTES = 69_632
"""What QEMU holds of a frame: 64 KiB and a header."""
MIN_FRAME_BYTES = 14
ROOM = 65_536, 64 << 20
"""Frames and bytes that a guest which is about to stop may send over the bounds: more than it can before it does."""
MAX_CONNECTIONS = 16
MAX_ADDRESSES = 32
"""How many MAC addresses, and how many addresses of IP, are learnt from a guest."""
MAX_PLANNED = 16_384
"""Frames that wait for their moment after `send`."""
LATENCY_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Upper bounds of the counts of `latency`; one more count is for what took longer."""
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MAX_DELAY_S = 60
_SLICE = 64
"""Frames moved in one go: a mark, which a stopped guest waits for, never waits for longer than that."""
_EARLY_FRAMES, _EARLY_S = 256, 1.0
"""Which incoming frames wait for a guest that is not there yet."""

Frames = list[tuple[float, bytes]]
"""When a frame was read from the guest, and the frame."""


class Queue:
    """Frames that a guest has sent and the network has not received yet. No I/O, no clock.

    held: of epochs that are not committed; the last of them is running
    leaving: committed, in their order
    """

    def __init__(self) -> None:
        self._running: Frames = []
        self._sealed: deque[tuple[int, Frames]] = deque()
        self.leaving: deque[tuple[float, bytes]] = deque()
        self.held_frames = self.held_bytes = self.leaving_bytes = 0

    def put(self, at: float, frame: bytes) -> None:
        """Another frame of the running epoch."""
        self._running.append((at, frame))
        self.held_frames += 1
        self.held_bytes += len(frame)

    def seal(self, epoch: int) -> int:
        """End the running epoch. Returns the number of its frames."""
        count = len(self._running)
        if count:
            self._sealed.append((epoch, self._running))
            self._running = []
        return count

    def release(self, epoch: int) -> int:
        """Let the frames leave of all sealed epochs up to this one. Returns how many they are."""
        count = 0
        while self._sealed and self._sealed[0][0] <= epoch:
            count += self._leave(self._sealed.popleft()[1])
        return count

    def release_all(self) -> None:
        """Let everything leave, the running epoch too."""
        while self._sealed:
            self._leave(self._sealed.popleft()[1])
        self._leave(self._running)
        self._running = []

    def _leave(self, frames: Frames) -> int:
        size = sum(len(frame) for _, frame in frames)
        self.leaving += frames
        self.leaving_bytes += size
        self.held_frames -= len(frames)
        self.held_bytes -= size
        return len(frames)

    def left(self) -> None:
        """The first of the leaving frames has left."""
        self.leaving_bytes -= len(self.leaving.popleft()[1])

    def drop(self) -> tuple[int, int]:
        """Forget all that is held. Returns the number of frames and of bytes."""
        dropped = self.held_frames, self.held_bytes
        self._sealed.clear()
        self._running = []
        self.held_frames = self.held_bytes = 0
        return dropped


class Addresses:
    """A guest's own addresses, as its frames tell: each MAC, and what it says of itself by ARP or neighbour discovery.

    The source of an IP packet proves nothing: a guest may be a router.
    """

    def __init__(self) -> None:
        self.macs: dict[bytes, None] = {}
        self.ips: dict[tuple[bytes, bytes], None] = {}

    def learn(self, frame: bytes) -> None:
        mac = frame[6:12]
        if mac not in self.macs:
            if mac[0] & 1 or len(self.macs) >= MAX_ADDRESSES:
                return
            self.macs[mac] = None
        kind = frame[12:14]
        ip = b""
        if kind == b"\x08\x06":
            if frame[14:20] == b"\0\x01\x08\0\x06\x04" and frame[22:28] == mac:
                ip = frame[28:32]
        elif kind == b"\x86\xdd" and frame[20:21] == b"\x3a":
            if frame[54:55] == b"\x88":  # an advertisement: its address is the target
                ip = frame[62:78]
            elif frame[54:55] == b"\x87":
                ip = frame[22:38]
        if len(ip) in {4, 16} and any(ip) and len(self.ips) < MAX_ADDRESSES:
            self.ips[mac, ip] = None


class Nic:
    """A guest's NIC and its TAP device.

    tap: descriptor, not blocking
    """

    def __init__(self, tap: int, name: str) -> None:
        self.tap = tap
        self.name = name
        self.has_tap = True
        self.is_tap_full = False
        self.guest: socket.socket | None = None
        self.room = 0
        """Bytes that the guest's socket holds at most."""
        self.queue = Queue()
        self.known = Addresses()
        self.early: deque[tuple[float, bytes]] = deque(maxlen=_EARLY_FRAMES)
        self.incoming: bytes | None = None
        """A frame that the guest's socket had no room for."""
        self.counts = dict.fromkeys(
            ("released_frames", "released_bytes", "dropped_frames", "dropped_bytes", "refused_frames",
             "incoming_frames", "incoming_bytes", "incoming_lost"), 0
        )  # fmt: skip

    def drop(self) -> int:
        """Forget what is held. Returns the number of frames."""
        frames, size = self.queue.drop()
        self.counts["dropped_frames"] += frames
        self.counts["dropped_bytes"] += size
        return frames

    def status(self) -> dict[str, Any]:
        return {
            "tap": self.name,
            "has_tap": self.has_tap,
            "has_guest": self.guest is not None,
            "held_frames": self.queue.held_frames,
            "held_bytes": self.queue.held_bytes,
            "leaving_frames": len(self.queue.leaving),
            "leaving_bytes": self.queue.leaving_bytes,
            **self.counts,
            "macs": [mac.hex() for mac in self.known.macs],
            "ips": [[mac.hex(), ip.hex()] for mac, ip in self.known.ips],
        }


class Bridge:
    """All NICs of one guest, and the bridge's clients.

    settings: what `bridge.py` sends; see there
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._poll = select.epoll()
        self._wants: dict[int, int] = {}
        self._buffer = memoryview(bytearray(MAX_FRAME_BYTES + 1))
        self._most_frames: int = settings["held_frames"]
        self._most_bytes: int = settings["held_bytes"]
        self._mode: str = settings["mode"]
        self._marked: int | None = settings["marked"]
        self._makes_room = False
        self._released: int | None = None
        self._planned: list[tuple[float, int, int, bytes]] = []
        self._plans = 0
        self._latency_s = self._longest_s = 0.0
        self._latencies = [0] * (len(LATENCY_S) + 1)
        self._nics = [Nic(tap, name) for tap, name in settings["taps"]]
        for nic, guest in zip(self._nics, settings["guests"], strict=True):
            if guest is not None:
                self._plug(nic, socket.socket(fileno=guest))
        self._connections: dict[int, socket.socket] = {}
        self._owner: socket.socket | None = self._admit(socket.socket(fileno=settings["owner"]))
        self._listener = None if settings["listener"] is None else socket.socket(fileno=settings["listener"])
        if self._listener is not None:
            self._listener.setblocking(False)

    def run(self) -> None:
        """Serve until there is neither an owner nor a guest."""
        while self._owner is not None or any(nic.guest or nic.queue.leaving for nic in self._nics):
            self._send_planned()
            self._look()
            for fd, events in self._poll.poll(self._patience()):
                if connection := self._connections.get(fd):
                    self._serve(connection)
                elif self._listener is not None and fd == self._listener.fileno():
                    self._accept()
                else:
                    self._move(fd, events)
            for nic in self._nics:
                self._write(nic)
        if self._listener is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._listener.getsockname())

    def _patience(self) -> float:
        if any(nic.queue.leaving and not nic.is_tap_full for nic in self._nics):
            return 0.0
        return max(self._planned[0][0] - time.monotonic(), 0.0) if self._planned else -1.0

    def _look(self) -> None:
        """Tell the poll what to wait for."""
        wanted = dict.fromkeys(self._connections, select.EPOLLIN)
        if self._listener is not None and len(self._connections) < MAX_CONNECTIONS:
            wanted[self._listener.fileno()] = select.EPOLLIN
        may_read = not self._is_full()
        for nic in self._nics:
            has_room = nic.incoming is None  # a guest that does not read leaves frames in the device, as with any card
            if nic.has_tap:
                wanted[nic.tap] = select.EPOLLIN * has_room | select.EPOLLOUT * nic.is_tap_full
            if nic.guest is not None:
                wanted[nic.guest.fileno()] = select.EPOLLIN * may_read | select.EPOLLOUT * (not has_room)
        if wanted == self._wants:
            return
        for fd in self._wants.keys() - wanted.keys():
            self._poll.unregister(fd)
        for fd, events in wanted.items():
            if fd not in self._wants:
                self._poll.register(fd, events)
            elif self._wants[fd] != events:
                self._poll.modify(fd, events)
        self._wants = wanted

    def _forget(self, closed: socket.socket) -> None:
        """Close a socket. Its number may come again at once, for another."""
        if self._wants.pop(closed.fileno(), None) is not None:
            self._poll.unregister(closed)
        closed.close()

    def _is_full(self) -> bool:
        frames = sum(nic.queue.held_frames + len(nic.queue.leaving) for nic in self._nics)
        size = sum(nic.queue.held_bytes + nic.queue.leaving_bytes for nic in self._nics)
        more_frames, more_bytes = ROOM if self._makes_room else (0, 0)
        return frames >= self._most_frames + more_frames or size >= self._most_bytes + more_bytes

    # frames

    def _move(self, fd: int, events: int) -> None:
        for nic in self._nics:
            if fd == nic.tap and nic.has_tap:
                nic.is_tap_full = nic.is_tap_full and not events & (select.EPOLLOUT | select.EPOLLERR)
                if nic.incoming is None or events & select.EPOLLERR:
                    self._read_tap(nic)
            elif nic.guest is not None and fd == nic.guest.fileno():
                if events & select.EPOLLOUT and nic.incoming is not None:
                    frame, nic.incoming = nic.incoming, None
                    self._to_guest(nic, frame)
                if events & ~select.EPOLLOUT:
                    # The end of a guest is always reported. It sends no more, so all of it is read: room or not.
                    self._read_guest(nic, _SLICE)

    def _plug(self, nic: Nic, guest: socket.socket) -> None:
        guest.setblocking(False)
        nic.guest = guest
        nic.room = guest.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)

    def _unplug(self, nic: Nic) -> None:
        assert nic.guest is not None
        self._forget(nic.guest)
        nic.guest = nic.incoming = None

    def _read_guest(self, nic: Nic, most: int) -> tuple[int, int]:
        """Read frames from a guest until it has none, at most so many. Returns how many, and their bytes."""
        guest, count, total = nic.guest, 0, 0
        now = time.monotonic()
        while guest is not None and count < most:
            try:
                size = guest.recv_into(self._buffer)
            except BlockingIOError:
                break
            except ConnectionResetError:  # it ended with frames unread; what it sent before comes now
                continue
            if not size:
                self._unplug(nic)
                break
            count += 1
            total += size
            if not MIN_FRAME_BYTES <= size <= MAX_FRAME_BYTES:
                nic.counts["refused_frames"] += 1
                continue
            if self._mode == "shut":
                nic.counts["dropped_frames"] += 1
                nic.counts["dropped_bytes"] += size
                continue
            frame = bytes(self._buffer[:size])
            nic.known.learn(frame)
            nic.queue.put(now, frame)
        if self._mode == "pass":
            nic.queue.release_all()
        return count, total

    def _drain(self, nic: Nic) -> bool:
        """Read all that a stopped guest has sent. Returns whether there is an end to it."""
        size = 0
        while nic.guest is not None:
            some, some_bytes = self._read_guest(nic, _SLICE)
            size += some_bytes
            if some < _SLICE:
                break
            if size > nic.room + MAX_FRAME_BYTES:
                return False
        return True

    def _read_tap(self, nic: Nic) -> None:
        for _ in range(_SLICE):
            try:
                frame = os.read(nic.tap, MAX_FRAME_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.EBADFD:  # the device was removed
                    nic.has_tap = nic.is_tap_full = False
                return
            if nic.guest is None:
                nic.early.append((time.monotonic(), frame))
            else:
                self._to_guest(nic, frame)
                if nic.incoming is not None:
                    return

    def _to_guest(self, nic: Nic, frame: bytes) -> None:
        try:
            if nic.guest is not None:
                nic.guest.send(frame)
                nic.counts["incoming_frames"] += 1
                nic.counts["incoming_bytes"] += len(frame)
        except BlockingIOError:
            nic.incoming = frame
        except OSError:
            nic.counts["incoming_lost"] += 1

    def _write(self, nic: Nic) -> None:
        """Write frames that may leave to the TAP, at most a slice."""
        leaving = nic.queue.leaving
        if not leaving or nic.is_tap_full:
            return
        now = time.monotonic()
        for _ in range(min(_SLICE, len(leaving))):
            at, frame = leaving[0]
            try:
                os.write(nic.tap, frame)
                nic.counts["released_frames"] += 1
                nic.counts["released_bytes"] += len(frame)
                self._latency_s += now - at
                self._longest_s = max(self._longest_s, now - at)
                self._latencies[bisect.bisect_left(LATENCY_S, now - at)] += 1
            except BlockingIOError:
                nic.is_tap_full = True
                return
            except OSError:  # the device is down or gone, or no network would carry this
                nic.counts["refused_frames"] += 1
            nic.queue.left()

    def _send_planned(self) -> None:
        now = time.monotonic()
        while self._planned and self._planned[0][0] <= now:
            _, _, index, frame = heapq.heappop(self._planned)
            with contextlib.suppress(OSError):
                os.write(self._nics[index].tap, frame)

    # requests

    def _admit(self, connection: socket.socket) -> socket.socket:
        connection.setblocking(False)
        self._connections[connection.fileno()] = connection
        return connection

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):  # it has gone again
            self._admit(self._listener.accept()[0])

    def _serve(self, connection: socket.socket) -> None:
        """Answer one request, or forget a client that is gone."""
        fds: list[int] = []
        give: list[int] = []
        try:
            data, fds, flags, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 4)
            if not data:
                raise ConnectionError
            if flags & socket.MSG_TRUNC:
                raise _Wrong(f"a request is longer than {MAX_REQUEST_BYTES:,} bytes")
            reply = self._answer(connection, data, fds, give)
        except BlockingIOError:
            return
        except _Wrong as error:
            reply = {"error": str(error)}
        except OSError:
            self._farewell(connection)
            return
        finally:
            for fd in fds:
                os.close(fd)
        try:
            socket.send_fds(connection, [json.dumps(reply).encode()], give)
        except OSError:  # a client that does not read the answers is as good as gone
            self._farewell(connection)

    def _farewell(self, connection: socket.socket) -> None:
        del self._connections[connection.fileno()]
        self._forget(connection)
        if connection is self._owner:
            self._owner = None
            self._abandon()

    def _abandon(self) -> None:
        """No owner is left who could commit what is held."""
        self._planned.clear()
        for nic in self._nics:
            nic.drop()
        self._marked = None
        self._makes_room = False
        if self._mode == "hold":
            self._mode = "shut"

    def _answer(self, connection: socket.socket, data: bytes, fds: list[int], give: list[int]) -> dict[str, Any]:
        try:
            request = json.loads(data)
        except (ValueError, RecursionError):
            raise _Wrong("a request is not JSON") from None
        word = request.get("do") if isinstance(request, dict) else None
        if word == "status":
            return self._status()
        if word == "take":
            return self._take(connection, give)
        if connection is not self._owner:
            raise _Wrong("another client owns the bridge: take it first")
        if word == "make_room":
            self._makes_room = True
            for nic in self._nics:
                self._drain(nic)
            return {}
        if word == "mark":
            return self._mark(_number(request, "epoch"))
        if word == "release":
            return self._release(_number(request, "epoch"))
        if word == "drop":
            self._marked = None
            for nic in self._nics:
                self._drain(nic)
            return {"frames": sum(nic.drop() for nic in self._nics)}
        if word == "mode":
            return self._set_mode(request.get("mode"))
        if word == "attach":
            return self._attach(self._nic(request), fds)
        if word == "send":
            return self._plan(request)
        raise _Wrong(f"no request is called {word!r:.100}")

    def _nic(self, request: dict[str, Any]) -> Nic:
        number = _number(request, "nic")
        if number >= len(self._nics):
            raise _Wrong(f"there are {len(self._nics)} NICs, none with the number {number}")
        return self._nics[number]

    def _mark(self, epoch: int) -> dict[str, Any]:
        """End the running epoch, and give its frames this number."""
        if self._marked is not None and epoch <= self._marked:
            raise _Wrong(f"epoch {epoch} is marked after {self._marked}: epochs must rise")
        for nic in self._nics:
            if not self._drain(nic):
                raise _Wrong(f"the guest at {nic.name} still sends: an epoch is marked while the guest is stopped")
        self._marked = epoch
        self._makes_room = False
        return {"frames": sum(nic.queue.seal(epoch) for nic in self._nics)}

    def _release(self, epoch: int) -> dict[str, Any]:
        if self._marked is None:
            return {"frames": 0}  # all of it was dropped
        if epoch > self._marked:
            raise _Wrong(f"epoch {epoch} cannot be released: the newest marked is {self._marked}")
        self._released = max(epoch, self._released or 0)
        count = sum(nic.queue.release(epoch) for nic in self._nics)
        for nic in self._nics:
            self._write(nic)
        return {"frames": count}

    def _set_mode(self, mode: object) -> dict[str, Any]:
        if mode == "pass":
            for nic in self._nics:
                nic.queue.release_all()
        elif mode != "hold":
            raise _Wrong(f"the modes are hold and pass, not {mode!r:.100}")
        self._mode = str(mode)
        return {}

    def _attach(self, nic: Nic, fds: list[int]) -> dict[str, Any]:
        """Another guest in the place of the last: what that one had not committed was never sent."""
        if len(fds) != 1:
            raise _Wrong(f"attach comes with one descriptor, not with {len(fds)}")
        try:
            guest = socket.socket(fileno=os.dup(fds[0]))
        except OSError:
            raise _Wrong("attach comes with a socket") from None
        if (guest.family, guest.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            guest.close()
            raise _Wrong("attach comes with one end of a SOCK_SEQPACKET pair")
        if nic.guest is not None:
            self._unplug(nic)
        nic.drop()
        self._plug(nic, guest)
        since = time.monotonic() - _EARLY_S
        for at, frame in nic.early:
            if at > since:
                self._to_guest(nic, frame)
        nic.early.clear()
        return {}

    def _plan(self, request: dict[str, Any]) -> dict[str, Any]:
        """Write frames to a TAP at once, and again after each of these delays."""
        index = self._nics.index(self._nic(request))
        try:
            frames = [bytes.fromhex(text) for text in request["frames"]]
            delays_s = [float(delay_s) for delay_s in request["after_s"]]
        except (KeyError, TypeError, ValueError):
            raise _Wrong("send takes frames, in hexadecimal, and after_s, in seconds") from None
        if not all(0 <= delay_s <= MAX_DELAY_S for delay_s in delays_s):
            raise _Wrong(f"a frame is sent after 0 to {MAX_DELAY_S} s")
        if len(self._planned) + len(frames) * len(delays_s) > MAX_PLANNED:
            raise _Wrong(f"more than {MAX_PLANNED:,} frames are waiting for their moment")
        now = time.monotonic()
        for delay_s in delays_s:
            for frame in frames:
                self._plans += 1
                heapq.heappush(self._planned, (now + delay_s, self._plans, index, frame))
        self._send_planned()
        return {}

    def _take(self, connection: socket.socket, give: list[int]) -> dict[str, Any]:
        """Another owner; what the last one has not committed is dropped. It gets copies of all descriptors."""
        self._abandon()
        self._owner = connection
        if self._mode == "shut":
            self._mode = "hold"
        give += [nic.tap for nic in self._nics]
        give += [nic.guest.fileno() for nic in self._nics if nic.guest is not None]
        if self._listener is not None:
            give.append(self._listener.fileno())
        settings = {"held_frames": self._most_frames, "held_bytes": self._most_bytes}
        return {**self._status(), **settings, "has_listener": self._listener is not None, "pid": os.getpid()}

    def _status(self) -> dict[str, Any]:
        return {
            "mode": self._mode,
            "marked": self._marked,
            "released": self._released,
            "is_full": self._is_full(),
            "latency": {"counts": self._latencies, "sum_s": self._latency_s, "max_s": self._longest_s},
            "nics": [nic.status() for nic in self._nics],
        }


class _Wrong(Exception):
    """A request that cannot be fulfilled, and why."""


def _number(request: dict[str, Any], key: str) -> int:
    number = request.get(key)
    if type(number) is not int or not 0 <= number < 1 << 64:
        raise _Wrong(f"{key} is a number from 0 to 2⁶⁴ - 1, not {number!r:.100}")
    return number


def main() -> None:
    """Bridge what the command line names."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    gc.disable()  # nothing here is a cycle, and a collection among many frames takes longer than a pause may
    Bridge(json.loads(sys.argv[1])).run()


if __name__ == "__main__":
    main()
