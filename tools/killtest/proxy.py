"""What stands between primary and backup: it forwards, hears what they say, and breaks it when it is told to."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import msgpack

Direction = Literal["up", "down"]
"""From the primary to the backup, and back."""
_PIECE_BYTES = 1 << 16
_HEADER = struct.Struct("<BBHIII")
_PREFACE_BYTES = 8
_WELCOME, _BEGIN, _DATA, _ACK, _HEARTBEAT, _ERROR = 2, 3, 4, 6, 7, 8
_LEVELS = ("received", "durable", "applied")


class Frames:
    """Reads a session from one side, by specs/session.md §1–§3 alone and not by the code that is under test."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._skip = _PREFACE_BYTES

    def feed(self, data: bytes) -> list[tuple[int, dict[str, Any]]]:
        """The control frames that end in these bytes: type and map."""
        found: list[tuple[int, dict[str, Any]]] = []
        self._bytes += data
        while True:
            skipped = min(self._skip, len(self._bytes))
            del self._bytes[:skipped]
            self._skip -= skipped
            if self._skip or len(self._bytes) < _HEADER.size:
                return found
            kind, _, _, length, _, _ = _HEADER.unpack_from(self._bytes)
            if kind == _DATA:
                self._skip = _HEADER.size + length
            elif len(self._bytes) < _HEADER.size + length:
                return found
            else:
                found.append((kind, msgpack.unpackb(self._bytes[_HEADER.size : _HEADER.size + length])))
                self._skip = _HEADER.size + length


@dataclass(frozen=True, slots=True)
class Held:
    """A position that the backup said it holds: by an acknowledgement, or in a welcome."""

    at: float
    epoch: int
    digest: str


@dataclass(slots=True)
class Flip:
    """A bit that was changed on its way."""

    pair: Pair
    direction: Direction


class Pair:
    """One connection, and the one behind it."""

    def __init__(self, number: int, client: socket.socket, server: socket.socket) -> None:
        self.number = number
        self.ends: dict[Direction, tuple[socket.socket, socket.socket]] = {
            "up": (client, server),
            "down": (server, client),
        }
        self.frames = {"up": Frames(), "down": Frames()}
        self.is_hole = False
        self.ended_by = ""
        """"client", "server" or "harness": who hung up first."""
        self.left = 2
        self.lock = threading.Lock()

    def end(self, who: str) -> None:
        """Note who hung up first."""
        with self.lock:
            self.ended_by = self.ended_by or who

    def cut(self, *, reset: bool = False) -> None:
        """Hang up on both."""
        self.end("harness")
        for sock, _ in self.ends.values():
            with suppress(OSError):
                if reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.shutdown(socket.SHUT_RDWR)


