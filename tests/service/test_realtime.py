"""`--realtime`: which threads get the class, which do not, and what keeps a runaway one from stopping the machine."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from services import LONG_S, command, until

from remus_ckpt.errors import RemusError
from remus_ckpt.service import realtime
from remus_ckpt.service.protect import primary_of
from remus_ckpt.source.own_memory import OwnMemory


def may() -> bool:
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        return False
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return True


permitted = pytest.mark.skipif(not may(), reason="realtime scheduling is not permitted here")


def threads_in_it(pid: int) -> int:
    """How many threads of a process have the class, of those that do not end meanwhile."""
    found = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            found += os.sched_getscheduler(int(task)) & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO
        except ProcessLookupError:
            continue
    return found


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@permitted
def test_a_thread_has_it_and_what_it_starts_has_not() -> None:
    """In a process of its own, since the limit stays."""
    assert (
        python(
            """
import os, subprocess, sys, threading
from remus_ckpt.service.realtime import Realtime
kind = lambda: os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK
threads = Realtime()
said = [kind()]
threads.enter(); threads.enter()
said += [kind(), os.sched_getparam(0).sched_priority]
other = threading.Thread(target=lambda: said.append(kind())); other.start(); other.join()
child = [sys.executable, "-c", "import os; print(os.sched_getscheduler(0))"]
said.append(int(subprocess.run(child, capture_output=True, check=True).stdout))
threads.leave(); threads.leave()
said.append(kind())
print(said)
"""
        )
        == f"{[os.SCHED_OTHER, os.SCHED_FIFO, realtime.PRIORITY, *[os.SCHED_OTHER] * 3]}\n"
    )


@permitted
def test_a_thread_that_never_waits_loses_it() -> None:
    assert (
        python(
            """
import os, time
from remus_ckpt.service import realtime
realtime.MOST_RUNNING_S = 0.1
threads = realtime.Realtime()
threads.enter()
begin, kinds = time.monotonic(), set()
while time.monotonic() - begin < 20 and len(kinds) < 2:
    kinds.add(os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK)
threads.leave()
threads.enter()  # in vain: it has been given up
print(sorted(kinds), os.sched_getscheduler(0))
"""
        )
        == f"{[os.SCHED_OTHER, os.SCHED_FIFO]} {os.SCHED_OTHER}\n"
    )


@pytest.mark.parametrize(("runtime", "period"), [("-1", "1000"), ("1000", "1000"), ("0", "1000"), ("x", "")])
def test_a_kernel_that_would_let_a_thread_run_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, period: str
) -> None:
    (tmp_path / "sched_rt_runtime_us").write_text(runtime)
    (tmp_path / "sched_rt_period_us").write_text(period)
    monkeypatch.setattr(realtime, "SYSCTL", tmp_path)
    with pytest.raises(RemusError, match="sched_rt_runtime_us"):
        realtime.Realtime()
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.skipif(shutil.which("setpriv") is None or os.geteuid() != 0, reason="needs root, and setpriv")
def test_without_permission_nothing_starts(tmp_path: Path) -> None:
    without = ["setpriv", "--bounding-set=-sys_nice", "--inh-caps=-sys_nice", "prlimit", "--rtprio=0:0"]
    backup = [sys.executable, "-m", "remus_ckpt", "backup", "--listen", f"unix:{tmp_path / 'socket'}"]
    ran = subprocess.run(
        [*without, *backup, "--store", tmp_path / "store", "--realtime"],
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )
    assert ran.returncode == 1 and "not permitted" in ran.stderr and "LimitRTPRIO" in ran.stderr
    assert not (tmp_path / "store").exists()


@permitted
@pytest.mark.parametrize("is_wanted", [True, False])
def test_the_threads_of_the_path_have_it(tmp_path: Path, is_wanted: bool) -> None:
    address = f"unix:{tmp_path / 'socket'}"
    options = ["--realtime"] if is_wanted else []
    log = tmp_path / "log"
    with command("backup", "--listen", address, "--store", tmp_path / "store", *options, log=log) as backup:
        assert backup.stdout is not None and backup.stdout.readline()
        limit, handler = resource.getrlimit(resource.RLIMIT_RTTIME), signal.getsignal(signal.SIGXCPU)
        ours: Any = realtime.Realtime() if is_wanted else None
        array, said = np.zeros(9), list[int]()
        source = OwnMemory({"a": array}, lock=None)
        primary = primary_of(source, "orders", address, realtime=ours)

        def take() -> None:
            primary.connect(LONG_S)
            said.append(threads_in_it(backup.pid))
            for _ in range(2):
                array[0] += 1
                primary.checkpoint(LONG_S, wait=True)
            said.append(threads_in_it(os.getpid()))

        # In a thread that ends with the class: this one is to keep its own.
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
        try:
            # One thread takes checkpoints and one listens; in the backup, one receives.
            assert said == ([0, 2] if is_wanted else [0, 0])
            until(lambda: threads_in_it(backup.pid) == (1 if is_wanted else 0))
        finally:
            primary.close()
            source.close()
            resource.setrlimit(resource.RLIMIT_RTTIME, limit)
            signal.signal(signal.SIGXCPU, handler)
        until(lambda: threads_in_it(backup.pid) == 0)
