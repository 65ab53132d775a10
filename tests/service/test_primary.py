"""What a primary keeps whatever its callbacks, its threads and its backup do."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interrupter import Interrupter
from liars import Liar, Peer
from limited import limit
from services import within
from support import process_state, writer_process
from test_service import LONG_S, Memory, backup_in, entries, is_lost, restored, until

from remus_ckpt.errors import Fenced, RemusError, SourceError
from remus_ckpt.link.address import Address
from remus_ckpt.link.connection import Connection
from remus_ckpt.link.dial import connect
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.service import turns
from remus_ckpt.service.primary import Primary
from remus_ckpt.service.protect import primary_of, protect
from remus_ckpt.service.release import Committed
from remus_ckpt.service.window import Window
from remus_ckpt.session import messages
from remus_ckpt.source.own_memory import OwnMemory
from remus_ckpt.source.processes import Processes
from remus_ckpt.source.shared_file import SharedFile
from remus_ckpt.store import Store

# Callbacks


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), ValueError("no"), BaseException()]
)
def test_whatever_on_commit_raises_the_commits_behind_it_are_delivered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    limit(monkeypatch, most_unreleased=3)
    told: list[int] = []

    def on_commit(committed: Committed) -> None:
        told.append(committed.epoch)
        if committed.epoch in (1, 2):
            raise error

    with backup_in(tmp_path / "store") as backup:
        protection = protect({"a": np.zeros(9)}, to=backup.addresses[0], name="orders", on_commit=on_commit)
        for _ in range(10):
            protection.checkpoint(wait=True, timeout_s=LONG_S)
        protection.close()
    assert told == list(range(10))
    assert [record.getMessage() for record in caplog.records].count("on_commit failed") == 2


def test_an_on_commit_that_does_not_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, most_unreleased=3)
    go_on = threading.Event()
    told: list[int] = []

    def on_commit(committed: Committed) -> None:
        go_on.wait(LONG_S)
        told.append(committed.epoch)

    with backup_in(tmp_path / "store") as backup:
        protection = protect({"a": np.zeros(9)}, to=backup.addresses[0], name="orders", on_commit=on_commit)
        other = protect({"a": np.zeros(9)}, to=backup.addresses[0], name="other", on_commit=on_commit)
        with pytest.raises(RemusError, match="on_commit"):
            for _ in range(20):
                with within(0.5):
                    protection.checkpoint(timeout_s=0.5)
        with within(3.0), pytest.raises(RemusError, match="on_commit"):
            protection.checkpoint(timeout_s=0.3, wait=True)
        other.checkpoint(wait=True)
        with within(3.0), pytest.raises(RemusError, match="on_commit"):
            other.close(0.3)
        go_on.set()
        epoch = protection.checkpoint(timeout_s=LONG_S, wait=True)
        protection.close()
        assert [number for number in told if number] == list(range(1, epoch + 1))


def test_an_interval_whose_callback_raises_or_blocks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    go_on = threading.Event()

    def leave() -> bytes:
        raise SystemExit(3)

    def block() -> bytes:
        go_on.wait(LONG_S)
        return b""

    with backup_in(tmp_path / "store") as backup:
        options: dict[str, Any] = {"to": backup.addresses[0], "interval_s": 0.01, "lock": threading.Lock()}
        left = protect({"a": np.zeros(9)}, name="left", device_state=leave, **options)
        until(lambda: any(record.getMessage() == "the protection has ended" for record in caplog.records))
        for call in (lambda: left.wait_for(0), left.close):
            with pytest.raises(RemusError, match="SystemExit"):
                call()
        options["lock"] = threading.Lock()
        blocked = protect({"a": np.zeros(9)}, name="blocked", device_state=block, **options)
        until(options["lock"].locked)
        with within(0.3), pytest.raises(RemusError, match="does not end"):
            blocked.close(0.3)
        go_on.set()
        until(lambda: not any(thread.name == "checkpoints" for thread in threading.enumerate()))
        assert not options["lock"].locked()


@pytest.mark.parametrize("timeout_s", [math.inf, 1e30])
def test_a_time_without_end(tmp_path: Path, timeout_s: float) -> None:
    with backup_in(tmp_path / "store") as backup:
        for options in ({}, {"interval_s": 0.01, "lock": threading.Lock()}):
            memory = Memory(backup.addresses[0], **options)
            if not options:
                memory.protection.checkpoint(timeout_s=timeout_s, wait=True)
            memory.protection.wait_for(0, timeout_s)
            memory.protection.close(timeout_s)


def test_no_number_is_no_time(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store") as backup, Memory(backup.addresses[0]) as memory:
        memory.step(1)
        before = memory.protection.status()["epoch"]
        for call in (
            lambda: memory.protection.checkpoint(timeout_s=math.nan),
            lambda: memory.protection.wait_for(0, math.nan),
            lambda: memory.protection.close(math.nan),
        ):
            with pytest.raises(ValueError, match="no number"):
                call()  # type: ignore[no-untyped-call]
        assert memory.protection.status()["epoch"] == before
        memory.step(2)


@pytest.mark.parametrize("cause", [SystemExit(3), SourceError("gone")])
def test_a_wait_ends_with_the_thread(tmp_path: Path, cause: BaseException) -> None:
    """Its link is well: nothing but the thread's end says that the epoch will not come."""
    ready = threading.Event()

    def device_state() -> bytes:
        if ready.is_set():
            raise cause
        return b""

    with backup_in(tmp_path / "store") as backup:
        memory = Memory(backup.addresses[0], device_state=device_state, interval_s=0.01, lock=threading.Lock())
        memory.protection.wait_for(0, LONG_S)
        threading.Timer(0.1, ready.set).start()
        with within(1.0), pytest.raises(RemusError, match=r"SystemExit|gone"):
            memory.protection.wait_for(1 << 40, LONG_S)
        with pytest.raises(RemusError):
            memory.protection.close()


