"""Another side has taken over: what the user gave for that runs first of all, once, and holds nothing up for ever."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from services import LONG_S, Service, command, make_keys, service, until
from support import process_state, writer_process
from test_service import Memory, backup_in, is_lost

from remus_ckpt.errors import Fenced, LinkError, RemusError
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.fenced import FencedCommand
from remus_ckpt.service.protect import primary_of
from remus_ckpt.source.processes import Processes
from remus_ckpt.source.shared_file import SharedFile

PAGES = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def served(tmp_path: Path, folder: Path) -> Iterator[Service]:
    with service(tmp_path, folder, "--lease", "2s") as served:
        yield served


@pytest.fixture
def memory() -> Iterator[Path]:
    path = Path(f"/dev/shm/remus-test-{os.getpid()}")
    path.write_bytes(bytes(PAGES * 4096))
    try:
        yield path
    finally:
        path.unlink()


class Protecting:
    """`remus-ckpt protect --on-fenced`, whose backup is then promoted by hand."""

    def __init__(self, tmp_path: Path, served: Service, memory: Path, pid: int, on_fenced: str, *options: object):
        self._served = served
        self.log = tmp_path / "protect.log"
        self._command = command(
            "protect", memory, "--pid", pid, "--to", served.address, "--tls-dir", served.folder / "ca" / "primary",
            "--name", "orders", "--interval", "2ms", "--json", "--log-format", "json", "--on-fenced", on_fenced,
            *options, log=self.log,
        )  # fmt: skip

    def __enter__(self) -> Protecting:
        self.process = self._command.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._command.__exit__(None, None, None)

    def fail_over(self) -> None:
        until(lambda: (self._served.ask()["names"].get("orders", {}).get("epoch") or 0) > 2)
        self._served.ask("failover", name="orders", fence=False)

    def report(self) -> dict[str, Any]:
        out, _ = self.process.communicate(timeout=LONG_S)
        assert self.process.returncode == 22
        report: dict[str, Any] = json.loads(out)
        return report

    def logged(self, event: str) -> list[dict[str, Any]]:
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [found for line in lines if (found := json.loads(line))["event"] == event]


def test_it_stops_the_worker_before_anything_else(tmp_path: Path, served: Service, memory: Path) -> None:
    on_fenced = (
        f"test -e {tmp_path}/ended || echo first > {tmp_path}/order;"
        f" env | grep ^REMUS_ | grep -v ^REMUS_CKPT_ | sort > {tmp_path}/told;"
        f" cut -d' ' -f3 /proc/$REMUS_PIDS/stat > {tmp_path}/state; kill -9 $REMUS_PIDS"
    )
    on_commit = f"cat > /dev/null; touch {tmp_path}/ended"
    with (
        writer_process(memory) as worker,
        Protecting(tmp_path, served, memory, worker.pid, on_fenced, "--on-commit", on_commit) as protecting,
    ):
        protecting.fail_over()
        report = protecting.report()
        assert worker.wait(LONG_S) == -signal.SIGKILL
    assert report["ended"] == "fenced"
    assert (tmp_path / "order").read_text() == "first\n"
    assert (tmp_path / "told").read_text().splitlines() == [
        f"REMUS_EPOCH={report['committed_epoch']}",
        "REMUS_NAME=orders",
        f"REMUS_PIDS={worker.pid}",
        "REMUS_TERM=1",
    ]
    assert (tmp_path / "state").read_text().strip() in "SRD"
    assert [line["command"] for line in protecting.logged("stopped")] == ["on-fenced"]


def test_one_that_is_started_where_another_has_taken_over(tmp_path: Path, served: Service, memory: Path) -> None:
    """The unit of a machine that comes back starts both, the worker and its protection."""
    told = tmp_path / "told"
    with writer_process(memory) as worker:
        with Protecting(tmp_path, served, memory, worker.pid, "true") as protecting:
            protecting.fail_over()
            protecting.report()
        with Protecting(tmp_path, served, memory, worker.pid, f'echo "$REMUS_TERM:$REMUS_EPOCH" > {told}') as again:
            assert again.report()["committed_epoch"] is None
    assert told.read_text() == "1:\n"


def test_one_that_fails(tmp_path: Path, served: Service, memory: Path) -> None:
    with (
        writer_process(memory) as worker,
        Protecting(tmp_path, served, memory, worker.pid, "exit 3") as protecting,
    ):
        protecting.fail_over()
        assert protecting.report()["ended"] == "fenced"
        assert process_state(worker.pid) in "SR"
    (failed,) = protecting.logged("command failed")
    assert (failed["level"], failed["command"]) == ("error", "on-fenced")
    assert "status 3" in failed["reason"]


def test_none(tmp_path: Path, served: Service, memory: Path) -> None:
    """As a unit gives it where its owner has set no command."""
    with writer_process(memory) as worker, Protecting(tmp_path, served, memory, worker.pid, "") as protecting:
        protecting.fail_over()
        assert protecting.report()["ended"] == "fenced"
    assert not protecting.logged("command failed") + protecting.logged("stopped")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_does_not_end_it(tmp_path: Path, served: Service, memory: Path, number: signal.Signals) -> None:
    """Not even the death of who started it: it is on its way to stop a worker that must not go on."""
    begun, may_end, done = (tmp_path / name for name in ("begun", "may-end", "done"))
    on_fenced = f"touch {begun}; while ! test -e {may_end}; do sleep 0.02; done; touch {done}"
    with (
        writer_process(memory) as worker,
        Protecting(tmp_path, served, memory, worker.pid, on_fenced) as protecting,
    ):
        protecting.fail_over()
        until(begun.exists)
        protecting.process.send_signal(number)
        if number == signal.SIGKILL:
            protecting.process.wait(LONG_S)
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                protecting.process.wait(0.3)
        may_end.touch()
        until(done.exists)
        if number != signal.SIGKILL:
            assert protecting.report()["ended"] == "fenced"
        assert process_state(worker.pid) in "SR"


# The command by itself


def run(command: str, **options: Any) -> None:
    options = {"epoch": lambda: None, "pids": list} | options
    FencedCommand("orders", command, **options)(Fenced("another has taken over", term=3))


@pytest.mark.parametrize("does", ["{lasting}", "setsid {lasting} & {lasting}", "{lasting} | cat"])
def test_one_that_hangs_is_killed_whole(caplog: pytest.LogCaptureFixture, does: str) -> None:
    lasting = f"sleep 99.{os.getpid()}"
    turns: list[float] = []
    begin = time.monotonic()
    run(does.format(lasting=lasting), timeout_s=2.5, on_turn=lambda: turns.append(time.monotonic()))
    assert time.monotonic() - begin < LONG_S
    assert len(turns) >= 3, "a watchdog is told all the while"
    lines = [path.read_bytes().replace(b"\0", b" ").strip() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert lasting.encode() not in lines
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


@pytest.mark.parametrize("cannot", ["tr\0ue", "x" * (1 << 22)])
def test_one_that_cannot_be_started(caplog: pytest.LogCaptureFixture, cannot: str) -> None:
    run(cannot)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


# Pauses


def test_the_news_come_in_a_pause(tmp_path: Path, memory: Path) -> None:
    """The worker runs when it is to be stopped: one that is stopped by SIGSTOP could not end in good order."""
    states: list[str] = []
    with backup_in(tmp_path / "store") as backup, writer_process(memory) as worker:
        source = SharedFile(memory, Processes([worker.pid]))

        def on_paused(epoch: int) -> None:
            if epoch == 3:
                backup.failover("orders")
                until(lambda: is_lost(primary))  # it has been told
                states.append(process_state(worker.pid))

        primary = primary_of(
            source, "orders", backup.addresses[0], interval_s=0.002, on_paused=on_paused,
            on_fenced=lambda error: states.append(process_state(worker.pid)),
        )  # fmt: skip
        with pytest.raises(Fenced):
            for _ in primary.run():
                pass
        primary.close()
        source.close()
    assert states[0] == "T"
    assert len(states) == 2
    assert states[1] in "SRD"


# From Python


def overtaken(backup: Backup) -> None:
    """A primary of a higher term comes, which the one that is there is told at once."""
    with Memory(backup.addresses[0], term=5) as other:
        other.step(1)


@pytest.mark.parametrize("how", ["checkpoint", "wait_for"])
def test_the_call_that_learns_of_it_calls_back_first(tmp_path: Path, how: str) -> None:
    told: list[Fenced] = []
    with backup_in(tmp_path / "store") as backup, Memory(backup.addresses[0], on_fenced=told.append) as memory:
        memory.step(1)
        protection = memory.protection
        overtaken(backup)
        assert not told, "nobody has asked"
        calls: dict[str, Callable[[], object]] = {
            "checkpoint": lambda: protection.checkpoint(wait=True, timeout_s=LONG_S),
            "wait_for": lambda: protection.wait_for(9, LONG_S),
        }
        for call in (calls[how], *calls.values()):
            with pytest.raises(Fenced) as caught:
                call()
            assert told == [caught.value]
    assert told[0].term == 5


def test_a_thread_calls_back_without_being_asked(tmp_path: Path) -> None:
    told: list[str] = []
    with (
        backup_in(tmp_path / "store") as backup,
        Memory(
            backup.addresses[0],
            interval_s=3600.0,
            lock=threading.Lock(),
            on_fenced=lambda error: told.append(threading.current_thread().name),
        ) as memory,
    ):
        memory.protection.wait_for(0, LONG_S)
        overtaken(backup)
        until(lambda: told)
        with pytest.raises(Fenced):
            memory.protection.wait_for(1, LONG_S)
        with pytest.raises(Fenced):
            memory.protection.close()
    assert told == ["checkpoints"]


def test_one_that_raises_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def on_fenced(error: Fenced) -> None:
        raise OSError("no systemctl here")

    with backup_in(tmp_path / "store") as backup, Memory(backup.addresses[0], on_fenced=on_fenced) as memory:
        memory.step(1)
        overtaken(backup)
        for _ in range(2):
            with pytest.raises(Fenced):
                memory.step(2)
    assert [record.message for record in caplog.records].count("on_fenced failed") == 1


def test_one_that_is_interrupted_is_called_again(tmp_path: Path) -> None:
    told: list[Fenced] = []

    def on_fenced(error: Fenced) -> None:
        told.append(error)
        if len(told) == 1:
            raise KeyboardInterrupt

    with backup_in(tmp_path / "store") as backup, Memory(backup.addresses[0], on_fenced=on_fenced) as memory:
        memory.step(1)
        overtaken(backup)
        with pytest.raises(KeyboardInterrupt):
            memory.step(2)
        for _ in range(2):
            with pytest.raises(Fenced):
                memory.step(2)
    assert len(told) == 2


def test_one_that_calls_the_protection(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        backup_in(tmp_path / "store") as backup,
        Memory(backup.addresses[0], on_fenced=lambda error: memory.protection.wait_for(7, LONG_S)) as memory,
    ):
        memory.step(1)
        overtaken(backup)
        with pytest.raises(Fenced):
            memory.step(2)
    assert [record.message for record in caplog.records].count("on_fenced failed") == 1


def test_one_that_does_not_return_holds_up_no_other_call_for_longer_than_it_allows(tmp_path: Path) -> None:
    may_end = threading.Event()
    has_begun = threading.Event()

    def on_fenced(error: Fenced) -> None:
        has_begun.set()
        assert may_end.wait(LONG_S)

    ended: list[BaseException] = []
    with backup_in(tmp_path / "store") as backup, Memory(backup.addresses[0], on_fenced=on_fenced) as memory:
        memory.step(1)
        overtaken(backup)

        def wait_for() -> None:
            try:
                memory.protection.wait_for(7, LONG_S)
            except RemusError as error:
                ended.append(error)

        waiting = threading.Thread(target=wait_for, daemon=True)
        waiting.start()
        assert has_begun.wait(LONG_S)
        begin = time.monotonic()
        with pytest.raises(LinkError) as late:
            memory.protection.wait_for(7, 0.3)
        assert not isinstance(late.value, Fenced), "the callback has not returned"
        with pytest.raises(RemusError) as stuck:
            memory.protection.checkpoint(timeout_s=0.3)
        assert not isinstance(stuck.value, Fenced)
        assert time.monotonic() - begin < LONG_S / 2
        may_end.set()
        waiting.join(LONG_S)
        with pytest.raises(Fenced):
            memory.step(2)
    assert isinstance(ended[0], Fenced)
