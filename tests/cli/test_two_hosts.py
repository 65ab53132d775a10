"""The operator's day on two hosts: namespaces with addresses of their own, joined by a link as fast as is asked for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from services import LONG_S, until
from support import process_state

pytestmark = [pytest.mark.root, pytest.mark.slow]

PAGE = 4096
AT = "tls://10.83.7.2:7411"
WORKER = """
import mmap, sys, time
file = open(sys.argv[1], "r+b")
memory = mmap.mmap(file.fileno(), 0)
memory[:] = bytes(range(1, 17)) * (len(memory) // 16)
print("ready", flush=True)
number = 0
while True:
    number += 1
    memory[8 * (number % 64):8 * (number % 64) + 8] = number.to_bytes(8, "little")
    time.sleep(0.002)
"""


class Host:
    """A network namespace, and what runs in it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder

    def _inside(self, *arguments: object) -> list[str]:
        return ["ip", "netns", "exec", self.name, *map(str, arguments)]

    def run(self, *arguments: object, timeout_s: float = LONG_S) -> subprocess.CompletedProcess[str]:
        """Run the command here to its end."""
        return subprocess.run(
            self._inside(sys.executable, "-m", "remus_ckpt", *arguments),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def ask(self, *arguments: object) -> dict[str, Any]:
        """What the command says with --json. It must succeed."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    @contextmanager
    def start(self, *arguments: object, word: str = "") -> Iterator[subprocess.Popen[bytes]]:
        """Run the command here until the block ends."""
        with self.program(sys.executable, "-m", "remus_ckpt", *arguments, word=word) as process:
            yield process

    @contextmanager
    def program(self, *arguments: object, word: str = "") -> Iterator[subprocess.Popen[bytes]]:
        """Run a program here until the block ends. word: what its first line begins with, which is waited for"""
        with (
            open(self.folder / f"{time.monotonic_ns()}.log", "wb") as log,
            subprocess.Popen(self._inside(*arguments), stdout=subprocess.PIPE, stderr=log) as process,
        ):
            try:
                assert process.stdout is not None
                if word:
                    assert process.stdout.readline().decode().startswith(word), Path(log.name).read_text()
                yield process
            finally:
                process.kill()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts: 10.83.7.1 with the work, 10.83.7.2 with the backup."""
    names = [f"remus-{os.getpid()}-{which}" for which in "ab"]
    with ExitStack() as stack:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=True)
        link = [
            "ip",
            "link",
            "add",
            "wire",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "wire",
            "netns",
            names[1],
        ]
        subprocess.run(link, check=True)
        for number, name in enumerate(names, 1):
            for words in (["addr", "add", f"10.83.7.{number}/24", "dev", "wire"], ["link", "set", "wire", "up"]):
                subprocess.run(["ip", "-n", name, *words], check=True)
            subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield Host(names[0], tmp_path), Host(names[1], tmp_path)


@pytest.fixture
def keys(tmp_path: Path, hosts: tuple[Host, Host]) -> Path:
    """The authority's folder, with a certificate for each host in it."""
    folder = tmp_path / "keys"
    here, _ = hosts
    for words in (["init", folder], ["issue", folder, "backup", "--host", "10.83.7.2"], ["issue", folder, "orders"]):
        done = here.run("keys", *words)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def memory(hosts: tuple[Host, Host]) -> Iterator[Path]:
    path = Path(f"/dev/shm/remus-two-hosts-{os.getpid()}")
    path.write_bytes(bytes(4096 * PAGE))
    yield path
    path.unlink()


@contextmanager
def worker(host: Host, memory: Path) -> Iterator[subprocess.Popen[bytes]]:
    with host.program(sys.executable, "-c", WORKER, memory, word="ready") as process:
        yield process


def backup_of(host: Host, store: Path, keys: Path, *options: object) -> Any:
    where = ["--listen", AT.removeprefix("tls://"), "--store", store, "--tls-dir", keys / "backup"]
    return host.start("backup", *where, *options, word="listening")


def protect_of(host: Host, memory: Path, pid: int, keys: Path, *options: object) -> Any:
    where = ["--to", AT, "--tls-dir", keys / "orders", "--name", "orders"]
    return host.start("protect", memory, "--pid", pid, *where, *options)


def status(host: Host, keys: Path) -> dict[str, Any]:
    found = host.ask("status", "--from", AT, "--tls-dir", keys / "orders")["names"].get("orders", {})
    assert isinstance(found, dict)
    return found


def test_a_first_copy_over_a_slow_link_is_watched(
    hosts: tuple[Host, Host], keys: Path, memory: Path, tmp_path: Path
) -> None:
    a, b = hosts
    slow = ["tbf", "rate", "10mbit", "burst", "64kb", "latency", "200ms"]
    with backup_of(b, tmp_path / "store", keys), worker(a, memory) as work:
        subprocess.run(["tc", "-n", a.name, "qdisc", "add", "dev", "wire", "root", *slow], check=True)
        with protect_of(a, memory, work.pid, keys, "--compression", "none"):
            shares: list[float] = []

            def is_copied() -> bool:
                found = status(b, keys)
                if (copy := found.get("first_copy")) and (share := copy.get("done")) is not None:
                    shares.append(share)
                return found.get("epoch") is not None

            until(is_copied)
    assert len(shares) >= 2 and shares == sorted(shares) and 0 <= shares[0] < shares[-1] <= 1, shares


def test_a_disk_that_is_full_before_the_first_commit(
    hosts: tuple[Host, Host], keys: Path, memory: Path, tmp_path: Path
) -> None:
    a, b = hosts
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", disk], check=True)
    try:
        with (
            backup_of(b, disk / "store", keys, "--warm", tmp_path / "warm"),
            worker(a, memory) as work,
            protect_of(a, memory, work.pid, keys),
        ):
            until(lambda: a.run("status", "--from", AT, "--tls-dir", keys / "orders", "--check").returncode == 2)
            said = a.run("status", "--from", AT, "--tls-dir", keys / "orders", "--check").stdout
            assert re.search("room|full|space", said), said
            subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
            until(lambda: status(b, keys).get("epoch") is not None)
            until(lambda: a.run("status", "--from", AT, "--tls-dir", keys / "orders", "--check").returncode == 0)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_takeover_stops_the_work_there(hosts: tuple[Host, Host], keys: Path, memory: Path, tmp_path: Path) -> None:
    a, b = hosts
    with backup_of(b, tmp_path / "store", keys), worker(a, memory) as work:
        stop = f"kill -STOP {work.pid}; echo $REMUS_NAME $REMUS_TERM > {tmp_path}/fenced"
        with protect_of(a, memory, work.pid, keys, "--on-fenced", stop) as primary:
            until(lambda: status(b, keys).get("epoch") is not None)
            done = b.run("failover", "--from", AT, "--tls-dir", keys / "backup", "--name", "orders")
            assert done.returncode == 0, done.stderr
            assert primary.wait(LONG_S) == 22
        assert process_state(work.pid) == "T"
        assert (tmp_path / "fenced").read_text().split() == ["orders", "1"]


def test_the_fence_of_a_backup_that_was_restarted(
    hosts: tuple[Host, Host], keys: Path, memory: Path, tmp_path: Path
) -> None:
    a, b = hosts
    store, said = tmp_path / "store", tmp_path / "said"
    with worker(a, memory) as work:
        with backup_of(b, store, keys) as first, protect_of(a, memory, work.pid, keys) as primary:
            until(lambda: status(b, keys).get("epoch") is not None)
            first.kill()
            first.wait()
            primary.kill()
            primary.wait()
        fence = f"echo $REMUS_PEER_HOST $REMUS_PEER_CERT > {said}"
        with backup_of(b, store, keys, "--fence", fence, "--auto-failover", "--lease", "1s"):
            until(lambda: status(b, keys).get("role") == "promoted")
    assert said.read_text().split() == ["10.83.7.1", "orders"]


ARRAYS = """
import sys, time, numpy as np
from remus_ckpt import protect
prices = np.arange(200_000, dtype=np.float64)
with protect({"prices": prices}, to=sys.argv[1], name="desk", tls_dir=sys.argv[2]) as protection:
    prices[7] = 42.5
    protection.checkpoint(wait=True)
    print("ready", flush=True)
    time.sleep(60)
"""
FETCH = """
import sys, numpy as np
from remus_ckpt import Remote
mine = np.zeros(200_000)
Remote(sys.argv[1] + "/desk", tls_dir=sys.argv[2])[-1].restore(into={"prices": mine})
print(mine[7], mine[199_999])
"""


def test_arrays_come_over_the_network_into_a_running_program(
    hosts: tuple[Host, Host], keys: Path, tmp_path: Path
) -> None:
    a, b = hosts
    with (
        backup_of(b, tmp_path / "store", keys),
        a.program(sys.executable, "-c", ARRAYS, AT, keys / "orders", word="ready"),
        a.program(sys.executable, "-c", FETCH, AT, keys / "orders", word="42.5 199999.0"),
    ):
        pass


def test_a_rotation_and_a_revocation_under_running_services(
    hosts: tuple[Host, Host], keys: Path, memory: Path, tmp_path: Path
) -> None:
    a, b = hosts
    with (
        backup_of(b, tmp_path / "store", keys),
        worker(a, memory) as work,
        protect_of(a, memory, work.pid, keys) as primary,
    ):

        def goes_on() -> None:
            before = status(b, keys).get("epoch") or 0
            until(lambda: (status(b, keys).get("epoch") or 0) > before)

        goes_on()
        for stage in ("begin", "reissue", "finish"):
            done = a.run("keys", "rotate", keys, stage)
            assert done.returncode == 0, done.stderr
            goes_on()
        assert primary.poll() is None
        assert a.run("keys", "issue", keys, "laptop").returncode == 0
        assert a.run("status", "--from", AT, "--tls-dir", keys / "laptop").returncode == 0
        assert a.run("keys", "revoke", keys, "laptop").returncode == 0
        done = a.run("status", "--from", AT, "--tls-dir", keys / "laptop")
        assert done.returncode != 0 and "revoked" in done.stderr
        goes_on()
        assert a.run("keys", "revoke", keys, "orders").returncode == 0
        spare = ["status", "--from", AT, "--tls-dir", keys / "backup"]
        until(lambda: not b.ask(*spare)["names"]["orders"]["connected"])
