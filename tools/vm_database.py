"""A guest that is not ours: Debian's redis on a disk of its own, under load from outside, while its hosts are killed.

    sudo python tools/vm_database.py --kills 20 [--seed 1] [--json FILE]

Two hosts, which are network namespaces with addresses of their own, have a backup each; the guest runs on one and is
protected by the other, goes on there when its host dies, and is protected again, and so on. It boots Debian's kernel
from an ext4 image made of Debian's packages (redis-tools, busybox-static, and the libraries that they need), and runs
redis with `appendfsync always`: what it has answered is on its disk.

Two loads come from a third namespace, over connections that live through all kills: Debian's redis-benchmark, and
transactions of ours (MULTI, RPUSH, SET, INCR, EXEC), of which each answer must be the next one. After each kill the
transactions rest, and everything that was ever acknowledged must be there, in its order: as the guest's memory has it,
and again after redis has forgotten it and read its file from the disk. The image of the disk as it was committed is
copied when the host is dead: e2fsck and redis-check-aof must find it sound.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from remus_ckpt.demo import guest
from remus_ckpt.demo.lan import GUEST, Host
from remus_ckpt.demo.vm import NAME, Scene, missing
from remus_ckpt.errors import RemusError

PACKAGES = ("redis-tools", "busybox-static")
FOLLOWED = ("lib", "gcc-", "zlib1g")
"""Of what the packages depend on, only libraries are needed."""
DRIVERS = [*guest.DRIVERS, "crc16", "crc32c_generic", "libcrc32c", "mbcache", "jbd2", "ext4"]
DISK_MIB = 192
PORT = 6379
REDIS = (
    f"--port {PORT} --bind 0.0.0.0 --protected-mode no --dir /var/lib/redis --save '' --appendonly yes --appendfsync "
    "always --auto-aof-rewrite-min-size 8mb --enable-debug-command yes --daemonize no --maxmemory-policy noeviction"
)
INIT = """#!/busybox sh
/busybox mkdir -p /dev /root
/busybox mount -t devtmpfs none /dev
for name in $(/busybox cat /modules/order); do /busybox insmod /modules/$name; done
/busybox mount -t ext4 /dev/vda /root || echo "no disk"
exec /busybox switch_root /root /start
"""
START = f"""#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t sysfs none /sys
/bin/busybox ifconfig lo 127.0.0.1 up
/bin/busybox ifconfig eth0 {GUEST} netmask 255.255.255.0 up
exec /usr/bin/redis-server {REDIS}
"""
CONNECTIONS = 8
MORE = 200
"""Transactions after a kill, before anything is looked at."""
PATIENCE_S = 120.0
CHECK_S = 60.0
REST_S = 0.5
"""By then redis has answered whatever was under way."""
WINDOW_S = 0.5
"""Until then after a kill, the image stands at the last commit: less than a lease."""


# The guest


def build(folder: Path) -> Path:
    """Build what is missing: `kernel`, `initramfs`, `disk.ext4`, and `root`, which is unpacked. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "kernel").exists():
        guest.get_kernel(folder, drivers=DRIVERS)
    if not (folder / "disk.ext4").exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _get_packages(Path(scratch))
            root = folder / "root"
            shutil.rmtree(root, ignore_errors=True)
            for package in sorted(Path(scratch).glob("*.deb")):
                _run("dpkg-deb", "-x", package, root)
        for name in ("dev", "proc", "sys", "tmp", "var/lib/redis"):
            (root / name).mkdir(parents=True, exist_ok=True)
        (root / "usr/bin/redis-server").symlink_to("redis-check-rdb")  # one program: it goes by its name
        (root / "start").write_text(START)
        (root / "start").chmod(0o755)
        for name in ("usr/share/doc", "usr/share/man", "usr/share/locale"):
            shutil.rmtree(root / name, ignore_errors=True)
        made = folder / "disk.part"
        made.unlink(missing_ok=True)
        _run("mke2fs", "-q", "-t", "ext4", "-d", root, made, f"{DISK_MIB}M")
        made.rename(folder / "disk.ext4")
    order = guest.in_order(folder / "modules")
    files = {"init": INIT.encode(), "busybox": (folder / "root/bin/busybox").read_bytes()}
    files |= {f"modules/{name}.ko": (folder / "modules" / f"{name}.ko").read_bytes() for name in order}
    files["modules/order"] = "".join(f"{name}.ko\n" for name in order).encode()
    (folder / "initramfs").write_bytes(guest.archive(files))
    return folder


def _get_packages(folder: Path) -> None:
    no = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
    told = _run("apt-cache", "depends", "--recurse", *no, *PACKAGES).split("\n")
    names = sorted({line for line in told if line.startswith(FOLLOWED) or line in PACKAGES})
    _run("apt-get", "-q", "download", *names, cwd=folder)


