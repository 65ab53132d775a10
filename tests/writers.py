"""Processes that write, and each way to stop them. As a script: one who stops them and then waits to be killed."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from remus_ckpt.source import FileStopper
from remus_ckpt.source.cgroup import CgroupFreezer
from remus_ckpt.source.commands import PauseCommands
from remus_ckpt.source.processes import Processes

KINDS = ["signals", "freezer", "commands"]


def make(kind: str, pid: int, cgroup: Path | None) -> FileStopper:
    """Who can stop the process `pid`, which is in `cgroup` if its kind needs one."""
    if kind == "signals":
        return Processes([pid])
    if kind == "freezer":
        assert cgroup is not None
        return CgroupFreezer(cgroup)
    # When every thread is stopped or dead.
    pause = f"kill -STOP {pid}; while grep -qs '^State:.[RSDt]' /proc/{pid}/task/*/status; do :; done"
    return PauseCommands(pause, f"kill -CONT {pid}")


def cgroup_mount() -> Path | None:
    """Where cgroups of version 2 are, if a group could be made there."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    found = [Path(row[1]) for row in mounts if row[2] == "cgroup2" and "rw" in row[3].split(",")]
    return found[0] if found else None


@contextmanager
def own_cgroup(parent: Path, name: str) -> Iterator[Path]:
    """A new cgroup, removed in the end. Whoever was put in must be dead then."""
    path = parent / name
    path.mkdir()
    try:
        yield path
    finally:
        (path / "cgroup.freeze").write_text("0")
        path.rmdir()


if __name__ == "__main__":
    them = make(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    them.stop()
    print("stopped", flush=True)
    signal.pause()
