#!/usr/bin/env python3
"""How fast `convert` turns one memory file into another, beside `cp` and beside QEMU's own load of its stream.

    python tools/bench_convert.py [--mib 1024] [--zero 0.2] [--folder DIR] [--from WORD]... [--to WORD]...

The memory is random pages, and pages of zeros strewn among them. QEMU (qemu-system-x86_64, or the command that
REMUS_CKPT_QEMU is) saves a machine with this memory; its stream is converted, and so is every file that came of that.
Where there is no QEMU, an image is the beginning.

Prints MB of memory a second: by the clock, and by the processor time that the process took, which others on the machine
disturb less; both also as a ratio to `cp` of the image. Starting takes a part of the processor time, which is printed,
and taken off. A line is the median of --rounds rounds, in which it and `cp` take turns; each removes what it has
written, so that none has to wait for memory that the system has not used before.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from remus_ckpt.vm.qmp import Qmp

FORMATS = ("raw", "qemu", "mapped-ram", "remus", "xen", "xen-v2", "elf", "lime")
CONVERT = (sys.executable, "-m", "remus_ckpt", "convert")
BYTECODE = tempfile.TemporaryDirectory()
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
    "PYTHONPYCACHEPREFIX": BYTECODE.name,
}
"""In which the modules' bytecode is there after the first run, as it is in an installed package."""
QEMU = shlex.split(os.environ.get("REMUS_CKPT_QEMU", "qemu-system-x86_64"))


def run(*command: str) -> tuple[float, float]:
    """Seconds by the clock, and of processor time."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - began, used.ru_utime + used.ru_stime


def make(path: Path, mib: int, zero: float) -> None:
    """Memory of random pages; this share of them, strewn over it, are zeros."""
    chance = np.random.default_rng(1)
    with open(path, "wb") as file:
        for _ in range(mib):
            pages = chance.integers(0, 256, size=(256, 4096), dtype=np.uint8)
            pages[chance.random(256) < zero] = 0
            file.write(pages)


@contextmanager
def machine(memory: Path, mib: int, *more: str, inherits: int = 0) -> Iterator[tuple[Qmp, int]]:
    """A QEMU that does not run, with this file as its memory; and its pid. inherits: a file it gets as its own"""
    socket = memory.with_name("qmp")
    backend = f"memory-backend-file,id=pc.ram,size={mib}M,mem-path={memory},share=on"
    words = [*QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-S", "-m", f"{mib}M"]
    words += ["-object", backend, "-M", "pc,accel=tcg,memory-backend=pc.ram"]
    process = subprocess.Popen([*words, "-qmp", f"unix:{socket},server=on,wait=off", *more], pass_fds=[inherits])
    try:
        deadline = time.monotonic() + 60
        while not socket.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        with closing(Qmp(socket)) as qmp:
            yield qmp, process.pid
    finally:
        process.kill()
        process.wait()
        socket.unlink(missing_ok=True)


def until_migrated(qmp: Qmp) -> None:
    while (status := qmp.execute("query-migrate").get("status")) != "completed":
        if status == "failed":
            raise SystemExit("QEMU's migration failed")
        time.sleep(0.002)


def save(memory: Path, mib: int, stream: Path) -> None:
    """The stream of a machine with this memory."""
    with machine(memory, mib) as (qmp, _):
        qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
        qmp.execute("migrate", {"uri": f"exec:cat > {stream}"})
        until_migrated(qmp)


def load(stream: Path, mib: int) -> tuple[float, float]:
    """What QEMU takes to load a stream: seconds by the clock, and of its processor time."""
    memory = stream.with_name("loaded")
    # QEMU reads the file itself: there is no pipe between.
    with open(stream, "rb") as file:
        fd = file.fileno()
        with machine(memory, mib, "-incoming", "defer", inherits=fd) as (qmp, pid):
            before, began = spent(pid), time.perf_counter()
            qmp.execute("migrate-incoming", {"uri": f"fd:{fd}"})
            until_migrated(qmp)
            took = time.perf_counter() - began, spent(pid) - before
    memory.unlink()
    return took


def spent(pid: int) -> float:
    """Processor time of a process so far, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Table:
    """Prints a line for each measurement, beside `cp`.

    image: what `cp` copies, to `copy`
    """

    def __init__(self, size: float, rounds: int, image: Path, copy: Path) -> None:
        self._size, self._rounds, self._image, self._copy = size, rounds, image, copy
        print(f"| {'':22} | MB/s | ÷ cp | MB/s of CPU | ÷ cp |\n|---|---:|---:|---:|---:|")

    def cp(self) -> tuple[float, float]:
        found = run("cp", "--sparse=never", "--reflink=never", str(self._image), str(self._copy))
        self._copy.unlink()
        return found

    def line(self, name: str, job: Callable[[], tuple[float, float]], start: float = 0.0) -> None:
        """start: the part of the processor time that is not the job's"""
        turns = [(*job(), *self.cp()) for _ in range(self._rounds)]
        took, used, cp, cp_used = (float(one) for one in np.median(turns, axis=0))
        used = max(used - start, 0.001)
        figures = f"{self._size / took:.0f} | {cp / took:.2f} | {self._size / used:.0f} | {cp_used / used:.2f}"
        print(f"| {name:22} | {figures} |", flush=True)


def convert(source: Path, output: Path, to: str) -> tuple[float, float]:
    return run(*CONVERT, str(source), str(output), "--to", to, *(("--from", "raw") if source.name == "raw" else ()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="memory, in MiB (default: 1024)")
    parser.add_argument("--zero", type=float, default=0.2, help="share of pages that are zeros (default: 0.2)")
    parser.add_argument("--folder", default="/dev/shm", help="where the files are (default: /dev/shm)")
    parser.add_argument("--rounds", type=int, default=3, help="of each line (default: 3)")
    parser.add_argument("--from", dest="sources", action="append", choices=FORMATS, help="only from these")
    parser.add_argument("--to", action="append", choices=FORMATS, help="only to these")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        paths = {word: folder / word for word in (*FORMATS, "copy", "small", "again")}
        make(paths["raw"], options.mib, options.zero)
        paths["small"].write_bytes(b"\1" * 4096)
        for _ in range(2):  # the first one compiles
            _, start = run(*CONVERT, str(paths["small"]), str(paths["copy"]), "--from", "raw", "--to", "lime")
            paths["copy"].unlink()
        print(
            f"{platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}; {options.mib} MiB, "
            f"{options.zero:.0%} zeros, in {options.folder}; starting takes {start:.2f} s of processor time\n"
        )
        table = Table(options.mib * 1.048576, options.rounds, paths["raw"], paths["again"])
        table.line("cp", table.cp)
        first = "raw"
        if shutil.which(QEMU[0]):
            first = "qemu"
            save(paths["raw"], options.mib, paths["qemu"])
            table.line("QEMU loads its stream", lambda: load(paths["qemu"], options.mib))

        def job(source: str, to: str) -> tuple[float, float]:
            found = convert(paths[source], paths["copy"], to)
            paths["copy"].unlink()
            return found

        for source in options.sources or FORMATS:
            if not paths[source].exists():
                convert(paths[first], paths[source], source)
            for to in options.to or FORMATS:
                if to != source:
                    table.line(f"{source} to {to}", partial(job, source, to), start)


if __name__ == "__main__":
    main()
