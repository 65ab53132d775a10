"""The digest that two sides agree on: it takes the place of the checksums, and older peers still get theirs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest
from sessions import BEGIN, HELLO, WELCOME, Heap, frame, joined, push

from remus_ckpt.errors import Malformed
from remus_ckpt.session.frames import FLAGS, FrameType, choose_digest, parse_head
from remus_ckpt.session.machine import Session
from remus_ckpt.session.messages import FIELDS, Hello, Welcome

OFFERED = replace(HELLO, digests=("of tomorrow", "blake3", "sha256"))
AGREED = replace(WELCOME, digest="blake3")


def begun(hello: Hello, welcome: Welcome) -> tuple[Session, Session]:
    """A client and a server that wait for the first bytes of a stream."""
    client, server = Session("client"), Session("server")
    server.lender = Heap()
    push(server, joined(client.send(hello)))
    push(client, joined(server.send(welcome)))
    push(server, joined(client.send(BEGIN)))
    return client, server


@pytest.mark.parametrize("size", [10, 300_000])
@pytest.mark.parametrize(("hello", "welcome"), [(OFFERED, AGREED), (OFFERED, WELCOME), (HELLO, WELCOME)])
def test_what_the_digest_covers_has_no_checksum(hello: Hello, welcome: Welcome, size: int) -> None:
    client, server = begun(hello, welcome)
    data = joined(client.send_data([b"\5" * size]))
    assert bool(parse_head(data[:16], 0).crc) == (welcome.digest is None)
    flipped = bytearray(data)
    flipped[-1] ^= 1
    other = begun(hello, welcome)[1]
    push(server, data)
    assert server.lender.got == b"\5" * size  # type: ignore[union-attr]
    if welcome.digest is None:
        with pytest.raises(Malformed):
            push(other, bytes(flipped))
    else:
        push(other, bytes(flipped))  # for the digest of the checkpoint to find
        assert other.lender.got[-1] == 4  # type: ignore[union-attr]


def test_a_checksum_where_the_digest_has_its_place_is_refused() -> None:
    for agreed, crc_is_there in ((AGREED, True), (WELCOME, False)):
        _, server = begun(OFFERED, agreed)
        data = frame(FrameType.DATA, b"abc")
        if not crc_is_there:
            data = joined(begun(OFFERED, AGREED)[0].send_data([b"abc"]))
        with pytest.raises(Malformed):
            push(server, data)


@pytest.mark.parametrize("name", ["lz4", "zstd"])
def test_a_compressed_payload_keeps_its_checksum(name: Any) -> None:
    client, server = begun(OFFERED, AGREED)
    data = joined(client.send_data([bytes(10_000)], name))
    head = parse_head(data[:16], 0)
    assert head.flags == FLAGS[name] and head.crc
    flipped = bytearray(data)
    flipped[20] ^= 1
    other = begun(OFFERED, AGREED)[1]
    push(server, data)
    with pytest.raises(Malformed):
        push(other, bytes(flipped))


def test_a_digest_that_was_not_offered_is_refused() -> None:
    client, server = Session("client"), Session("server")
    push(server, joined(client.send(HELLO)))
    with pytest.raises(ValueError, match="digest"):
        server.send(AGREED)
    fields = {key: getattr(WELCOME, key) for key in FIELDS[Welcome]} | {"digest": "blake3", "position": None}
    fields |= {"stream": None}
    with pytest.raises(Malformed):
        push(client, b"\x89REMUSs\n" + frame(FrameType.WELCOME, msgpack.packb(fields)))


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [((), None), (("of tomorrow",), None), (("of tomorrow", "sha256", "blake3"), "sha256"), (("blake3",), "blake3")],
)
def test_the_first_known_digest_is_chosen(offered: tuple[str, ...], chosen: str | None) -> None:
    assert choose_digest(replace(HELLO, digests=offered)) == chosen


def test_a_hello_and_a_welcome_of_older_programs() -> None:
    """They lack the keys: nothing but SHA-256, and a checksum in each frame."""
    client, server = Session("client"), Session("server")
    fields = {key: getattr(HELLO, key) for key in FIELDS[Hello] if key != "digests"}
    (hello,) = push(server, b"\x89REMUSs\n" + frame(FrameType.HELLO, msgpack.packb(fields)))
    assert hello.digests == () and choose_digest(hello) is None
    client.send(OFFERED)
    fields = {key: getattr(WELCOME, key) for key in FIELDS[Welcome] if key not in ("digest", "position", "stream")}
    (welcome,) = push(client, b"\x89REMUSs\n" + frame(FrameType.WELCOME, msgpack.packb(fields)))
    assert welcome.digest is None
