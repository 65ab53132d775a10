"""A client of the guest's service (guest/init.c) that checks every byte, across failovers.

    python client.py HOST PORT [SEED]

It keeps several requests in flight over one connection, and checks that each answer is the next one: the counter has
no gap or repeat, the chain covers the guest's randomness, and the checksum covers everything sent. It prints `ready`
with the first answer. It answers each line `status` on standard input with one JSON object: `answers` and `bytes`;
`faults`, `pages` and `blocks` as the guest counts them; `silence_s`, the longest time without an answer since the last
such line; and `wrong`, which is null or says what came instead of what. At the end of standard input it waits for the
answers that are due, and prints the same object. If something is wrong, it prints the object at once and exits.
"""

from __future__ import annotations

import json
import random
import select
import socket
import struct
import sys
import time
import zlib
from collections import deque

ANSWER = struct.Struct("<IIQQQQIIQQ")
REQUEST = struct.Struct("<IQ")
MAGIC = 0x53554D52
UNDER_WAY = 8
BOOT_S = 300.0
"""How long the guest may take for its first answer."""
DUE_S = 60.0
"""How long outstanding answers may take at the end."""


class Wrong(Exception):
    """An answer that contradicts an earlier one, or what was sent."""


class Stream:
    """Both directions of one connection, without the socket."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._number = self._sent_crc = 0
        self._due: deque[tuple[int, int]] = deque()
        self._came = bytearray()
        self._counter, self._chain = 0, 0xCBF29CE484222325
        self.bytes = self.faults = self.blocks = self.pages = 0

    @property
    def under_way(self) -> int:
        return len(self._due)

    @property
    def answers(self) -> int:
        return self._counter

    def request(self) -> bytes:
        self._number += 1
        payload = self._dice.randbytes(self._dice.randrange(1400))
        data = REQUEST.pack(len(payload), self._number) + payload
        self._sent_crc = zlib.crc32(data, self._sent_crc)
        self._due.append((self._number, self._sent_crc))
        return data

    def feed(self, data: bytes) -> int:
        """Returns how many answers it completes. Raises Wrong."""
        self._came += data
        self.bytes += len(data)
        count = 0
        while len(self._came) >= ANSWER.size:
            fields = ANSWER.unpack_from(self._came)
            end = ANSWER.size + fields[1]
            if len(self._came) < end and fields[0] == MAGIC:
                break
            self._check(fields, bytes(self._came[ANSWER.size : end]))
            del self._came[:end]
            count += 1
        return count

    def _check(self, fields: tuple[int, ...], filler: bytes) -> None:
        magic, size, counter, number, fresh, chain, echo, self.faults, self.pages, self.blocks = fields
        if not self._due:
            raise Wrong(f"answer {counter} to request {number}, but none is due")
        due, crc = self._due.popleft()
        for byte in fresh.to_bytes(8, "little"):
            self._chain = (self._chain ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
        self._counter += 1
        expected = (MAGIC, fresh % 1400, self._counter, due, self._chain, crc)
        came = (magic, size, counter, number, chain, echo)
        if came != expected:
            raise Wrong(f"magic, filler, counter, number, chain, echo: {came} instead of {expected}")
        if filler != (fresh.to_bytes(8, "little") * 176)[: len(filler)]:
            raise Wrong(f"answer {counter}: its filler is not that of {fresh:#x}")


def main() -> None:
    host, port, seed = sys.argv[1], int(sys.argv[2]), int((sys.argv[3:] or ["1"])[0])
    deadline = time.monotonic() + BOOT_S
    while True:
        try:
            connection = socket.create_connection((host, port), 2)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream = Stream(seed)
    silence_s, last, is_over = 0.0, time.monotonic(), False

    def tell(wrong: str | None) -> None:
        told = {name: getattr(stream, name) for name in ("answers", "bytes", "faults", "pages", "blocks")}
        print(json.dumps({**told, "silence_s": max(silence_s, time.monotonic() - last), "wrong": wrong}), flush=True)

    try:
        while not is_over or stream.under_way:
            while not is_over and stream.under_way < UNDER_WAY:
                connection.sendall(stream.request())
            ready, _, _ = select.select([connection] if is_over else [connection, sys.stdin], [], [], DUE_S)
            if not ready:
                raise Wrong(f"no answer in {DUE_S:g} s, and {stream.under_way} are due")
            if connection in ready:
                data = connection.recv(1 << 16)
                if not data:
                    raise Wrong("the service has closed the connection")
                if not stream.answers:
                    print("ready", flush=True)
                    last = time.monotonic()
                if stream.feed(data):
                    now = time.monotonic()
                    silence_s, last = max(silence_s, now - last), now
            if sys.stdin in ready:
                if sys.stdin.readline():
                    tell(None)
                    silence_s = 0.0
                else:
                    is_over = True
        tell(None)
    except (Wrong, OSError) as error:
        tell(str(error))


if __name__ == "__main__":
    main()
