"""A durable checkpoint beside what else one might take: tools/bench_beside.py [--mib N] [--share X] [--json FILE]

The same writes for all, in one run. In each round, some pages of a memory change by four words each; then everybody, in
random order, makes that durable. The databases are told which pages have changed, and store just these; remus-ckpt asks
the kernel; the others read everything. What is not installed is left out.

For each: the time by the clock, the CPU time of all its processes, and the bytes that it had the kernel write to files.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import socket
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from bench import machine, progress, table
from bench_service import MIB, WORDS, backup_service, cpu_s

from remus_ckpt import protect
from remus_ckpt.observe.log import configure_logs
from remus_ckpt.pages import PAGE_SIZE, Pages

START_S = 10.0


class Way(Protocol):
    """One way to make memory durable. pids: its processes beside this one and those that it waits for"""

    pids: Sequence[int]

    def checkpoint(self, changed: list[int]) -> None:
        """Make memory as it is now durable. changed: the pages that have changed since the last call"""


class Remus:
    """This program: protected by a backup on the same machine."""

    def __init__(self, stack: ExitStack, folder: Path, memory: Pages) -> None:
        pid, address = stack.enter_context(backup_service(folder, None, False))
        self.pids = [pid]
        self._protection = stack.enter_context(protect({"memory": memory}, to=address, name="beside"))

    def checkpoint(self, changed: list[int]) -> None:
        self._protection.checkpoint(timeout_s=600, wait=True)


class Written:
    """The changed pages, appended to a file."""

    pids = ()

    def __init__(self, stack: ExitStack, folder: Path, memory: Pages) -> None:
        self._memory = memory
        self._fd = os.open(folder, os.O_WRONLY | os.O_CREAT, 0o600)
        stack.callback(os.close, self._fd)

    def checkpoint(self, changed: list[int]) -> None:
        os.write(self._fd, self._memory[changed].data)
        os.fdatasync(self._fd)


class Sqlite:
    """A row a page, one transaction a checkpoint."""

    pids = ()

    def __init__(self, stack: ExitStack, folder: Path, memory: Pages) -> None:
        self._memory = memory
        self._database = sqlite3.connect(folder, isolation_level=None)
        stack.callback(self._database.close)
        for line in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL"):
            self._database.execute(line)
        self._database.execute("CREATE TABLE pages (number INTEGER PRIMARY KEY, data BLOB)")

    def checkpoint(self, changed: list[int]) -> None:
        self._database.execute("BEGIN")
        rows = ((page, self._memory[page].data) for page in changed)
        self._database.executemany("INSERT OR REPLACE INTO pages VALUES (?, ?)", rows)
        self._database.execute("COMMIT")


class Lmdb:
    """A value a page, one transaction a checkpoint."""

    pids = ()

    def __init__(self, stack: ExitStack, folder: Path, memory: Pages) -> None:
        import lmdb

        self._memory = memory
        self._database = lmdb.open(str(folder), map_size=8 * memory.nbytes + 256 * MIB)
        stack.callback(self._database.close)

    def checkpoint(self, changed: list[int]) -> None:
        with self._database.begin(write=True) as transaction:
            for page in changed:
                transaction.put(page.to_bytes(8, "big"), self._memory[page].tobytes())


class Redis:
    """A key a page, one MULTI a checkpoint, into an append-only file that is synced always."""

    def __init__(self, stack: ExitStack, folder: Path, memory: Pages) -> None:
        self._memory = memory
        folder.mkdir()
        path = folder / "socket"
        command = ["redis-server", "--port", "0", "--unixsocket", path, "--dir", folder, "--save", ""]
        command += ["--appendonly", "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0"]
        server = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
        stack.callback(server.wait)
        stack.callback(server.kill)
        self.pids = [server.pid]
        self._socket = stack.enter_context(socket.socket(socket.AF_UNIX))
        deadline = time.monotonic() + START_S
        while True:
            with suppress(OSError):
                self._socket.connect(str(path))
                return
            if time.monotonic() > deadline:
                raise RuntimeError("redis-server does not answer")
            time.sleep(0.05)

    def checkpoint(self, changed: list[int]) -> None:
        parts = [b"*1\r\n$5\r\nMULTI\r\n"]
        for page in changed:
            key = b"%d" % page
            parts.append(b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(key), key, PAGE_SIZE))
            parts += [self._memory[page].tobytes(), b"\r\n"]
        self._socket.sendall(b"".join([*parts, b"*1\r\n$4\r\nEXEC\r\n"]))
        wanted = b"+OK\r\n" + b"+QUEUED\r\n" * len(changed) + b"*%d\r\n" % len(changed) + b"+OK\r\n" * len(changed)
        answer = self._socket.recv(len(wanted), socket.MSG_WAITALL)
        if answer != wanted:
            raise RuntimeError(f"redis-server answers {answer[:200]!r}")


class Command:
    """A program that reads the image, which lies in memory. sync: what it writes and does not sync itself"""

    pids = ()

    def __init__(
        self,
        words: Sequence[str | Path],
        *,
        sync: Path | None = None,
        first: Sequence[str | Path] = (),
        home: Path | None = None,
    ) -> None:
        self._words, self._sync = words, sync
        self._environment = os.environ | {"BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes", "RESTIC_PASSWORD": "x"}
        if home is not None:  # for caches and locks
            self._environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home), "BORG_BASE_DIR": str(home)}
        if first:
            self._run(first)

    def _run(self, words: Sequence[str | Path]) -> None:
        subprocess.run(list(map(str, words)), check=True, stdout=subprocess.DEVNULL, env=self._environment)

    def checkpoint(self, changed: list[int]) -> None:
        self._run(self._words)
        if self._sync is not None:
            fd = os.open(self._sync, os.O_RDONLY)
            os.fdatasync(fd)
            os.close(fd)


WAYS: dict[str, Callable[[ExitStack, Path, Pages, Path], Way]] = {
    "remus-ckpt, to a backup": lambda stack, own, memory, image: Remus(stack, own, memory),
    "write and fdatasync": lambda stack, own, memory, image: Written(stack, own, memory),
    "SQLite, WAL, synchronous=FULL": lambda stack, own, memory, image: Sqlite(stack, own, memory),
    "LMDB": lambda stack, own, memory, image: Lmdb(stack, own, memory),
    "Redis, AOF, appendfsync always": lambda stack, own, memory, image: Redis(stack, own, memory),
    "cp, and fdatasync": lambda stack, own, memory, image: Command(["cp", image, own], sync=own),
    "zstd -1, and fdatasync": lambda stack, own, memory, image: Command(
        ["zstd", "-1", "-q", "-f", image, "-o", own], sync=own
    ),
    "rsync --inplace": lambda stack, own, memory, image: Command(
        ["rsync", "--inplace", "--no-whole-file", "--ignore-times", image, own], sync=own
    ),
    "borg create": lambda stack, own, memory, image: Command(
        ["borg", "create", "--files-cache", "disabled", f"{own}::{{now:%s%f}}", image],
        first=["borg", "init", "-e", "none", own],
        home=own.with_suffix(".home"),
    ),
    "restic backup": lambda stack, own, memory, image: Command(
        ["restic", "-q", "-r", own, "backup", "--force", image],
        first=["restic", "-q", "-r", own, "init"],
        home=own.with_suffix(".home"),
    ),
}
NEEDS = {"Redis": "redis-server", "zstd": "zstd", "rsync": "rsync", "borg": "borg", "restic": "restic"}


def is_there(name: str) -> bool:
    if name == "LMDB":
        with suppress(ImportError):
            import lmdb  # noqa: F401

            return True
        return False
    needed = next((program for start, program in NEEDS.items() if name.startswith(start)), "cp")
    return shutil.which(needed) is not None


def written_bytes(pids: Sequence[int]) -> int:
    """What these processes, this one and its children that have ended had the kernel write to files on a disk."""
    total = 0
    for pid in (os.getpid(), *pids):
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))
    return total


def used_s(pids: Sequence[int]) -> float:
    """CPU time, likewise. That of living processes comes in hundredths of a second: only sums count."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime + time.process_time() + sum(map(cpu_s, pids))


