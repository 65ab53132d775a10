"""A bit that changes on its way costs a link; a backup that really is another, or really refuses, is told at once."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from liars import Liar, Peer
from proxy import Proxy, in_last_byte
from store_support import fill
from test_service import LONG_S, Memory, backup_in, restored, until

from remus_ckpt import Remote, protect
from remus_ckpt.errors import Refused, UnknownFormat
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.session import messages
from remus_ckpt.store import Store
from remus_ckpt.store.stored import Stored

ARRAY_BYTES = 64 * PAGE_SIZE
PREFACE = 8


def in_memory_size(data: bytes) -> int | None:
    """A high bit of the memory's size in the header of the stream: it then exceeds what a backup takes."""
    at = data.find(struct.pack("<Q", ARRAY_BYTES // PAGE_SIZE))
    return None if at < 0 else 8 * at + 26


def in_begin(data: bytes) -> int | None:
    return None if data.find(b"\xa4mode") < 0 else 8 * data.find(b"\xa4mode") + 8


FLIPS: dict[str, tuple[str, Callable[[bytes], int | None], str]] = {
    "the backup's first bit": ("far", lambda data: 0, ""),
    "the last of its preface": ("far", lambda data: 8 * PREFACE - 1, ""),
    "the head of the welcome": ("far", lambda data: 8 * (PREFACE + 5), "malformed"),
    "the welcome": ("far", in_last_byte, ""),
    "the primary's preface": ("near", lambda data: 3, "malformed"),
    "the length of the hello": ("near", lambda data: 8 * (PREFACE + 7) + 6, "malformed"),
    "the hello": ("near", in_last_byte, "malformed"),
    "the begin": ("near", in_begin, "malformed"),
    "the memory's size": ("near", in_memory_size, "limit"),
}  # fmt: skip
"""What changes → the side that it comes from, the bit, and the code with which the backup refuses it, if it sees it."""


@pytest.mark.parametrize("what", FLIPS)
def test_before_the_first_commit(tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    side, bit_of, code = FLIPS[what]
    with backup_in(tmp_path / "store") as backup, Proxy(backup.addresses[0]) as proxy:
        proxy.flips[side] = bit_of
        with Memory(proxy.address, array=np.zeros(ARRAY_BYTES // 8, dtype=np.int64).reshape(64, 512)) as memory:
            memory.step(0)
            memory.step(1)
            until(lambda: len(memory.commits) == 2)
            assert not proxy.flips and proxy.connections == 2
        assert np.array_equal(restored(tmp_path / "store"), memory.array)
    refused = [vars(record)["fields"] for record in caplog.records if record.getMessage() == "refused"]
    assert side == "far" or [fields["code"] for fields in refused] == [code]


def greets_otherwise(peer: Peer) -> None:
    peer.force(b"SSH-2.0-OpenSSH_9.2\r\n")
    peer.socket.recv(1 << 16)


def speaks_another_version(peer: Peer) -> None:
    peer.hear()
    peer.say(messages.Error(code="version", message="upgrade this side"))
    peer.wait()


def takes_no_such_memory(peer: Peer) -> None:
    peer.welcome()
    peer.hear()
    peer.say(messages.Error(code="limit", message="a device state of 300 MiB"))
    peer.wait()


@pytest.mark.parametrize(
    ("serve", "visits", "error"),
    [(greets_otherwise, 2, UnknownFormat), (speaks_another_version, 1, Refused), (takes_no_such_memory, 2, Refused)],
)
def test_who_is_told(serve: Callable[[Peer], None], visits: int, error: type[Exception]) -> None:
    with Liar(serve) as liar:
        begin = time.monotonic()
        with (
            pytest.raises(error),
            protect({"a": np.zeros(5)}, to=liar.address, name="desk", connect_timeout_s=LONG_S) as protection,
        ):
            protection.checkpoint(timeout_s=LONG_S, wait=True)
        assert time.monotonic() - begin < LONG_S / 2
        assert liar.visits == visits


@pytest.mark.parametrize("side", ["near", "far"])
def test_a_reader_reads_on(tmp_path: Path, side: str) -> None:
    store = Store(tmp_path / "store")
    with store.writer("orders") as writer:
        fill(writer, 4)
    expected: Any = store.history("orders").restore(3).memory
    found: list[Stored] = []
    with backup_in(tmp_path / "store") as backup, Proxy(backup.addresses[0]) as proxy:

        def in_bytes(data: bytes) -> int | None:
            is_them = b"\xa4read" in data if side == "near" else len(data) > PAGE_SIZE
            return in_last_byte(data) if is_them else None

        with Remote(f"{proxy.address}/orders") as remote:
            proxy.flips[side] = in_bytes
            found.append(remote.restore(3))
        assert not proxy.flips and proxy.connections == 2
    assert np.array_equal(found[0].memory, expected)
