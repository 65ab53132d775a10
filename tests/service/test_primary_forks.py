"""A primary and its forks."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from services import make_keys
from support import process_state, writer_process
from test_service import LONG_S, Memory, backup_in, until

from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.protect import protect
from remus_ckpt.source.processes import Processes

# Forks


def in_a_fork(work: Callable[[], None]) -> int:
    """Do it in a child; its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*")
@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("is_tls", [False, True])
def test_a_fork_leaves_the_session_alone(tmp_path: Path, in_thread: bool, is_tls: bool) -> None:
    options: dict[str, Any] = {"interval_s": 0.01, "lock": multiprocessing.Lock()} if in_thread else {}
    listen, keys = "tcp://127.0.0.1:0", None
    if is_tls:
        folder = make_keys(tmp_path / "keys") / "ca"
        listen, keys = "tls://127.0.0.1:0", folder / "backup"
        options["tls_dir"] = folder / "primary"
    with Backup(tmp_path / "store", [listen], tls_dir=keys) as backup:
        memory = Memory(backup.addresses[0], **options)
        protection = memory.protection

        def advance() -> None:
            if in_thread:
                before = protection.committed
                until(lambda: protection.committed != before)
            else:
                memory.step(1)

        def close() -> None:
            with protection:
                pass
            protection.close()
            memory.primary.close()

        def refused() -> None:
            for call in (protection.checkpoint, memory.primary.checkpoint, lambda: protection.wait_for(1 << 40)):
                with suppress(ValueError):
                    call()  # type: ignore[operator]
                    raise AssertionError("it was taken")

        advance()
        for work in (close, refused, memory.primary.hang_up, lambda: None):
            assert in_a_fork(work) == 0, work
            advance()
        for method in ("fork", "spawn"):
            child = multiprocessing.get_context(method).Process(target=os.getpid)
            child.start()
            child.join()
            advance()
        subprocess.run([sys.executable, "-c", ""], check=True, close_fds=False)
        advance()
        assert protection.status()["reconnects"] == 0
        assert not select.select([memory.stop], [], [], 0)[0], "the thread no longer keeps to its interval"
        protection.close()


def test_a_fork_leaves_its_parents_backup_alone(tmp_path: Path) -> None:
    with Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"]) as backup, Memory(backup.addresses[0]) as memory:
        memory.step(1)
        child = os.fork()
        if child == 0:
            signal.alarm(5)
            backup.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        memory.primary.hang_up()
        memory.step(2)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*")
def test_a_fork_in_a_callback_lets_nobody_write(tmp_path: Path) -> None:
    """The lock belongs to both processes; that the child leaves must not give it back."""
    lock = multiprocessing.Lock()
    held: list[bool] = []

    def device_state() -> bytes:
        pid = os.fork()
        if pid == 0:
            sys.exit(7)
        os.waitpid(pid, 0)
        held.append(not lock.acquire(block=False))
        return b""

    with backup_in(tmp_path / "store") as backup:
        protection = protect(
            {"a": np.zeros(9)}, to=backup.addresses[0], name="orders", lock=lock, device_state=device_state
        )
        parent = os.getpid()
        try:
            protection.checkpoint(wait=True)
        except SystemExit:
            if os.getpid() != parent:
                os._exit(0)
            raise
        assert held == [True]
        protection.close()


DIES_IN_A_PAUSE = """
import os, signal, sys, time
from remus_ckpt.source.processes import Processes
processes = Processes([int(sys.argv[1])])
processes.stop()
if os.fork() == 0:
    os.close(1)
    time.sleep(30)
    os._exit(0)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_fork_does_not_keep_the_guard_waiting(tmp_path: Path) -> None:
    """Its parent dies in a pause: the worker runs on although the fork lives."""
    memory = Path(f"/dev/shm/remus-fork-{os.getpid()}")
    memory.write_bytes(bytes(8 * PAGE_SIZE))
    try:
        with writer_process(memory) as worker:
            dying = subprocess.Popen([sys.executable, "-c", DIES_IN_A_PAUSE, str(worker.pid)], process_group=0)
            try:
                assert dying.wait(LONG_S) == -signal.SIGKILL
                until(lambda: process_state(worker.pid) not in "Tt")
                Processes([worker.pid]).close()  # nobody claims it any longer
            finally:
                os.killpg(dying.pid, signal.SIGKILL)
    finally:
        memory.unlink()
