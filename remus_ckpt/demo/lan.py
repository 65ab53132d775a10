"""Hosts and the wires between them, on one machine: network namespaces with their own addresses. With two hosts:

    host a: 10.83.9.11, tap0   ─┐
    host b: 10.83.9.12, tap7   ─┼─ switch        a guest at one of the TAP devices has 10.83.9.2
    client: 10.83.9.1          ─┘

Source: ip-netns(8), ip-link(8), ip-neighbour(8), setns(2).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from types import TracebackType
from typing import Self

from remus_ckpt.errors import RemusError

GUEST = "10.83.9.2"
_NOBODY = "02:00:00:00:00:01"
"""An Ethernet address that no host has."""
_CLONE_NEWNET = 0x40000000
_numbers = count()


class Host:
    """A network namespace.

    address: its own
    tap: its device for guests, "" for none
    """

    def __init__(self, namespace: str, address: str, tap: str = "") -> None:
        self.namespace = namespace
        self.address = address
        self.tap = tap

    def inside(self, *words: object) -> list[str]:
        """The command line that runs a command here."""
        return ["ip", "netns", "exec", self.namespace, *map(str, words)]

    def pids(self) -> list[int]:
        """The processes that run here."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def kill(self) -> int:
        """A power failure: kill every process here. Returns how many there were."""
        killed: set[int] = set()
        while pids := self.pids():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            killed.update(pids)
            time.sleep(0.002)
        return len(killed)

    def fence(self) -> str:
        """A shell command that does the same, and succeeds once nothing is left."""
        pids = f"$(ip netns pids {self.namespace})"
        return f'while [ -n "{pids}" ]; do kill -9 {pids} 2>/dev/null; sleep 0.01; done'

    def cut(self) -> None:
        """Pull the cable."""
        _ip("-n", self.namespace, "link", "set", "wire", "down")

    def mend(self) -> None:
        """Put it back."""
        _ip("-n", self.namespace, "link", "set", "wire", "up")

    def cut_from(self, other: Host) -> None:
        """Let nothing through between two hosts, either way. Neither is told, and everything else works on."""
        for here, there in ((self, other), (other, self)):
            _ip(*f"-n {here.namespace} neigh replace {there.address} lladdr {_NOBODY} dev br0 nud permanent".split())

    def mend_to(self, other: Host) -> None:
        """Undo `cut_from`."""
        for here, there in ((self, other), (other, self)):
            _ip(*f"-n {here.namespace} neigh del {there.address} dev br0".split())

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Within the block, the calling thread is here, and so is anything that it starts. Raises OSError."""
        with open("/proc/thread-self/ns/net", "rb") as before, open(f"/run/netns/{self.namespace}", "rb") as here:
            _set_namespace(here.fileno())
            try:
                yield
            finally:
                _set_namespace(before.fileno())


class Network:
    """Hosts on one switch. At the end of a `with` block all that runs on them is killed.

    names: of the hosts, with the address and the TAP device of each
    Raises RemusError.
    """

    def __init__(self, names: Mapping[str, tuple[str, str]]) -> None:
        stem = f"remus-{os.getpid()}-{next(_numbers)}"
        self._switch = f"{stem}-switch"
        self.hosts = {name: Host(f"{stem}-{name}", *where) for name, where in names.items()}
        self._made: list[str] = []
        try:
            for namespace in (self._switch, *(host.namespace for host in self.hosts.values())):
                _ip("netns", "add", namespace)
                self._made.append(namespace)
            _batch(self._switch, ["link add switch type bridge", "link set switch up", "link set lo up"])
            for number, host in enumerate(self.hosts.values()):
                self._connect(host, number)
        except BaseException:
            self.close()
            raise

    def _connect(self, host: Host, number: int) -> None:
        port = f"port{number}"
        _batch(
            self._switch,
            [
                f"link add {port} type veth peer name wire netns {host.namespace}",
                f"link set {port} master switch up",
            ],
        )
        lines = ["link set lo up", "link add br0 type bridge", "link set wire master br0 up"]
        if host.tap:
            lines += [f"tuntap add {host.tap} mode tap", f"link set {host.tap} master br0 up"]
        _batch(host.namespace, [*lines, "link set br0 up", f"addr add {host.address}/24 dev br0"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill what runs there, and take it apart."""
        for host in self.hosts.values():
            if host.namespace in self._made:
                host.kill()
        while self._made:
            _ip("netns", "del", self._made.pop())


class Lan(Network):
    """Two hosts and a client.

    taps: a TAP device for guests on each host, in the bridge br0 there; "" for none
    """

    def __init__(self, taps: tuple[str, str] = ("tap0", "tap7")) -> None:
        a, b = taps
        super().__init__({"a": ("10.83.9.11", a), "b": ("10.83.9.12", b), "client": ("10.83.9.1", "")})
        self.a, self.b, self.client = self.hosts.values()


def _set_namespace(number: int) -> None:
    # os.setns came with Python 3.12.
    if ctypes.CDLL(None, use_errno=True).setns(number, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _ip(*words: str) -> str:
    return _run(["ip", *words])


def _batch(namespace: str, lines: Sequence[str]) -> None:
    _run(["ip", "-n", namespace, "-batch", "-"], "\n".join(lines) + "\n")


def _run(words: list[str], given: str = "") -> str:
    done = subprocess.run(words, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RemusError(f"`{' '.join(words)}`: {done.stderr.strip() or done.returncode}")
    return done.stdout
