"""A fork of a process that runs a backup: it has no part in it, and keeps nothing of it when the backup dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from services import until
from test_commands import is_alive, started
from test_service import Memory, backup_in, entries

from remus_ckpt.link.address import Address
from remus_ckpt.link.dial import connect
from remus_ckpt.link.listener import Listener
from remus_ckpt.service.backup import Backup

DIES_AND_LEAVES_A_FORK = """
import os, signal, sys, time
import numpy as np
from pathlib import Path
from remus_ckpt import Backup, protect
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.service.standby import Policy

folder = Path(sys.argv[1])
metrics = Metrics()
server = metrics.serve("127.0.0.1:0")
policy = Policy(on_failover=f"echo $$ > {folder}/new; mv {folder}/new {folder}/command; sleep 60")
backup = Backup(folder / "store", ["tcp://127.0.0.1:0"], policy=policy, metrics=metrics, warm=folder / "warm")
with backup:
    for name in ("orders", "other"):
        with protect({"a": np.ones(512)}, to=backup.addresses[0], name=name) as protection:
            protection.checkpoint(wait=True)
    backup.failover("orders")
    while not (folder / "command").exists():
        time.sleep(0.01)
    child = os.fork()
    if child == 0:
        os.close(1)
        time.sleep(60)
        os._exit(0)
    print(child, backup.addresses[0], server.address, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_backup_that_dies_and_leaves_a_fork(tmp_path: Path) -> None:
    """Another takes its store and its addresses at once, and its commands end with it."""
    dead = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DIES_AND_LEAVES_A_FORK, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert dead.returncode == -signal.SIGKILL
    child, address, metrics = dead.stdout.split()
    try:
        until(lambda: not is_alive(started(tmp_path / "command")))
        Listener(Address.parse(f"tcp://{metrics}")).close()
        with Backup(tmp_path / "store", [address], warm=tmp_path / "warm") as backup:
            names = backup.status()["names"]
            assert [(name, found["epoch"]) for name, found in names.items()] == [("orders", 0), ("other", 0)]
        assert is_alive(int(child))
    finally:
        os.kill(int(child), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*")
def test_a_fork_that_uses_or_leaves_its_parents_backup(tmp_path: Path) -> None:
    with (
        backup_in(tmp_path / "store", f"unix:{tmp_path}/socket") as backup,
        Memory(backup.addresses[0]) as memory,
        Listener(Address.parse(f"unix:{tmp_path}/other")) as listener,
    ):
        memory.step(1)
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            calls = [backup.run, backup.status, lambda: backup.failover("orders")]
            refused = 0
            for call in calls:
                try:
                    call()  # type: ignore[operator]
                except ValueError:
                    refused += 1
            backup.stop()
            backup.close()
            listener.close()
            os._exit(len(calls) - refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        memory.primary.hang_up()
        memory.step(2)
        memory.step(3)
        connect(listener.address).close()
    assert [entry.epoch for entry in entries(tmp_path / "store")] == [0, 1, 2]
