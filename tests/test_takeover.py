"""Two sides take turns with a real worker: what survived on one is protected by the other, until that takes over."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from remus_ckpt.demo import ledger
from remus_ckpt.demo.ledger import Ledger
from remus_ckpt.errors import Fenced
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.primary import Primary
from remus_ckpt.service.protect import primary_of
from remus_ckpt.service.release import Committed
from remus_ckpt.service.standby import Policy
from remus_ckpt.source.processes import Processes
from remus_ckpt.source.shared_file import SharedFile
from remus_ckpt.store import Store

pytestmark = pytest.mark.kill
LONG_S = 30.0


@contextmanager
def working(memory: Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, ledger.__file__, str(memory)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


def transfers(data: bytes) -> int:
    """How many a right ledger has made, with the one that was under way."""
    book = Ledger(bytearray(data))
    book.recover()
    assert book.faults() == []
    return book.transfers


def test_there_and_back_five_times_with_a_real_worker(tmp_path: Path) -> None:
    blank = bytearray(ledger.BYTES)
    Ledger(blank).create(11)
    memory, term, before = tmp_path / "first", None, 0
    memory.write_bytes(blank)
    policy = Policy(lease_s=2.0)
    with (
        Backup(tmp_path / "a", ["tcp://127.0.0.1:0"], policy=policy) as one,
        Backup(tmp_path / "b", ["tcp://127.0.0.1:0"], policy=policy) as other,
    ):
        for turn in range(5):
            to = (one, other)[turn % 2]
            with working(memory) as worker:
                source = SharedFile(memory, Processes([worker.pid]))
                commits: list[Committed] = []
                primary = primary_of(
                    source, "orders", to.addresses[0], interval_s=0.01, term=term, on_commit=commits.append
                )
                ended: list[BaseException] = []

                def protect(primary: Primary = primary, ended: list[BaseException] = ended) -> None:
                    try:
                        for _ in primary.run():
                            pass
                    except BaseException as error:
                        ended.append(error)

                thread = threading.Thread(target=protect)
                thread.start()
                deadline = time.monotonic() + LONG_S
                while len(commits) < 5 and time.monotonic() < deadline:
                    time.sleep(0.005)
                given = to.failover("orders")  # in the middle of it: the primary is at work
                thread.join(LONG_S)
                assert isinstance(ended[0], Fenced), ended
                primary.close()
                source.close()
                assert worker.poll() is None, "the worker is not left stopped or dead"
            assert given["term"] == turn + 1
            assert given["epoch"] >= commits[-1].epoch >= 4
            restored = Store(tmp_path / "ab"[turn % 2]).history("orders").restore()
            image = Path(given["image"]).read_bytes()
            assert image[: ledger.BYTES] == restored.memory.tobytes()[: ledger.BYTES]
            reached = transfers(image[: ledger.BYTES])
            assert reached > before, "work went on from where the other side was"
            memory, term, before = Path(given["image"]), given["term"], reached
