"""Commands that draw what they show anew, in a terminal and in a pipe."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def watching(seen: Path, *words: str, terminal: bool) -> Iterator[Path]:
    """A command with --watch, ended with the block by Ctrl-C. Gives a file with what it has printed.

    seen: that file, unless it prints to a terminal
    """
    command = [sys.executable, "-m", "remus_ckpt", *words, "--watch", "--every", "100ms"]
    with seen.open("wb") as out:
        if terminal:
            ours, theirs = pty.openpty()
            os.set_blocking(ours, False)
            process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm"})
            os.close(theirs)
        else:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        if terminal:
            seen = Path(f"/proc/self/fd/{ours}")
        yield seen
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        if terminal:
            os.close(ours)


def shown(seen: Path, before: bytearray, *words: bytes) -> bool:
    """Whether all of these have been printed. before: what was printed so far, which a terminal gives only once"""
    try:
        if seen.is_file():
            before[:] = seen.read_bytes()
        else:
            before += os.read(int(seen.name), 1 << 20)
    except BlockingIOError:
        pass
    return all(word in before for word in words)
