"""Processes that cannot be recorded are refused before anything begins, with what to do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import Command

from remus_ckpt.errors import SourceError
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.source.processes import Processes
from remus_ckpt.source.shared_file import SharedFile

NOBODY = 65534
KILL, DAC_OVERRIDE = 5, 1

WRITER = """
import ctypes, mmap, os, sys, time
with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0)
{change}
print("ready", flush=True)
sys.stdin.read()
"""

RECORDER = """
import ctypes, encodings.ascii, json, os, sys
from remus_ckpt.errors import SourceError
from remus_ckpt.source.processes import Processes
from remus_ckpt.source.shared_file import SharedFile
libc = ctypes.CDLL(None, use_errno=True)

def check(answer):
    assert answer == 0, os.strerror(ctypes.get_errno())

def become_nobody(*capabilities):
    check(libc.prctl(8, 1, 0, 0, 0))  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setgid({nobody})
    os.setuid({nobody})
    mask = sum(1 << number for number in capabilities)
    check(libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(mask, mask, 0, 0, 0, 0)))

def hide(option):
    check(libc.unshare(0x20000))  # CLONE_NEWNS
    check(libc.mount(b"none", b"/", None, 0x44000, None))  # MS_REC | MS_PRIVATE
    check(libc.mount(b"proc", b"/proc", b"proc", 0, option))

fd = os.open(sys.argv[1], os.O_RDONLY)
{change}
try:
    SharedFile(f"/proc/self/fd/{{fd}}", Processes([int(sys.argv[2])])).close()
    print(json.dumps("taken"))
except SourceError as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    path.write_bytes(bytes(PAGE_SIZE))
    return path


@contextmanager
def writer(memory: Path, change: str = "") -> Iterator[int]:
    """The pid of a process that has the memory mapped."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER.format(change=change), str(memory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    with process:
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
        process.stdin.close()


def told(memory: Path, pid: int, change: str) -> str:
    """What a recorder says after that change of its own rights."""
    code = textwrap.dedent(RECORDER).format(change=change, nobody=NOBODY)
    done = subprocess.run(
        [sys.executable, "-c", code, str(memory), str(pid)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout))


@pytest.mark.root
@pytest.mark.parametrize(
    ("writes", "records", "words"),
    [
        ("", "", "taken"),
        ("", "become_nobody()", "run as its user or as root"),
        ("", f"become_nobody({KILL})", "what process .* has mapped .* run as its user or as root .*CAP_SYS_PTRACE"),
        ("", f"become_nobody({KILL}, {DAC_OVERRIDE})", "what process .* has mapped .*CAP_SYS_PTRACE"),
        (f"os.setuid({NOBODY})", "become_nobody()", "what process .* has mapped .*not dumpable"),
        ("", f"hide(b'hidepid=1'); become_nobody({KILL})", "hidepid"),
        ("", f"hide(b'hidepid=2'); become_nobody({KILL})", "hidepid=0"),
    ],
)
def test_rights_that_do_not_suffice(memory: Path, writes: str, records: str, words: str) -> None:
    with writer(memory, writes) as pid:
        said = told(memory, pid, records)
        assert re.search(words, said), said
        assert "no process" not in said


def test_a_process_that_is_gone(memory: Path) -> None:
    with writer(memory) as pid:
        pass
    with pytest.raises(SourceError, match="no process"):
        Processes([pid])


@pytest.mark.root
def test_a_process_of_the_kernel(memory: Path, tmp_path: Path, remus: Command) -> None:
    name = Path("/proc/2/comm")
    if not name.exists() or name.read_text() != "kthreadd\n":
        pytest.skip("no kernel threads in this PID namespace")
    with pytest.raises(SourceError, match="process 2 has no memory"):
        SharedFile(memory, Processes([2]))
    done = remus("record", memory, "--pid", 2, "-o", tmp_path / "stream")
    assert done.code == 1
    assert "process 2" in done.err
    assert not os.path.exists(tmp_path / "stream")


@pytest.fixture
def remus(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)
