"""What tests share that run the command or real processes."""

from __future__ import annotations

import glob
import os
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE, Popen
from typing import NamedTuple

import pytest

from remus_ckpt import cli


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


class Command:
    """Runs `remus-ckpt` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
        self._monkeypatch = monkeypatch
        self._capture = capfdbinary

    def binary(self, *arguments: object) -> tuple[int, bytes, str]:
        """Exit code, standard output as bytes, standard error."""
        self._capture.readouterr()
        self._monkeypatch.setattr(sys, "argv", ["remus-ckpt", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        sys.stdout.flush()
        sys.stderr.flush()
        out, err = self._capture.readouterr()
        code = exit_.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1), out, err.decode()

    def __call__(self, *arguments: object) -> Ran:
        code, out, err = self.binary(*arguments)
        return Ran(code, out.decode(), err)


WRITER = """
import mmap, sys, threading, time
file = open(sys.argv[1], "r+b")
memory = mmap.mmap(file.fileno(), 0)
words = memoryview(memory).cast("Q")
def write(first):
    number = 0
    while True:
        number += 1
        # A page holds one number, twice: a pause may fall in between, a checkpoint taken while it runs could tear more.
        page = first + number % {pages}
        words[page * 512] = number
        words[page * 512 + 511] = number
        if number % 50 == 0:
            time.sleep(0.0005)
for thread in range({threads} - 1):
    threading.Thread(target=write, args=((thread + 1) * {pages},), daemon=True).start()
print("ready", flush=True)
write(0)
"""


@contextmanager
def writer_process(path: Path, *, pages: int = 8, threads: int = 1) -> Iterator[Popen[bytes]]:
    """A process that writes to `pages` pages of a file from each of its threads, until the end of the block."""
    code = textwrap.dedent(WRITER).replace("{pages}", str(pages)).replace("{threads}", str(threads))
    process = Popen([sys.executable, "-c", code, str(path)], stdout=PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def is_running(command: str) -> bool:
    """Whether any process has this command line, words apart by single spaces."""
    words = command.encode().replace(b" ", b"\0") + b"\0"
    for path in glob.glob("/proc/[0-9]*/cmdline"):  # that of pathlib fails at a process that ends meanwhile
        with suppress(OSError):
            if Path(path).read_bytes() == words:
                return True
    return False


def guards() -> list[int]:
    """The processes that guard what this process stops, the newest last. The kernel may pass over some while others
    end."""
    found = [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    return sorted(pid for pid in found if b"guard.py" in Path(f"/proc/{pid}/cmdline").read_bytes())


def only_guard() -> int:
    """The only guard."""
    while len(found := guards()) != 1:
        time.sleep(0.001)
    return found[0]


def end_guard() -> None:
    """Kill the only guard, and wait until it is dead."""
    guard = only_guard()
    os.kill(guard, signal.SIGKILL)
    while process_state(guard) != "Z":
        time.sleep(0.001)


def process_state(pid: int) -> str:
    """The state letter of a process's first thread."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