# Threads and callbacks that call at once


def test_threads_that_call_at_once_take_turns(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store") as backup, Memory(backup.addresses[0]) as memory:
        memory.step(1)
        epochs: list[int] = []
        faults: list[BaseException] = []

        def call() -> None:
            try:
                for number in range(40):
                    if number == 20:
                        memory.primary.hang_up()
                    epochs.append(memory.protection.checkpoint(timeout_s=LONG_S, wait=bool(number % 2)))
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(2, 40):
            memory.array[number % len(memory.array)] += 1
            time.sleep(0.001)
        for thread in threads:
            thread.join(LONG_S)
        assert not faults
        assert len(set(epochs)) == len(epochs) == 160, "two calls made one checkpoint"
        memory.step(3)
        assert np.array_equal(restored(tmp_path / "store"), memory.array)


def test_a_turn_that_does_not_come(tmp_path: Path) -> None:
    has_turn, go_on = threading.Event(), threading.Event()

    def device_state() -> bytes:
        if threading.current_thread() is not threading.main_thread():
            has_turn.set()
            go_on.wait(LONG_S)
        return b""

    with backup_in(tmp_path / "store") as backup, Memory(backup.addresses[0], device_state=device_state) as memory:
        memory.step(1)
        slow = threading.Thread(target=memory.protection.checkpoint)
        slow.start()
        assert has_turn.wait(LONG_S)
        with within(0.2), pytest.raises(RemusError, match="another thread"):
            memory.protection.checkpoint(timeout_s=0.2)
        go_on.set()
        slow.join(LONG_S)
        memory.step(2)


def test_a_checkpoint_within_a_checkpoint_is_refused(tmp_path: Path) -> None:
    refused = []

    def device_state() -> bytes:
        try:
            memory.protection.checkpoint(timeout_s=math.inf)
        except ValueError as error:
            refused.append(error)
        return b""

    with backup_in(tmp_path / "store") as backup, Memory(backup.addresses[0], device_state=device_state) as memory:
        for number in (1, 2, 3):
            memory.step(number)
        assert len(refused) == 3
        assert np.array_equal(restored(tmp_path / "store"), memory.array)


@pytest.mark.parametrize("is_other_thread", [False, True])
def test_a_call_that_was_cut_short_is_over(tmp_path: Path, is_other_thread: bool) -> None:
    """An interrupt may fall where a call gives its turn back, and its traceback may be kept."""
    kept: list[BaseException] = []

    def steps(row: int, at: float) -> int:
        """Take a checkpoint that is interrupted at that line of turns.py; returns how many lines it came to."""
        with Interrupter(at, files=(turns.__file__,)) as striking:
            memory.step(row, wait=False)
        return striking.seen

    with backup_in(tmp_path / "store") as backup, Memory(backup.addresses[0]) as memory:
        memory.step(1)
        count = steps(2, math.inf)
        for row, at in enumerate(range(count - 8, count), 3):  # the turn is given back in the last ones
            try:
                steps(row, at)
            except KeyboardInterrupt as error:
                kept.append(error)
            if is_other_thread:
                other = threading.Thread(target=memory.step, args=[row])
                other.start()
                other.join(LONG_S)
                assert not other.is_alive()
            else:
                memory.step(row)
            assert np.array_equal(restored(tmp_path / "store"), memory.array)
    assert len(kept) > 4


def test_closed_beside_a_call_it_is_not_linked_again(tmp_path: Path) -> None:
    """What the other call would send then is memory that is not there any more."""
    capturing, closed, told = threading.Event(), threading.Event(), list[str]()

    def on_phase(name: str, epoch: int) -> None:
        if name == "capture" and epoch == 1:
            capturing.set()
            closed.wait(LONG_S)

    def call() -> None:
        try:
            memory.protection.checkpoint()
        except ValueError as error:
            told.append(str(error))

    with backup_in(tmp_path / "store") as backup:
        memory = Memory(backup.addresses[0], on_phase=on_phase)
        memory.step(1)
        other = threading.Thread(target=call)
        other.start()
        assert capturing.wait(LONG_S)
        memory.primary.close()
        closed.set()
        other.join(LONG_S)
        assert told
        assert "closed" in told[0]
        assert not memory.primary.is_linked
        assert [entry.epoch for entry in entries(tmp_path / "store")] == [0]
        memory.protection.close()
        with Memory(backup.addresses[0]) as again:  # the name is free
            again.step(1)


def test_closed_while_it_makes_a_link(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store") as backup:

        def dial() -> Connection:
            connection = connect(Address.parse(backup.addresses[0]))
            primary.close(LONG_S)
            return connection

        primary = Primary("orders", OwnMemory({"a": np.zeros(9)}), dial)
        with pytest.raises(ValueError, match="closed"):
            primary.checkpoint(LONG_S)
        assert primary.committed is None
        with Memory(backup.addresses[0]) as again:  # the name is free
            again.step(1)


def test_dropped_without_close_it_frees_its_name(tmp_path: Path) -> None:
    with backup_in(tmp_path / "store") as backup:
        protection = protect({"a": np.zeros(9)}, to=backup.addresses[0], name="orders")
        protection.checkpoint(wait=True)
        del protection
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)


@pytest.mark.parametrize("hook", ["device_state", "on_paused", "on_turn", "on_phase", "connect"])
@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), OSError("no")])
def test_whatever_another_callback_raises_the_next_checkpoint_is_right(
    tmp_path: Path, hook: str, error: BaseException
) -> None:
    lock, array = threading.Lock(), np.zeros((16, 512), dtype=np.int64)
    left = 0  # calls of the hook, up to the one that raises

    def called(name: str, *_: Any) -> None:
        nonlocal left
        if name == hook and left:
            left -= 1
            if not left:
                raise error

    def device_state() -> bytes:
        called("device_state")
        return b""

    def dial() -> Connection:
        called("connect")
        return connect(Address.parse(backup.addresses[0]))

    with backup_in(tmp_path / "store") as backup, ExitStack() as stack:
        source = OwnMemory({"array": array}, lock=lock, device_state=device_state)
        stack.callback(source.close)
        hooks: dict[str, Any] = {name: partial(called, name) for name in ("on_paused", "on_turn", "on_phase")}
        primary = Primary("orders", source, dial, **hooks)
        stack.callback(primary.close)

        def step(number: int) -> None:
            array[number % len(array)] += number
            primary.checkpoint(LONG_S, wait=True)

        for raising in (1, 2):
            step(raising)
            if hook == "connect":
                primary.hang_up()
                until(lambda: is_lost(primary))
            left = raising
            with suppress(SystemExit, GeneratorExit, OSError):
                step(raising + 10)
            assert not lock.locked()
            left = 0
            step(raising + 20)
            assert np.array_equal(restored(tmp_path / "store"), array)


