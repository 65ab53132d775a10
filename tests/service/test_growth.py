"""What a connection leaves behind when it ends: nothing, without any help of the garbage collector.

In a process whose objects are mostly old, a full collection is rare. Until one comes, a cycle of references keeps the
buffers of every link that was lost.
"""

from __future__ import annotations

import gc
import importlib.util
import random
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from proxy import Proxy, in_last_byte
from services import make_keys
from test_service import Memory, backup_in, until

from remus_ckpt.errors import LinkError
from remus_ckpt.link.address import Address
from remus_ckpt.link.client import Link
from remus_ckpt.link.connection import Connection
from remus_ckpt.link.control import ask
from remus_ckpt.link.dial import connect
from remus_ckpt.loop import CheckpointLoop
from remus_ckpt.sender import Sender
from remus_ckpt.service.backup import Backup
from remus_ckpt.session.incoming import Incoming
from remus_ckpt.session.machine import Session

LARGE = (CheckpointLoop, Connection, Incoming, Link, Sender, Session)
"""Those that have buffers, or refer to them."""


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # what is there is not this test's
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


def alive() -> dict[str, int]:
    """How many large objects there are of each type."""
    return Counter(type(one).__name__ for one in gc.get_objects() if type(one) in LARGE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize(
    ("scheme", "fault"),
    [
        ("tcp", "cut"),
        ("tcp", "changed near"),
        ("tcp", "changed far"),
        ("tls", "cut"),
        ("tls", "changed far"),
        ("tls", "refused"),
        ("tls", "begun anew"),
    ],
)
def test_a_link_that_broke_leaves_nothing(
    tmp_path: Path, folder: Path, scheme: str, fault: str, in_thread: bool
) -> None:
    """On either side, whatever broke it."""

    def commit() -> None:
        if not in_thread:
            memory.step(1)
            return
        before = len(memory.commits)
        until(lambda: len(memory.commits) > before + 2)

    def break_link() -> None:
        match fault:
            case "cut":
                proxy.cut()
            case "changed near" | "changed far":
                proxy.flips[fault.removeprefix("changed ")] = in_last_byte
            case "refused":
                proxy.refusing.set()
                proxy.cut()
                if in_thread:
                    until(lambda: not memory.protection.status()["connected"])
                else:
                    with suppress(LinkError):
                        memory.protection.checkpoint(timeout_s=0.3)
                proxy.refusing.clear()
            case "begun anew":
                others.rotate()
                proxy.target = others[0]
                proxy.cut()

    options: dict[str, Any] = {"interval_s": 0.005, "lock": threading.Lock()} if in_thread else {}
    sides: dict[str, Any] = {"backup": None, "primary": None}
    if scheme == "tls":
        sides = {side: folder / "ca" / side for side in sides}
    with (
        Backup(tmp_path / "store", [f"{scheme}://127.0.0.1:0"], tls_dir=sides["backup"]) as backup,
        Backup(tmp_path / "other", [f"{scheme}://127.0.0.1:0"], tls_dir=sides["backup"]) as other,
        Proxy(backup.addresses[0].replace(scheme, "tcp")) as proxy,
        Memory(proxy.address.replace("tcp", scheme), tls_dir=sides["primary"], **options) as memory,
    ):
        others = deque(one.addresses[0].replace(scheme, "tcp") for one in (backup, other))
        commit()
        for _ in range(3):
            before = proxy.connections
            break_link()
            while proxy.connections == before:
                commit()
        commit()
        # The backup's threads end a little later.
        large = {"CheckpointLoop": 1, "Connection": 2, "Incoming": 2, "Link": 1, "Sender": 1, "Session": 1}
        until(lambda: alive() == large)


def test_a_question_leaves_nothing(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store") as backup:
        for _ in range(3):
            ask(connect(Address.parse(backup.addresses[0])), "status", {})
        # The thread that accepts still refers to the last one.
        until(lambda: alive() in ({}, {"Connection": 1}))


# The verdict of a long run


@pytest.fixture(scope="module")
def soak() -> Any:
    path = Path(__file__).resolve().parents[2] / "tools" / "soak.py"
    spec = importlib.util.spec_from_file_location("soak", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module
    spec.loader.exec_module(module)
    return module


def _figures(rss: float, commits: float, cuts: float) -> dict[str, float]:
    return {"protect_fds": 20, "protect_rss": rss, "backup_rss": 99, "disk": 300, "commits": commits, "cuts": cuts}


@pytest.mark.parametrize(
    ("per_commit", "per_cut", "noise", "grows"),
    [
        (0.0, 0.0, 0.0, False),
        (0.0, 0.0, 30.0, False),
        (0.0, 0.05, 3.0, False),  # 6 MiB in all
        (0.0, 0.5, 3.0, True),
        (0.002, 0.0, 3.0, True),
        (0.0, 0.5, 10.0, True),
    ],
)
def test_what_a_long_run_calls_growth(soak: Any, per_commit: float, per_cut: float, noise: float, grows: bool) -> None:
    """Memory that is only busy does not grow; a leak that noise hides from a look at two minutes does."""
    draw = random.Random(1)
    seen = []
    for look in range(180):
        commits, cuts = 130.0 * look, float(look * 2 // 3)
        rss = 120 + per_commit * commits + per_cut * cuts + draw.uniform(-noise, noise)
        seen.append(_figures(rss, commits, cuts))
    faults = soak.judge(seen)
    assert [fault.split()[0] for fault in faults] == (["protect_rss"] if grows else [])


def test_a_long_run_tells_when_commits_stand_still(soak: Any) -> None:
    seen = [_figures(120, min(look, 12), look) for look in range(24)]
    assert soak.judge(seen) == ["no commit in minute 4"]
