"""What tests share that bridge a guest to a network: namespaces with TAP devices, and frames that can be told apart."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count

from remus_ckpt.vm.tap import Tap, open_tap

GUEST_MAC = bytes.fromhex("525400831401")
HOST_MAC = bytes.fromhex("525400831402")
KIND = 0x88B5
"""The EtherType for experiments: no kernel answers it."""
_CLONE_NEWNET = 0x40000000
SO_RCVBUFFORCE = 33
_numbers = count()


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Have this thread in a network namespace until the end of the block."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net", "rb") as before, open(f"/run/netns/{namespace}", "rb") as there:
        if libc.setns(there.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        try:
            yield
        finally:
            assert not libc.setns(before.fileno(), _CLONE_NEWNET)


class Network:
    """A namespace that TAP devices can be put into.

    name: of the namespace
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", "-n", self.name, *words], check=True)

    def tap(self, name: str = "tap0", *addresses: str) -> Tap:
        """A new TAP device, up, with these addresses, such as 10.0.0.1/24."""
        with inside(self.name):
            tap = open_tap(name)
        for address in addresses:
            self.ip("addr", "add", address, "dev", name)
        return tap

    def ear(self, device: str = "tap0") -> Ear:
        """Hears what the network gets from now on."""
        with inside(self.name):
            return Ear(device)


class Ear:
    """The frames that come out of a TAP device into the network, and a mouth for frames that go in."""

    def __init__(self, device: str) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        self.socket.bind((device, 0))

    def frames(self, most: int, timeout_s: float = 5.0, kind: int = KIND) -> list[bytes]:
        """Frames of a kind as they come: so many, or what came before nothing had come for a while."""
        found = []
        self.socket.settimeout(timeout_s)
        while len(found) < most:
            try:
                frame, (_, _, direction, *_) = self.socket.recvfrom(1 << 17)
            except TimeoutError:
                break
            # Outgoing is what this host sends itself, such as its neighbour discovery.
            if direction != socket.PACKET_OUTGOING and frame[12:14] == struct.pack(">H", kind):
                found.append(frame)
        return found

    def numbers(self, most: int, timeout_s: float = 5.0) -> list[int]:
        """The same, as the numbers of `frame`."""
        return [number_of(frame) for frame in self.frames(most, timeout_s)]

    def silence(self, timeout_s: float = 0.3) -> bool:
        """Whether nothing comes."""
        return not self.frames(1, timeout_s)

    def close(self) -> None:
        self.socket.close()


@contextmanager
def network() -> Iterator[Network]:
    """A namespace of its own, until the end of the block."""
    name = f"remus-{os.getpid()}-{next(_numbers)}"
    with ExitStack() as stack:
        subprocess.run(["ip", "netns", "add", name], check=True)
        stack.callback(subprocess.run, ["ip", "netns", "del", name], check=True)
        # Nothing of this kernel's own in what is heard.
        subprocess.run(
            ["ip", "netns", "exec", name, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6"],
            check=True,
        )
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield Network(name)


def frame(number: int, size: int = 60, *, source: bytes = GUEST_MAC, to: bytes = HOST_MAC) -> bytes:
    """An Ethernet frame that carries a number."""
    head = to + source + struct.pack(">HQ", KIND, number)
    return head + bytes(max(size - len(head), 0))


def number_of(frame: bytes) -> int:
    number: int = struct.unpack_from(">Q", frame, 14)[0]
    return number


def send_all(guest: socket.socket, frames: Iterator[bytes] | list[bytes]) -> None:
    """Send frames as a guest does: wait where there is no room."""
    guest.settimeout(20)
    for one in frames:
        guest.send(one)


def until(question: object, timeout_s: float = 20.0) -> None:
    """Wait until a question is answered by yes."""
    deadline = time.monotonic() + timeout_s
    while not question():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.002)