def run(disk: Path, shared: Path, mib: int, share: float, rounds: int, only: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each way."""
    random = np.random.default_rng(5)
    memory = np.empty((mib * MIB // PAGE_SIZE, PAGE_SIZE), dtype=np.uint8)
    different = random.integers(0, 256, MIB, dtype=np.uint8).reshape(-1, PAGE_SIZE)
    memory[:] = different[random.integers(0, len(different), len(memory))]
    words = memory.view(np.uint32)
    image = shared / "image"
    image.write_bytes(memory.data)
    names = [name for name in WAYS if is_there(name) and (not only or any(name.startswith(one) for one in only))]
    found: dict[str, dict[str, list[float]]] = {name: {"s": [], "cpu_s": [], "bytes": []} for name in names}
    with ExitStack() as stack, open(image, "r+b", buffering=0) as file:
        ways = {name: WAYS[name](stack, disk / f"way-{place}", memory, image) for place, name in enumerate(names)}
        for name, way in ways.items():
            way.checkpoint(list(range(len(memory))))
            progress(f"{name}: first copy")
        for number in range(rounds):
            changed = np.sort(random.choice(len(memory), max(int(len(memory) * share), 1), replace=False))
            words[changed[:, None], random.integers(0, words.shape[1], (len(changed), WORDS))] += 1
            for page in changed.tolist():
                file.seek(page * PAGE_SIZE)
                file.write(memory[page].data)
            for name in random.permutation(names).tolist():
                way = ways[name]
                before = used_s(way.pids), written_bytes(way.pids)
                begin = time.monotonic()
                way.checkpoint(changed.tolist())
                found[name]["s"].append(time.monotonic() - begin)
                time.sleep(0.05)  # what is done behind the acknowledgement counts too
                found[name]["cpu_s"].append(used_s(way.pids) - before[0])
                found[name]["bytes"].append(written_bytes(way.pids) - before[1])
            progress(f"round {number + 1} of {rounds}")
    return [
        {
            "name": name,
            "ms": float(np.median(one["s"])) * 1e3,
            "cpu_ms": float(np.mean(one["cpu_s"])) * 1e3,
            "kib": float(np.mean(one["bytes"])) / 1024,
        }
        for name, one in found.items()
    ]


def show(results: dict[str, Any]) -> str:
    """The table in docs/comparison.md."""
    m = results["machine"]
    rows = [
        [one["name"], f"{one['ms']:,.1f}", f"{one['cpu_ms']:,.1f}", f"{one['kib']:,.0f}"] for one in results["rows"]
    ]
    head = ["A durable checkpoint", "ms (median)", "CPU ms (mean)", "KiB written (mean)"]
    about = (
        f"{m['cpu']}, {m['cores']} cores, {m['system']}; load {m['load']:.1f} at the start. {results['mib']} MiB, "
        f"{results['share']:.1%} of the pages changed by {WORDS} words each; {results['rounds']} rounds."
    )
    return f"{about}\n\n{table(head, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=128, help="size of the memory")
    parser.add_argument("--share", type=float, default=0.01, help="of the pages, that changes in each round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="how the names of ways begin: only these")
    parser.add_argument("--directory", type=Path, help="a folder on the disk to be measured; by default tmp's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    configure_logs(level="error")
    with (
        tempfile.TemporaryDirectory(prefix="remus-beside-", dir=options.directory) as disk,
        tempfile.TemporaryDirectory(prefix="remus-beside-", dir="/dev/shm") as shared,
    ):
        rows = run(Path(disk), Path(shared), options.mib, options.share, options.rounds, options.only)
    results = {"machine": machine(), "mib": options.mib, "share": options.share, "rounds": options.rounds, "rows": rows}
    print(show(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