def _run(*words: object, cwd: Path | None = None, good: Sequence[int] = (0,)) -> str:
    done = subprocess.run(list(map(str, words)), cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode not in good:
        raise RemusError(f"`{words[0]}` fails ({done.returncode}): {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


class DatabaseScene(Scene):
    """Two hosts, one of which runs the guest. disk: its own; files: from `build`"""

    def __init__(self, folder: Path, files: Path, *, memory: str, **options: Any) -> None:
        self.files, self.disk, self.mib = files, folder / "own.ext4", memory
        shutil.copyfile(files / "disk.ext4", self.disk)
        super().__init__(folder, files, **options)

    def run_words(self, host: Host) -> list[str]:
        words = super().run_words(host)
        line = [
            "qemu-system-x86_64", "-nodefaults", "-m", self.mib, "-accel", "tcg", "-serial",
            f"file:{self.folder / 'console'}", "-kernel", self.files / "kernel", "-initrd", self.files / "initramfs",
            "-append", "console=ttyS0 quiet panic=-1 no_timer_check mitigations=off",
            "-nic", f"tap,ifname={host.tap},model=virtio,mac=52:54:00:83:14:01",
            "-drive", f"file={self.disk},if=virtio,format=raw,cache.no-flush=on",
        ]  # fmt: skip
        return [*words[: words.index("--") + 1], *map(str, line)]

    def image(self, host: Host, *, has_run: bool) -> Path:
        """The newest image of the guest's disk in a host's store: one that it has run on, or one that it has not."""
        images = list((self.folder / f"store-{self.letters[host]}" / ".disks" / NAME).glob("*.raw"))
        found = [path for path in images if Path(f"{path}.ran").exists() == has_run]
        return max(found, key=lambda path: path.stat().st_mtime_ns)

    def is_in_sync(self, by: Host) -> bool:
        """Whether a kill may come."""
        primary = self.status(by).get("primary") or {}
        return self.is_protected(by) and not primary.get("copy_pass") and not primary.get("disk_trouble")

    def has_gone_on(self, at: Host) -> bool:
        return bool(self.status(at).get("vm") == "running")


# The load, which is run in the client's namespace


class Redis:
    """A connection, in redis' own protocol (RESP, version 2)."""

    def __init__(self, host: str, patience_s: float = PATIENCE_S) -> None:
        self._socket = socket.create_connection((host, PORT), patience_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines = self._socket.makefile("rb")

    def ask(self, *commands: Sequence[object]) -> list[Any]:
        """The answers to these commands, given at once."""
        out = b""
        for words in commands:
            parts = [str(word).encode() for word in words]
            out += b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
        self._socket.sendall(out)
        return [self._answer() for _ in commands]

    def _answer(self) -> Any:
        line = self._lines.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionResetError("redis has hung up")
        kind, rest = line[:1], line[1:-2]
        match kind:
            case b":":
                return int(rest)
            case b"+":
                return rest.decode()
            case b"$":
                return None if rest == b"-1" else self._lines.read(int(rest) + 2)[:-2].decode()
            case b"*":
                return [self._answer() for _ in range(int(rest))]
        raise ValueError(f"redis says {line!r:.200}")


class Load:
    """Transactions over several connections, which rest when they are told to."""

    def __init__(self, host: str) -> None:
        self._go, self._is_over = threading.Event(), False
        self._go.set()
        self._host = host
        self.acknowledged = [0] * CONNECTIONS
        self.silence_s = 0.0
        self.wrong: str | None = None
        self._last = time.monotonic()
        self._resting = threading.Semaphore(0)
        for number in range(CONNECTIONS):
            threading.Thread(target=self._work, args=(number, Redis(host)), daemon=True).start()

    def _work(self, number: int, redis: Redis) -> None:
        try:
            while True:
                if not self._go.is_set():
                    self._resting.release()
                    self._go.wait()
                    self._last = time.monotonic()
                step = self.acknowledged[number] + 1
                keys = f"list:{number}", f"last:{number}"
                said = redis.ask(
                    ("MULTI",), ("RPUSH", keys[0], step), ("SET", keys[1], step), ("INCR", "total"), ("EXEC",)
                )[-1]
                if said[:2] != [step, "OK"] or said[2] < step:
                    raise ValueError(f"transaction {step} of connection {number}: {said}")
                self.acknowledged[number] = step
                now = time.monotonic()
                self.silence_s, self._last = max(self.silence_s, now - self._last), now
        except (OSError, ValueError, TypeError) as error:
            self.wrong = self.wrong or f"connection {number}: {error}"
            self._resting.release()

    def rest(self) -> None:
        """Let the transactions end, and begin no other."""
        self._go.clear()
        for _ in range(CONNECTIONS):
            if not self._resting.acquire(timeout=PATIENCE_S):
                self.wrong = self.wrong or f"no answer in {PATIENCE_S:g} s"

    def go_on(self) -> None:
        self._go.set()

    def check(self, redis: Redis) -> None:
        """While they rest: whether all that was acknowledged is there, and nothing else."""
        for number, count in enumerate(self.acknowledged):
            found = redis.ask(("LRANGE", f"list:{number}", 0, -1), ("GET", f"last:{number}"))
            if found[0] != [str(step) for step in range(1, count + 1)] or found[1] != (str(count) if count else None):
                raise ValueError(f"list {number}: {len(found[0])} steps up to {found[1]}, of {count} acknowledged")
        if redis.ask(("GET", "total"))[0] != str(sum(self.acknowledged)):
            raise ValueError("the number of transactions is not the sum of those acknowledged")

    def told(self) -> dict[str, Any]:
        silence_s, self.silence_s = max(self.silence_s, time.monotonic() - self._last), 0.0
        return {"acknowledged": sum(self.acknowledged), "silence_s": silence_s, "wrong": self.wrong}


def load(host: str) -> None:
    """Answer each line of standard input, `status` or `check`, with a line of JSON."""
    deadline = time.monotonic() + 300
    while True:
        try:
            redis = Redis(host, 2.0)
            if redis.ask(("PING",)) == ["PONG"]:
                break
        except (OSError, ValueError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    one = Load(host)
    print(json.dumps(one.told()), flush=True)
    for line in sys.stdin:
        if line == "check\n":
            one.rest()
            try:
                checker = Redis(host)
                one.check(checker)
                if (said := checker.ask(("DEBUG", "LOADAOF"))) != ["OK"]:
                    raise ValueError(f"redis does not read its file: {said}")
                one.check(checker)
            except (OSError, ValueError) as error:
                one.wrong = one.wrong or str(error)
            one.go_on()
        print(json.dumps(one.told()), flush=True)


class Client:
    """`load` in a process of its own, until `close`."""

    def __init__(self, inside: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [*inside, sys.executable, __file__, "--load", GUEST],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._line()  # once it has had an answer

    def ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()
        return self._line()

    def until_more(self, more: int) -> dict[str, Any]:
        """Wait for so many more transactions. The silence is the longest meanwhile."""
        told = self.ask("status")
        wanted, deadline, silence_s = told["acknowledged"] + more, time.monotonic() + PATIENCE_S, told["silence_s"]
        while told["acknowledged"] < wanted and not told["wrong"]:
            if time.monotonic() > deadline:
                return told | {"wrong": f"not {more} transactions in {PATIENCE_S:g} s"}
            time.sleep(0.02)
            told = self.ask("status")
            silence_s = max(silence_s, told["silence_s"])
        return told | {"silence_s": silence_s}

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise RemusError("the load has ended without a word")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def start_benchmark(inside: Sequence[str], root: Path) -> subprocess.Popen[bytes]:
    """Debian's own load, with the libraries of the guest."""
    folders = f"{root}/lib/x86_64-linux-gnu:{root}/usr/lib/x86_64-linux-gnu"
    words = [root / "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "--library-path", folders, "--argv0"]
    words += ["redis-benchmark", root / "usr/bin/redis-benchmark", "-h", GUEST, "-t", "set", "-r", "5000", "-d", "200"]
    return subprocess.Popen(
        [*inside, *map(str, words), "-n", "1000000000", "-c", "4", "-q"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


# The kills


def check_disk(image: Path, root: Path) -> None:
    """A disk as a reboot would find it. Raises RemusError if it is not sound. The image is changed."""
    _run("e2fsck", "-p", "-f", image, good=(0, 1))  # 1: the journal was replayed
    _run("e2fsck", "-n", "-f", image)
    with tempfile.TemporaryDirectory() as folder:
        _run("debugfs", "-R", f"rdump /var/lib/redis/appendonlydir {folder}", image)
        (manifest,) = Path(folder, "appendonlydir").glob("*.manifest")
        libraries = f"{root}/lib/x86_64-linux-gnu:{root}/usr/lib/x86_64-linux-gnu"
        loader = root / "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
        _run(
            *(loader, "--library-path", libraries, "--argv0", "redis-check-aof"),
            *(root / "usr/bin/redis-check-rdb", manifest),
            cwd=manifest.parent,
        )


def differing_blocks(one: Path, other: Path) -> int:
    """In how many blocks of 4 KiB two disks differ."""
    left, right = (np.memmap(path, np.uint64, "r").reshape(-1, 512) for path in (one, other))
    return int((left != right).any(axis=1).sum())


def run(
    kills: int, dice: random.Random, files: Path, *, interval: str, lease: str, memory: str
) -> list[dict[str, Any]]:
    """So many kills. Stops at the first that went wrong."""
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="remus-database-", dir="/dev/shm")))
        scene = DatabaseScene(folder, files, memory=memory, interval=interval, lease=lease)
        stack.callback(scene.close)
        here, there, own = scene.lan.a, scene.lan.b, scene.disk
        scene.backup(there)
        scene.run(here)
        client = stack.enter_context(closing(Client(scene.lan.client.inside())))
        benchmark = start_benchmark(scene.lan.client.inside(), files / "root")
        stack.callback(benchmark.wait)
        stack.callback(benchmark.kill)

        for number in range(kills):
            scene.until("the guest is protected", partial(scene.is_in_sync, there), PATIENCE_S)
            told = client.until_more(MORE)
            time.sleep(dice.uniform(0.0, 1.0))
            before = client.ask("status")["acknowledged"]
            kind = dice.choice(("host", "qemu"))
            if kind == "host":
                here.kill()
            else:
                for pid in here.pids():
                    with suppress(OSError):
                        if Path(f"/proc/{pid}/comm").read_text().startswith("qemu-system"):
                            os.kill(pid, signal.SIGKILL)
            time.sleep(WINDOW_S)
            image, copy = scene.image(there, has_run=False), folder / "committed.ext4"
            shutil.copyfile(image, copy)
            row: dict[str, Any] = {"kind": kind, "acknowledged": before}
            row["is_before"] = not Path(f"{image}.ran").exists()
            row["dropped"] = differing_blocks(own, copy) if row["is_before"] else None
            try:
                told = client.until_more(MORE)
                row["silence_s"] = told["silence_s"]
                scene.until("the guest has gone on", partial(scene.has_gone_on, there))
                row["wrong"] = None if benchmark.poll() is None else "redis-benchmark has ended"
                benchmark.send_signal(signal.SIGSTOP)  # it gives up when it is told that redis reads its file
                time.sleep(REST_S)
                told = client.ask("check")
                benchmark.send_signal(signal.SIGCONT)
                row["wrong"] = row["wrong"] or told["wrong"]
                if row["is_before"] and not row["wrong"]:
                    check_disk(copy, files / "root")
                row["total"] = told["acknowledged"]
            except RemusError as error:
                row["wrong"] = str(error)
            rows.append(row)
            print(json.dumps({"number": number + 1} | row), file=sys.stderr, flush=True)
            if row["wrong"]:
                break
            here.kill()
            own, here, there = scene.image(there, has_run=True), there, here
            for path in (folder / f"store-{scene.letters[there]}" / ".disks" / NAME).glob("*.ran"):
                path.unlink()  # a user removes by hand what he needs no more
                path.with_suffix("").unlink(missing_ok=True)
            scene.backup(there)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The account, in Markdown."""
    lines = [
        "| killed | times | nothing lost | silence, median | max | blocks dropped, median |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for kind in ("host", "qemu"):
        if some := [row for row in rows if row["kind"] == kind]:
            silences = [row["silence_s"] for row in some if "silence_s" in row] or [float("nan")]
            dropped = [row["dropped"] for row in some if row["dropped"] is not None] or [float("nan")]
            lines.append(
                f"| {kind} | {len(some)} | {sum(not row['wrong'] for row in some)} | "
                f"{statistics.median(silences):.2f} s | {max(silences):.2f} s | {statistics.median(dropped):.0f} |"
            )
    total = max((row.get("total", 0) for row in rows), default=0)
    looked = sum(bool(row["is_before"]) for row in rows)
    lines += ["", f"transactions acknowledged: {total:,}; disks looked at as they were committed: {looked}"]
    return "\n".join(lines)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--interval", default="25ms")
    parser.add_argument("--lease", default="2s", help="of the backups: longer where the machine is busy")
    parser.add_argument("--memory", default="160M", help="of the guest")
    parser.add_argument("--folder", type=Path, help="for the guest's files [default: beside those of the demo]")
    parser.add_argument("--json", type=Path, help="write all rows into this file")
    parser.add_argument("--load", metavar="HOST", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load(arguments.load)
        return 0
    if lacks := missing():
        parser.error("; ".join(lacks))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # take apart what was set up
    files = build(arguments.folder or guest.cache().with_name("vm_database"))
    seed = random.SystemRandom().getrandbits(32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", file=sys.stderr)
    options = {"interval": arguments.interval, "lease": arguments.lease, "memory": arguments.memory}
    rows = run(arguments.kills, random.Random(seed), files, **options)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    print(table(rows))
    return int(any(row["wrong"] for row in rows) or len(rows) < arguments.kills)


if __name__ == "__main__":
    sys.exit(main())
