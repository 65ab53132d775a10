"""A flag may be closed while another thread is just setting it, and set after that."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest
from services import until

from remus_ckpt.flag import Flag


def test_a_flag_that_is_closed_while_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of its descriptor is nobody else's before the other thread is done with it."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    try:
        while True:
            ours.send(bytes(1 << 16))
    except BlockingIOError:
        ours.setblocking(True)  # from now on, to write is to wait
    number = ours.detach()
    monkeypatch.setattr(os, "eventfd", lambda *_: number)
    flag = Flag()
    errors: list[BaseException] = []

    def set_it() -> None:
        try:
            flag.set()
        except BaseException as error:
            errors.append(error)

    setting = threading.Thread(target=set_it, daemon=True)
    setting.start()
    until(lambda: Path(f"/proc/self/task/{setting.native_id}/syscall").read_text().split()[1:2] == [hex(number)])
    flag.close()
    assert flag.fileno() == -1
    with (tmp_path / "next").open("wb") as file:
        assert file.fileno() != number
    with theirs:
        theirs.settimeout(10)
        last = b""
        while received := theirs.recv(1 << 20):
            last = received
        assert last.endswith((1).to_bytes(8, "little"))
    setting.join()
    assert errors == []
    flag.set()
    flag.clear()


def test_a_flag_frees_its_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    flag = Flag()
    assert len(os.listdir("/proc/self/fd")) == before + 1
    flag.close()
    flag.close()
    assert len(os.listdir("/proc/self/fd")) == before
    flag = Flag()
    del flag
    assert len(os.listdir("/proc/self/fd")) == before
