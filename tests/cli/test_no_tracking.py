"""The commands where the kernel cannot track writes: all works by comparison, and says so."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tracking
from support import writer_process
from tracking import needs_tracking

from remus_ckpt import read_checkpoints
from remus_ckpt.errors import Untracked
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.source.track import linux

pytestmark = needs_tracking

LACKS = {
    "no userfaultfd": (tracking.CALLS.userfaultfd, None, errno.ENOSYS, "no userfaultfd"),
    "an earlier kernel": (tracking.IOCTL, linux.UFFDIO_API, errno.EINVAL, tracking.NEEDED),
    "no scan": (tracking.IOCTL, linux.PAGEMAP_SCAN, errno.ENOTTY, "6.7"),
}


def command_without(lack: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command under a filter that answers as such a kernel does."""
    number, argument, answer, _ = LACKS[lack]
    program = (
        "import sys, runpy, tracking\n"
        f"tracking.put_filter(tracking.filter_of({number}, tracking.ERRNO | {answer}, argument={argument}))\n"
        "runpy.run_module('remus_ckpt', run_name='__main__', alter_sys=True)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(tracking.__file__).parent)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("lack", LACKS)
def test_record_compares_and_says_why(lack: str, tmp_path: Path) -> None:
    memory, stream = tmp_path / "memory", tmp_path / "stream"
    memory.write_bytes(b"\1" * (64 * PAGE_SIZE))
    with writer_process(memory, pages=8, threads=2) as worker:
        options = ["--duration", "300ms", "--interval", "10ms", "--json"]
        done = command_without(lack, "record", str(memory), "--pid", str(worker.pid), "-o", str(stream), *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["tracking"] == "compare"
    assert LACKS[lack][3] in report["tracking_why"]
    assert report["checkpoints"] == sum(1 for _ in read_checkpoints(stream, strict=True)) > 1


@pytest.mark.parametrize("lack", LACKS)
def test_record_with_only_the_kernel_is_refused(lack: str, tmp_path: Path) -> None:
    memory, stream = tmp_path / "memory", tmp_path / "stream"
    memory.write_bytes(b"\1" * (64 * PAGE_SIZE))
    with writer_process(memory, pages=8, threads=2) as worker:
        options = ["--duration", "300ms", "--tracking", "kernel"]
        done = command_without(lack, "record", str(memory), "--pid", str(worker.pid), "-o", str(stream), *options)
        assert worker.poll() is None
    assert done.returncode == Untracked.exit_code
    assert LACKS[lack][3] in " ".join(done.stderr.split())


@pytest.mark.parametrize("lack", LACKS)
def test_check_says_what_is_missing(lack: str) -> None:
    done = command_without(lack, "check")
    assert done.returncode == 0, done.stderr
    assert LACKS[lack][3] in " ".join(done.stdout.split())


OWN = """
import sys, tempfile, tracking
import numpy as np
from remus_ckpt import Backup, protect

tracking.put_filter(tracking.filter_of(*map(eval, sys.argv[1:3]), argument=eval(sys.argv[3])))
array = np.zeros(4096)
with tempfile.TemporaryDirectory() as folder, Backup(f"{folder}/store", [f"unix:{folder}/sock"]) as backup:
    with protect({"array": array}, to=backup.addresses[0], name="own") as protection:
        array[0] = 1
        protection.checkpoint(wait=True)
        print(protection.status()["tracking"])
"""


@pytest.mark.parametrize("lack", LACKS)
def test_arrays_of_our_own_are_compared(lack: str) -> None:
    number, argument, answer, _ = LACKS[lack]
    done = subprocess.run(
        [sys.executable, "-c", OWN, str(number), str(tracking.ERRNO | answer), str(argument)],
        env=os.environ | {"PYTHONPATH": str(Path(tracking.__file__).parent)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "compare\n"), done.stderr
    assert "Traceback" not in done.stderr
