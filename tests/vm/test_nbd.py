"""The NBD server's side: every split of the bytes, wrong bytes, and lengths that nobody should believe."""

from __future__ import annotations

import contextlib
import errno
import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remus_ckpt.errors import LimitExceeded, Malformed
from remus_ckpt.vm.nbd import MAX_OPTION_BYTES, MAX_OPTIONS, MAX_REQUEST_BYTES, Command, Request, Server

SIZE = 1 << 20
READ, WRITE, FLUSH = Command.READ, Command.WRITE, Command.FLUSH
GO, EXPORT_NAME, ABORT, LIST, INFO, STARTTLS = 7, 1, 2, 3, 6, 5


def option(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data) if length is None else length) + data


def go(name: bytes = b"disk", number: int = GO) -> bytes:
    return option(number, struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, 3))


def request(command: int, offset: int = 0, length: int = 0, data: bytes = b"", handle: bytes = b"abcdefgh") -> bytes:
    return struct.pack(">IHH8sQI", 0x25609513, 0, command, handle, offset, length) + data


def feed(server: Server, data: bytes, step: int) -> tuple[list[Request], bytes]:
    """Give it the bytes in pieces. Returns the requests, and what it sends."""
    requests, out = [], b""
    while True:
        while (found := server.next_event()) is not None:
            requests.append(found)
        out += server.to_send()
        if not data or server.is_over:
            return requests, out
        room = server.get_buffer()
        size = min(step, len(room), len(data))
        room[:size] = data[:size]
        server.buffer_updated(size)
        data = data[size:]


HELLO = struct.pack(">I", 3)
DIALOGUE = (
    HELLO + option(8) + option(LIST) + go(b"none") + go(number=INFO) + go()
    + request(WRITE, 512, 1024, bytes(range(256)) * 4) + request(READ, 0, 4096) + request(9) + request(FLUSH)
    + request(READ, SIZE, 512) + request(WRITE, SIZE, 512, bytes(512)) + request(READ, 1, 512) + request(2)
)  # fmt: skip


@given(step=st.integers(1, 400))
def test_any_split_of_the_bytes_is_the_same(step: int) -> None:
    server = Server(SIZE, "disk")
    requests, out = feed(server, DIALOGUE, step)
    assert server.is_over
    assert [(one.command, one.offset, one.length) for one in requests] == [(1, 512, 1024), (0, 0, 4096), (3, 0, 0)]
    assert requests[0].data is not None
    assert bytes(requests[0].data) == bytes(range(256)) * 4
    assert out == feed(Server(SIZE, "disk"), DIALOGUE, len(DIALOGUE))[1]
    assert out.startswith(b"NBDMAGICIHAVEOPT\0\3")
    errors = [error for magic, error, _ in struct.iter_unpack(">II8s", out[-4 * 16 :]) if magic == 0x67446698]
    assert errors == [22, 22, 28, 22]


def test_a_read_that_is_too_long_is_declined() -> None:
    requests, out = feed(Server(1 << 40, "disk"), HELLO + go() + request(READ, 0, MAX_REQUEST_BYTES + 512), 100)
    assert not requests
    assert struct.unpack(">II8s", out[-16:])[1] == errno.EOVERFLOW


def test_the_old_way_to_choose_an_export() -> None:
    for flags, tail in ((1, 124), (3, 0)):
        _, out = feed(Server(SIZE, "disk"), struct.pack(">I", flags) + option(EXPORT_NAME, b""), 10)
        assert out[18:] == struct.pack(">QH", SIZE, 0b1101101) + bytes(tail)


def test_a_client_may_give_up() -> None:
    for goodbye in (option(ABORT), b""):
        server = Server(SIZE, "disk")
        feed(server, HELLO + goodbye, 100)
        server.buffer_updated(0)
        assert server.next_event() is None
        assert server.is_over


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", 0),
        struct.pack(">I", 7),
        HELLO + b"IHAVEOPX" + bytes(8),
        HELLO + option(EXPORT_NAME, b"other"),
        HELLO + option(LIST) * MAX_OPTIONS,
        HELLO + option(LIST, length=MAX_OPTION_BYTES + 1),
        HELLO + option(77, length=0xFFFFFFFF),
        HELLO + go() + bytes(28),
        HELLO + go() + request(WRITE, 0, MAX_REQUEST_BYTES + 512),
        HELLO + go() + request(WRITE, 0, 0xFFFFFFFF),
    ],
)
def test_what_breaks_a_rule_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed) as caught:
        feed(Server(SIZE, "disk"), data, 1 << 16)
    assert caught.value.section in {"disk.md §2.1", "disk.md §2.2"}
    assert caught.value.offset is not None
    assert isinstance(caught.value, LimitExceeded) == ("at most" in str(caught.value))


def test_odd_options_are_declined() -> None:
    odd = [option(STARTTLS), option(LIST, b"x"), option(GO), option(GO, b"\xff" * 20), option(GO, go()[16:] + b"x")]
    for one in odd:
        server = Server(SIZE, "disk")
        _, out = feed(server, HELLO + one, 100)
        assert struct.unpack_from(">QII", out, 18)[2] >> 31, "an error"
        assert not server.is_over


@given(data=st.binary(max_size=300), front=st.sampled_from([b"", HELLO, HELLO + go(), HELLO + go() + request(FLUSH)]))
def test_garbage_is_an_error_of_ours_or_waits(data: bytes, front: bytes) -> None:
    with contextlib.suppress(Malformed):
        feed(Server(SIZE, "disk"), front + data, 50)


def test_a_length_alone_takes_no_memory() -> None:
    server = Server(1 << 40, "disk")
    feed(server, HELLO + go(), 100)
    tracemalloc.start()
    feed(server, request(WRITE, 0, MAX_REQUEST_BYTES), 100)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
