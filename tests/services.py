"""The services as users start them, in processes of their own, and looked at from outside."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from remus_ckpt.link.address import Address
from remus_ckpt.link.control import ask
from remus_ckpt.link.dial import connect
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.service import keys
from remus_ckpt.service.protect import protect

LONG_S = 30.0
"""A wait that is only reached when something is broken."""
SLACK_S = 2.0
"""A busy machine may add so much."""
PAGES = 16


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


@contextmanager
def within(timeout_s: float) -> Iterator[None]:
    """What is in the block keeps its time."""
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < timeout_s + SLACK_S


def make_keys(folder: Path) -> Path:
    """Certificates: good ones, one of another CA, one that has expired."""
    now = datetime.now(UTC)
    keys.init(folder / "ca", now=now - timedelta(days=100))
    keys.issue(folder / "ca", "backup", hosts=["127.0.0.1"])
    keys.issue(folder / "ca", "primary")
    keys.issue(folder / "ca", "expired", days=1, now=now - timedelta(days=50))
    keys.init(folder / "other")
    keys.issue(folder / "other", "stranger")
    return folder


@dataclass
class Figures:
    """What the system says of a process. rss: bytes"""

    rss: int
    fds: int
    threads: int

    def is_within(self, before: Figures) -> bool:
        """Whether it holds nothing more than before. One that has just started may have a thread that soon ends: the
        threads alone do not tell whether all connections are over."""
        return self.threads <= before.threads and self.fds <= before.fds


class Service:
    """The backup, as users start it."""

    def __init__(self, process: subprocess.Popen[str], address: str, log: Path, folder: Path) -> None:
        self.process = process
        self.address = address
        self.host, port = address.removeprefix("tls://").rsplit(":", 1)
        self.port = int(port)
        self.log = log
        self.folder = folder

    def figures(self) -> Figures:
        proc = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        return Figures(
            rss=int(status["VmRSS"].split()[0]) << 10,
            fds=len(os.listdir(proc / "fd")),
            threads=int(status["Threads"]),
        )

    def lines(self) -> list[dict[str, Any]]:
        """Of the log; what is not JSON is an error that nobody caught."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def complaints(self) -> Counter[int]:
        """How many lines above INFO each port of a peer has got."""
        ports = [
            line.get("peer", "").split(" ")[0].rpartition(":")[2] for line in self.lines() if line["level"] != "info"
        ]
        return Counter(int(port) for port in ports if port)

    def dial(self, bind: str | None = None) -> socket.socket:
        source = (bind, 0) if bind else None
        return socket.create_connection((self.host, self.port), timeout=LONG_S, source_address=source)

    def dial_tls(self, who: str | None = "ca/primary") -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=self.folder / "ca" / "ca.pem")
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if who is not None:
            context.load_cert_chain(self.folder / who / "cert.pem", self.folder / who / "key.pem")
        return context.wrap_socket(self.dial(), server_hostname="127.0.0.1")

    def protecting(self, name: str, **options: Any) -> Any:
        array = np.zeros((PAGES, 512), dtype=np.int64)
        tls = self.folder / "ca" / "primary"
        return array, protect({"array": array}, to=self.address, name=name, tls_dir=tls, **options)

    def ask(self, method: str = "status", **arguments: Any) -> dict[str, Any]:
        tls = TlsFiles(self.folder / "ca" / "primary")
        return ask(connect(Address.parse(self.address), tls=tls), method, arguments, timeout_s=LONG_S)


@contextmanager
def command(
    *arguments: object, log: Path, inside: tuple[str, ...] = (), **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """`remus-ckpt` in a process of its own, ended with the block. inside: the command that starts it"""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*inside, sys.executable, "-m", "remus_ckpt", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | environment,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@contextmanager
def service(tmp_path: Path, folder: Path, *options: object, listen: str = "tls://127.0.0.1:0") -> Iterator[Service]:
    """A backup that listens, with its store in tmp_path."""
    log = tmp_path / "backup.log"
    with command(
        "backup", "--listen", listen, "--store", tmp_path / "store", "--tls-dir", folder / "ca" / "backup",
        "--log-format", "json", *options, log=log,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        address = process.stdout.readline().removeprefix("listening on ").strip()
        assert address, log.read_text()
        yield Service(process, address, log, folder)