class Proxy:
    """Listens for a primary and connects it to the backup, whose port may change when it is started again.

    wait: which level counts as committed
    is_blind: what they say is encrypted, and not heard
    """

    def __init__(self, wait: str, draw: random.Random, *, is_blind: bool = False) -> None:
        self.wait = wait
        self.is_blind = is_blind
        self.target = 0
        self.held: list[Held] = []
        """What reached the primary, wholly or in part, in order."""
        self.newest_said = -1
        """The newest epoch that any backup has said to hold, whether that reached the primary or not."""
        self.begins: list[tuple[int, str]] = []
        """(number of the connection, "full" or "continue")"""
        self.errors: list[tuple[str, str, str]] = []
        """(who said it, code, message)"""
        self.faults: list[str] = []
        """What is wrong by what was heard."""
        self.flips: list[Flip] = []
        self.pairs: list[Pair] = []
        self._draw = draw
        self._lock = threading.Lock()
        self._delay_s = 0.0
        self._delay_until = 0.0
        self._armed: dict[Direction, tuple[str, bool]] = {}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    # Faults

    def drop(self, *, reset: bool) -> None:
        """Hang up on all."""
        for pair in self.open_pairs():
            pair.cut(reset=reset)

    def delay(self, piece_s: float, for_s: float) -> None:
        """Hold each piece back for a while."""
        self._delay_until = time.monotonic() + for_s
        self._delay_s = piece_s

    def arm(self, direction: Direction, what: Literal["flip", "truncate"], *, heartbeat: bool = False) -> None:
        """Do that to the next piece that goes this way.

        heartbeat: to the next that ends with one: of all frames they are the ones that nothing else depends on
        """
        self._armed[direction] = what, heartbeat and not self.is_blind

    def is_armed(self, direction: Direction) -> bool:
        """Whether it waits for a piece."""
        return direction in self._armed

    def disarm(self, direction: Direction) -> bool:
        """Whether it was still waiting for a piece."""
        return self._armed.pop(direction, None) is not None

    def swallow(self) -> None:
        """Forward nothing any more on the connections that are open, and say nothing."""
        for pair in self.open_pairs():
            pair.is_hole = True

    def open_pairs(self) -> list[Pair]:
        """The connections on which nobody has hung up."""
        with self._lock:
            return [pair for pair in self.pairs if not pair.ended_by]

    def close(self) -> None:
        """End all threads."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            pairs, threads = list(self.pairs), list(self._threads)
        for pair in pairs:
            pair.cut()
        for thread in threads:
            thread.join(10.0)
            assert not thread.is_alive(), "a thread of the proxy does not end"

    # Threads

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target), timeout=2.0)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                pair = Pair(len(self.pairs), client, server)
                pumps = [threading.Thread(target=self._pump, args=(pair, way), daemon=True) for way in ("up", "down")]
                self.pairs.append(pair)
                self._threads += pumps
            for pump in pumps:
                pump.start()

    def _pump(self, pair: Pair, direction: Direction) -> None:
        source, target = pair.ends[direction]
        while True:
            try:
                data = source.recv(_PIECE_BYTES)
            except OSError:
                data = b""
            if not data:
                pair.end("client" if direction == "up" else "server")
                break
            if time.monotonic() < self._delay_until:
                time.sleep(self._delay_s)
            if not self._forward(pair, direction, target, data):
                break
        if not pair.is_hole:
            with suppress(OSError):
                target.shutdown(socket.SHUT_WR)
        with pair.lock:
            pair.left -= 1
            is_last = not pair.left
        if is_last:
            for sock, _ in pair.ends.values():
                sock.close()

    def _forward(self, pair: Pair, direction: Direction, target: socket.socket, data: bytes) -> bool:
        """Whether it goes on."""
        forwarded = not pair.is_hole
        kinds = self._hear(pair, direction, data, forwarded)
        if not forwarded:
            return True
        what, heartbeat = self._armed.get(direction, ("", False))
        if what and (not heartbeat or kinds[-1:] == [_HEARTBEAT]):
            self._armed.pop(direction, None)
        else:
            what = ""
        if what == "flip":
            changed = bytearray(data)
            changed[self._draw.randrange(len(data))] ^= 1 << self._draw.randrange(8)
            data = bytes(changed)
            self.flips.append(Flip(pair, direction))
        elif what == "truncate":
            data = data[: self._draw.randrange(len(data))]
        try:
            target.sendall(data)
        except OSError:
            pair.end("server" if direction == "up" else "client")
            return False
        if what == "truncate":
            pair.end("harness")
            with suppress(OSError):
                target.shutdown(socket.SHUT_WR)
            time.sleep(0.005)
            pair.cut()
            return False
        return True

    def _hear(self, pair: Pair, direction: Direction, data: bytes, forwarded: bool) -> list[int]:
        """The kinds of the control frames that end in this piece."""
        if self.is_blind:
            return []
        now = time.monotonic()
        heard = pair.frames[direction].feed(data)
        for kind, message in heard:
            if kind == _ERROR:
                self.errors.append((direction, message["code"], message["message"]))
            elif direction == "up" and kind == _BEGIN and forwarded:
                self.begins.append((pair.number, message["mode"]))
            elif direction == "down" and kind in (_WELCOME, _ACK):
                position = message.get("position")
                if kind == _WELCOME:
                    holds = -1 if position is None else position[0]
                    if holds < self.newest_said:
                        self.faults.append(f"the backup said that it held {self.newest_said}, and now holds {holds}")
                elif _LEVELS.index(message["level"]) < _LEVELS.index("durable"):
                    continue
                if position is None:
                    continue
                self.newest_said = max(self.newest_said, position[0])
                is_enough = kind == _WELCOME or _LEVELS.index(message["level"]) >= _LEVELS.index(self.wait)
                if forwarded and is_enough:
                    self.held.append(Held(now, position[0], position[1].hex()))
        return [kind for kind, _ in heard]