# What is acknowledged, and what is refused


def acks_the_last_of_three(peer: Peer) -> None:
    peer.welcome()
    commits = []
    while (event := peer.hear()) is not None:
        if isinstance(event, messages.Commit):
            commits.append(event)
            if len(commits) == 3:
                peer.say(messages.Ack(level="durable", position=event.position))


def test_an_acknowledgement_stands_for_all_before_it() -> None:
    commits: list[Committed] = []
    with Liar(acks_the_last_of_three) as liar:
        protection = protect({"a": np.zeros(9)}, to=liar.address, name="orders", window=4, on_commit=commits.append)
        newest = [protection.checkpoint() for _ in range(3)][-1]
        position = protection.wait_for(newest, LONG_S)
        assert position.epoch == newest == 2
        assert protection.committed == position
        assert protection.wait_for(0, 0.0) == position
        protection.close(1.0)
    assert [commit.epoch for commit in commits] == [0, 1, 2]
    assert commits[-1].position == position


def test_a_commit_that_comes_while_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` has ended, so that nothing else will come: what was on its way has been taken all the same."""
    has_committed, asked = Window.has_committed, threading.Event()

    def late(window: Window, epoch: int) -> bool:
        was = has_committed(window, epoch)
        asked.set()
        until(lambda: has_committed(window, epoch))
        return was

    def serve(peer: Peer) -> None:
        peer.welcome()
        while (event := peer.hear()) is not None:
            if isinstance(event, messages.Commit):
                asked.wait(LONG_S)
                peer.say(messages.Ack(level="durable", position=event.position))

    with Liar(serve) as liar:
        primary = primary_of(OwnMemory({"a": np.zeros(9)}), "orders", liar.address)
        running = primary.run()
        assert next(running).sent.epoch == 0
        running.close()  # type: ignore[attr-defined]
        monkeypatch.setattr(Window, "has_committed", late)
        assert primary.wait_for(0, LONG_S).epoch == 0
        primary.close(1.0)


def says_fenced_by_its_own_term(peer: Peer) -> None:
    peer.welcome(term=5)
    peer.hear()
    peer.say(messages.Error(code="fenced", message="stop", term=5))
    peer.wait()


def test_fenced_by_the_term_that_it_has(tmp_path: Path) -> None:
    """As a backup says that was promoted under the term that this primary has."""
    with Liar(says_fenced_by_its_own_term) as liar:
        protection = protect({"a": np.zeros(9)}, to=liar.address, name="orders", term=5)
        for _ in range(3):
            with pytest.raises(Fenced):
                protection.checkpoint(wait=True, timeout_s=LONG_S)
        assert liar.visits == 1
        with suppress(RemusError):
            protection.close(0.1)


def test_a_pause_that_somebody_else_ended_makes_no_checkpoint(tmp_path: Path) -> None:
    """A worker that is let run on in a pause may have written to what was copied."""
    memory = Path(f"/dev/shm/remus-primary-{os.getpid()}")
    memory.write_bytes(bytes(8 * PAGE_SIZE))
    try:
        with writer_process(memory) as worker, backup_in(tmp_path / "store") as backup, ExitStack() as stack:
            interfering = [False]

            def device_state() -> bytes:
                if interfering[0]:
                    os.kill(worker.pid, signal.SIGCONT)
                    until(lambda: process_state(worker.pid) not in "Tt")
                return b""

            source = SharedFile(memory, Processes([worker.pid]), device_state=device_state)
            stack.callback(source.close)
            primary = primary_of(source, "orders", backup.addresses[0])
            stack.callback(primary.close)
            primary.checkpoint(wait=True)
            interfering[0] = True
            with pytest.raises(SourceError):
                primary.checkpoint(wait=True)
            assert [entry.epoch for entry in entries(tmp_path / "store")] == [0]
            interfering[0] = False
            assert primary.checkpoint(wait=True) == 1
    finally:
        memory.unlink()


def test_a_new_run_follows_what_the_backup_holds(tmp_path: Path) -> None:
    """The chain of positions goes from one run of the primary into the next."""
    with backup_in(tmp_path / "store") as backup:
        for _ in range(2):
            with Memory(backup.addresses[0]) as memory:
                memory.step(1)
        history = Store(tmp_path / "store").history("orders")
        held = [entry.position for entry in history.entries()]
        record = history.restore().record
        assert record is not None
        assert record.before == held[0]
