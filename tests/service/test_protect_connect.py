"""protect() reaches its backup, or says at once why it does not."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from liars import Liar, Peer
from services import LONG_S, until

from remus_ckpt import Backup, Policy, open_store, protect
from remus_ckpt.errors import Fenced, LinkError, Refused, RemusError

SLACK_S = 2.0


def options(in_thread: bool) -> dict[str, Any]:
    return {"interval_s": 0.01, "lock": threading.Lock()} if in_thread else {}


@pytest.mark.parametrize("in_thread", [False, True])
def test_an_address_where_nobody_is(tmp_path: Path, in_thread: bool) -> None:
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    array = bytearray(5)
    begin = time.monotonic()
    with pytest.raises(LinkError) as caught:
        protect(
            {"a": array},
            to=f"unix:{tmp_path}/nobody",
            name="desk",
            connect_timeout_s=0.3,
            on_commit=print,
            **options(in_thread),
        )
    assert time.monotonic() - begin < 0.3 + SLACK_S
    assert f"{tmp_path}/nobody" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    array.append(1)  # it is not held any more
    del caught
    until(lambda: threading.active_count() <= before[0] and len(os.listdir("/proc/self/fd")) <= before[1])


def test_a_backup_that_does_not_answer() -> None:
    def serve(peer: Peer) -> None:
        while peer.socket.recv(1 << 16):
            pass

    with Liar(serve) as liar:
        begin = time.monotonic()
        with pytest.raises(LinkError, match="answered"):
            protect({"a": np.zeros(5)}, to=liar.address, name="desk", connect_timeout_s=0.3)
        assert time.monotonic() - begin < 0.3 + SLACK_S


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("timeout_s", [LONG_S, math.inf, None])
def test_a_backup_that_comes_later_is_waited_for(tmp_path: Path, timeout_s: float | None, in_thread: bool) -> None:
    address = f"unix:{tmp_path}/socket"
    made: list[Any] = []

    def begin() -> None:
        made.append(
            protect({"a": np.ones(5)}, to=address, name="desk", connect_timeout_s=timeout_s, **options(in_thread))
        )

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join(0.3)
    assert not made
    with Backup(tmp_path / "store", [address]) as backup:
        thread.join(LONG_S)
        (protection,) = made
        assert backup.status()["names"]["desk"]["connected"]
        if in_thread:
            until(lambda: protection.committed)
        else:
            assert protection.checkpoint(wait=True) == 0
        protection.close()
    assert (open_store(tmp_path / "store")["desk"][-1].arrays()["a"] == 1).all()


def test_without_a_wait_the_first_checkpoint_connects(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/socket"
    begin = time.monotonic()
    protection = protect({"a": np.zeros(5)}, to=address, name="desk", connect_timeout_s=0)
    with pytest.raises(LinkError):
        protection.checkpoint(timeout_s=0.1)
    assert time.monotonic() - begin < SLACK_S
    with Backup(tmp_path / "store", [address]):
        assert protection.checkpoint(wait=True) == 0
        protection.close()


def test_a_backup_that_is_lost_later_is_found_again(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/socket"
    array = np.zeros(5)
    with Backup(tmp_path / "store", [address]):
        protection = protect({"a": array}, to=address, name="desk")
    with pytest.raises(LinkError):
        protection.checkpoint(timeout_s=0.2)
    with Backup(tmp_path / "store", [address]):
        array += 1
        protection.checkpoint(wait=True, timeout_s=LONG_S)
        protection.close()
    assert (open_store(tmp_path / "store")["desk"][-1].arrays()["a"] == 1).all()


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_refusal_that_another_try_would_not_change_comes_at_once(tmp_path: Path, in_thread: bool) -> None:
    with Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"], policy=Policy(names=frozenset({"desk"}))) as backup:
        arguments: dict[str, Any] = {"to": backup.addresses[0], "connect_timeout_s": None}
        with pytest.raises(Refused) as caught:
            protect({"a": np.zeros(5)}, name="other", **arguments, **options(in_thread))
        assert caught.value.code == "name"
        with protect({"a": np.zeros(5)}, name="desk", **arguments) as protection:
            protection.checkpoint(wait=True)
            backup.failover("desk")
            with suppress(RemusError):
                protection.close()
        told: list[Fenced] = []
        with pytest.raises(Fenced) as fenced:
            protect({"a": np.zeros(5)}, name="desk", term=0, on_fenced=told.append, **arguments, **options(in_thread))
        assert told == [fenced.value]


def test_a_time_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="number"):
        protect({"a": np.zeros(5)}, to=f"unix:{tmp_path}/socket", name="desk", connect_timeout_s=math.nan)


# Names that come to mean something else


def test_another_array_under_a_name_ends_it_with_an_error(tmp_path: Path) -> None:
    state = {"a": np.zeros(5)}
    with (
        Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"]) as backup,
        protect(state, to=backup.addresses[0], name="desk") as protection,
    ):
        state["a"] += 1
        protection.checkpoint(wait=True)
        state["a"] = state["a"] + 1
        with pytest.raises(RemusError, match="'a'"):
            protection.checkpoint(wait=True)
    assert len(open_store(tmp_path / "store")["desk"]) == 1


@pytest.mark.parametrize("in_thread", [False, True])
def test_an_array_that_nobody_has_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, in_thread: bool
) -> None:
    caplog.set_level(logging.WARNING)
    kept, array = np.zeros(5), np.zeros(5)

    def reports() -> list[Any]:
        found = [record.fields for record in caplog.records if "refers" in record.getMessage()]  # type: ignore[attr-defined]
        return [fields["array"] for fields in found]

    with (
        Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"]) as backup,
        protect(
            {"array": array, "kept": kept}, to=backup.addresses[0], name="desk", **options(in_thread)
        ) as protection,
    ):

        def step() -> None:
            if in_thread:
                before = protection.status()["epoch"] or 0
                until(lambda: (protection.status()["epoch"] or 0) > before + 1)
            else:
                protection.checkpoint(wait=True)

        step()
        assert reports() == []
        array = array * 2
        step()
        step()
        assert reports() == ["array"]
