"""Checkpoints of programs that run in an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remus_ckpt import Backup, open_store, protect
from remus_ckpt.errors import Fenced, LinkError
from remus_ckpt.service.protect import Protection

LONG_S = 30.0


@pytest.fixture
def arrays() -> dict[str, Any]:
    return {"one": np.zeros(4096, dtype=np.int64), "two": np.zeros(4096, dtype=np.int64)}


@contextmanager
def hanging(tmp_path: Path, first: int = 0) -> Iterator[tuple[str, threading.Event, threading.Event]]:
    """A backup that stages checkpoint `first` and later ones only once the second event is set; the first says that one
    has come."""
    has_come, go_on = threading.Event(), threading.Event()

    def on_phase(phase: str, epoch: int) -> None:
        if phase == "staged" and epoch >= first:
            has_come.set()
            go_on.wait(LONG_S)

    with Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"], on_phase=on_phase) as backup:
        try:
            yield backup.addresses[0], has_come, go_on
        finally:
            go_on.set()


async def until(condition: Any) -> None:
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def restored(tmp_path: Path, epoch: int) -> dict[str, Any]:
    return open_store(tmp_path / "store")["desk"].at(epoch).arrays()


def test_the_loop_runs_on_while_the_backup_commits(tmp_path: Path, arrays: dict[str, Any]) -> None:
    async def main() -> None:
        with hanging(tmp_path) as (address, has_come, go_on), protect(arrays, to=address, name="desk") as protection:
            arrays["one"][7] = 7
            taking = asyncio.create_task(protection.acheckpoint(timeout_s=LONG_S))
            await until(has_come.is_set)  # it could not come back here otherwise
            assert not taking.done()
            arrays["one"][8] = 8  # after the pause
            go_on.set()
            epoch = await taking
            assert protection.committed is not None
            assert protection.committed.epoch == epoch
        found = restored(tmp_path, epoch)["one"]
        assert (found[7], found[8]) == (7, 0)

    asyncio.run(main())


def test_a_pause_falls_between_the_steps_of_coroutines(tmp_path: Path, arrays: dict[str, Any]) -> None:
    is_over = False

    async def write() -> None:
        while not is_over:
            arrays["one"] += 1
            time.sleep(0.002)  # not an await: the step is not over
            arrays["two"] += 1
            await asyncio.sleep(0)

    async def main() -> list[int]:
        nonlocal is_over
        with (
            Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"]) as backup,
            protect(arrays, to=backup.addresses[0], name="desk") as protection,
        ):
            writing = asyncio.create_task(write())
            epochs = [await protection.acheckpoint(timeout_s=LONG_S) for _ in range(20)]
            is_over = True
            await writing
            return epochs

    epochs = asyncio.run(main())
    assert epochs == list(range(20))
    values = []
    for epoch in epochs:
        found = restored(tmp_path, epoch)
        assert (found["one"] == found["one"][0]).all()
        assert (found["one"] == found["two"]).all(), "the pause fell into a step"
        values.append(int(found["one"][0]))
    assert values == sorted(set(values)), "the writer got nowhere"


def test_a_lock_stops_the_writers_and_not_the_loop(tmp_path: Path, arrays: dict[str, Any]) -> None:
    lock = threading.Lock()
    steps = 0

    async def main() -> None:
        nonlocal steps
        with (
            Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"]) as backup,
            protect(arrays, to=backup.addresses[0], name="desk", lock=lock) as protection,
        ):
            lock.acquire()
            arrays["one"][0] = 1
            taking = asyncio.create_task(protection.acheckpoint(timeout_s=LONG_S))
            for _ in range(20):
                await asyncio.sleep(0.01)
                steps += 1
            assert not taking.done()
            arrays["two"][0] = 1
            lock.release()
            epoch = await taking
        found = restored(tmp_path, epoch)
        assert (found["one"][0], found["two"][0]) == (1, 1)

    asyncio.run(main())
    assert steps == 20


def test_calls_at_once_take_turns(tmp_path: Path, arrays: dict[str, Any]) -> None:
    async def one(protection: Protection, row: int) -> int:
        arrays["one"][row] = row + 1
        epoch = await protection.acheckpoint(timeout_s=LONG_S)
        assert restored(tmp_path, epoch)["one"][row] == row + 1, "written before the call"
        return epoch

    async def main() -> list[int]:
        with (
            Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"]) as backup,
            protect(arrays, to=backup.addresses[0], name="desk") as protection,
        ):
            return await asyncio.gather(*(one(protection, row) for row in range(8)))

    assert sorted(asyncio.run(main())) == list(range(8))


def test_a_call_that_is_cancelled_leaves_what_was_before_or_what_came_after(
    tmp_path: Path, arrays: dict[str, Any]
) -> None:
    complaints: list[Any] = []

    async def main() -> None:
        with hanging(tmp_path, 1) as (address, has_come, go_on), protect(arrays, to=address, name="desk") as protection:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
            assert await protection.acheckpoint() == 0
            arrays["one"][:] = 1
            with pytest.raises(asyncio.TimeoutError):
                async with asyncio.timeout(0.2):
                    await protection.acheckpoint(timeout_s=LONG_S)
            await until(has_come.is_set)
            arrays["two"][:] = 2
            waiting = asyncio.create_task(protection.acheckpoint(timeout_s=LONG_S))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            go_on.set()
            assert await waiting == 2
        for epoch, one, two in ((0, 0, 0), (1, 1, 0), (2, 1, 2)):
            found = restored(tmp_path, epoch)
            assert (set(found["one"]), set(found["two"])) == ({one}, {two})

    asyncio.run(main())
    assert complaints == []


def test_closing_behind_a_call_that_was_cancelled(tmp_path: Path, arrays: dict[str, Any]) -> None:
    """Wherever its thread is, nothing hangs."""

    async def main(delay_s: float, epoch: int) -> None:
        protection = protect(arrays, to=backup.addresses[0], name="desk")
        protection.checkpoint(wait=True)
        arrays["one"] += 1
        taking = asyncio.create_task(protection.acheckpoint(timeout_s=LONG_S))
        await asyncio.sleep(delay_s)
        taking.cancel()
        protection.close()
        await asyncio.gather(taking, return_exceptions=True)
        with pytest.raises(ValueError, match="closed"):
            await protection.acheckpoint()

    with Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"]) as backup:
        for number in range(10):
            begin = time.monotonic()
            asyncio.run(main(number * 0.0005, number))
            assert time.monotonic() - begin < 8.0
    begin = time.monotonic()
    while any(thread.name == "acheckpoint" for thread in threading.enumerate()):
        assert time.monotonic() - begin < LONG_S
        time.sleep(0.01)


def test_errors_come_where_the_call_is_awaited(tmp_path: Path, arrays: dict[str, Any]) -> None:
    async def main() -> None:
        with Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"]) as backup:
            protection = protect(arrays, to=backup.addresses[0], name="desk")
            threaded = protect(
                {"a": np.zeros(5)}, to=backup.addresses[0], name="thread", interval_s=0.01, lock=threading.Lock()
            )
            with pytest.raises(ValueError, match="thread"):
                await threaded.acheckpoint()
            await protection.acheckpoint()
            backup.failover("desk")
            with pytest.raises(Fenced):
                await protection.acheckpoint()
            backup.close()
            nobody = protect({"a": np.zeros(5)}, to=backup.addresses[0], name="none", connect_timeout_s=0)
            with pytest.raises(LinkError):
                await nobody.acheckpoint(timeout_s=0.2)

    asyncio.run(main())
